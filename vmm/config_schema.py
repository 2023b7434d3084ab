"""The configuration's schema (JSON Schema, draft 2020-12): what files hold, checked by `check`.

`vmm config --schema` prints it. It is written down by hand, one entry a keyword of `MachineConfig`
and of the parts; a test compares the two.
"""

from __future__ import annotations

from vmm.block.drive import CACHES, DISCARDS, QUEUES_MAX, WERRORS
from vmm.block.probe import FORMATS
from vmm.config import BOOT_MODES, MAX_CPUS, ON_PANIC, TRANSPORTS
from vmm.config_types import shown
from vmm.errors import UsageError
from vmm.net.config import KINDS, VHOSTS
from vmm.virtio.console_config import PORTS_MAX
from vmm.virtio.net_spec import MTU_MAX, PAIRS_MAX
from vmm.virtio.rate import RATE_MAX
from vmm.virtio.vsock_config import CID_MAX, CID_MIN

Schema = dict[str, object]
ITEMS_MAX = 1000
"""Items of a list; no machine has room for as many devices."""

SIZE_PATTERN = r"^[0-9]+(\.[0-9]+)?([KkMmGgTt]([Ii]?[Bb])?|[Bb])$"


def _text(description: str, default: str | None = None, **more: object) -> Schema:
    schema: Schema = {"type": "string", "description": description, **more}
    return schema if default is None else {**schema, "default": default}


def _flag(description: str, default: bool = False) -> Schema:
    return {"type": "boolean", "description": description, "default": default}


def _number(description: str, low: int, high: int, default: int | None = None) -> Schema:
    schema: Schema = {
        "type": "integer", "description": description, "minimum": low, "maximum": high,
    }  # fmt: skip
    return schema if default is None else {**schema, "default": default}


def _size(description: str, default: int | None = None) -> Schema:
    schema: Schema = {
        "anyOf": [
            {"type": "integer", "minimum": 0},
            {"type": "string", "pattern": SIZE_PATTERN},
        ],
        "description": f"{description}: bytes, or text with K, M, G or T",
    }
    return schema if default is None else {**schema, "default": default}


def _table(properties: dict[str, Schema], required: list[str]) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _part(option: str, properties: dict[str, Schema], required: list[str]) -> Schema:
    """Text as the option takes it, or a table."""
    text = {"type": "string", "description": f"as {option} takes it"}
    return {"anyOf": [text, _table(properties, required)]}


def _list(description: str, items: Schema, **more: object) -> Schema:
    return {"type": "array", "description": description, "items": items, "default": [], **more}


DRIVE = {
    "path": _text("the image or block device"),
    "readonly": _flag("the guest may not write"),
    "format": _text("empty: raw", "", enum=["", *FORMATS]),
    "serial": _text("up to 20 ASCII characters", "", maxLength=20),
    "cache": _text("how the host caches it", "writeback", enum=list(CACHES)),
    "queues": _number("request queues", 1, QUEUES_MAX, 1),
    "snapshot": _flag("what the guest writes goes with the machine"),
    "werror": _text("what a full host file system does", "report", enum=list(WERRORS)),
    "discard": _text("off: the image keeps its space", "unmap", enum=list(DISCARDS)),
    "backing": _list("files that the image lies over, the nearest first", {"type": "string"}),
    "data_file": _text("a qcow2 image's data, or a VMDK descriptor's extents", ""),
    "logical_block_size": _number("bytes of the smallest request", 512, 4096, 512),
    "physical_block_size": _number("bytes to keep to; 0: 4096", 0, 4096, 0),
    "bps": _size("limit a second", 0),
    "burst": _size("what may come at once after a pause", 0),
    "iops": _number("requests a second, at most", 0, RATE_MAX, 0),
    "iops_burst": _number("requests at once after a pause", 0, RATE_MAX, 0),
}
NET = {
    "kind": _text("what it is connected to", enum=list(KINDS)),
    "name": _text("the tap, the bridge, the socket's path or the private LAN", ""),
    "mac": _text("aa:bb:cc:dd:ee:ff; empty: one is made up", ""),
    "pcap": _text("a file that records what passes", ""),
    "mtu": _number("bytes of the largest packet; 0: what the kind has", 0, MTU_MAX, 0),
    "address": _text("ADDRESS/BITS of the host's side of a tap that is made", ""),
    "queues": _number("queue pairs of a tap", 1, PAIRS_MAX, 1),
    "vhost": _text("whether the kernel carries a tap's frames", "off", enum=list(VHOSTS)),
    "ip": _text("the guest's address, set by the agent: A.B.C.D/BITS, dhcp or off", ""),
    "gateway": _text("with ip, the guest's way to other networks", ""),
    "dns": _list("with ip, name servers", {"type": "string"}),
    "forward": _list("tcp:HOST:GUEST or udp:HOST:GUEST, each", {"type": "string"}),
    "host_loopback": _flag("the guest reaches the host's loopback, at the gateway's address"),
}
for _way, _where in (("rx", "to the guest"), ("tx", "from the guest")):
    NET[f"{_way}_bps"] = _size(f"limit a second {_where}", 0)
    NET[f"{_way}_burst"] = _size(f"at once after a pause {_where}", 0)
    NET[f"{_way}_pps"] = _number(f"packets a second {_where}, at most", 0, RATE_MAX, 0)
    NET[f"{_way}_pps_burst"] = _number(f"packets at once {_where}", 0, RATE_MAX, 0)
PORT = {
    "name": _text("what the guest calls it"),
    "socket": _text("a UNIX socket to listen on", ""),
    "file": _text("what the guest's output goes into", ""),
}
VSOCK = {
    "cid": _number("the guest's address", CID_MIN, CID_MAX),
    "path": _text("the UNIX socket programs connect to; with _PORT, those the guest reaches", ""),
    "vhost": _flag("the host's kernel serves it, by AF_VSOCK"),
}
SHARE = {
    "path": _text("the directory"),
    "tag": _text("what the guest mounts"),
    "readonly": _flag("nothing in it changes"),
    "suid": _flag("the guest may set set-user-ID and set-group-ID bits in it"),
    "dev": _flag("the guest may make device nodes in it"),
}
VHOST_USER_BLK = {
    "socket": _text("the UNIX socket the back end listens on"),
    "queues": _number("request queues", 1, QUEUES_MAX, 1),
    "readonly": _flag("refuse a back end that lets the guest write"),
}

PROPERTIES: dict[str, Schema] = {
    "kernel": _text("a bzImage or ELF vmlinux"),
    "initrds": _list("initial RAM disks, concatenated", {"type": "string"}),
    "append": _text("added to the kernel command line after the default", ""),
    "default_append": _flag("whether the default command line is there", True),
    "memory": _size("guest RAM", 256 << 20),
    "cpus": _number("vCPUs", 1, MAX_CPUS, 1),
    "cpu": _text("host, max, x86-64-v2, -v3 or -v4, then ,+feature,-feature", "host"),
    "console": _text("none, auto, file:PATH or pty, perhaps after hvc,"),
    "boot": _text("how the kernel is started", "auto", enum=list(BOOT_MODES)),
    "acpi": _flag("whether there are ACPI tables", True),
    "cmdline_devices": _flag(
        "whether the kernel command line names virtio devices over MMIO, with ACPI too", False
    ),
    "timeout": {
        "type": "number",
        "description": "seconds from start to a forced end",
        "exclusiveMinimum": 0,
        "exclusiveMaximum": 1e9,
    },
    "on_panic": _text("what a panic of the guest does", "exit", enum=list(ON_PANIC)),
    "backing": _text("anonymous, memfd, hugetlbfs, ...; empty: what the devices need", ""),
    "drives": _list("disks", _part("--drive", DRIVE, ["path"])),
    "nets": _list("network cards", _part("--net", NET, ["kind"])),
    "rng": {
        "anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^(rate=.*)?$"}],
        "description": "an entropy device; rate=BYTES (a second) limits it",
        "default": False,
    },
    "ports": _list(
        "named console ports", _part("--port", PORT, ["name"]), maxItems=PORTS_MAX
    ),
    "balloon": _size("what a memory balloon starts with"),
    "vsock": _part("--vsock", VSOCK, ["cid"]),
    "shares": _list("host directories by virtio-fs", _part("--fs", SHARE, ["path", "tag"])),
    "vhost_user_blks": _list(
        "disks other processes serve", _part("--vhost-user-blk", VHOST_USER_BLK, ["socket"])
    ),
    "transport": _text("what virtio devices are on", "mmio", enum=list(TRANSPORTS)),
    "agent": _flag("whether commands can be run in the guest"),
    "root": _text("a directory or image that is the guest's root file system, and is not changed"),
    "rw": _list("with root: directories of the host that the guest may write", {"type": "string"}),
    "overlay": _list(
        "with root: directories whose changes in the guest go with it", {"type": "string"}
    ),
    "modules": _text("the kernel's lib/modules/VERSION; by default beside the kernel"),
    "device": _text("the KVM device", "/dev/kvm"),
    "fault_seed": {
        "type": "integer",
        "description": "what faults a program sets leave to chance follows from it",
        "default": 0,
    },
    "trace": _flag("tell of unclaimed ports and addresses"),
}  # fmt: skip

SCHEMA_KEY = "$schema"
"""What editors write into a file to know its schema by; it says nothing of the machine."""
SCHEMA: Schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "A virtual machine of vmm",
    "description": "Relative paths are taken from the file's directory.",
    **_table({SCHEMA_KEY: _text("where this schema is, for editors"), **PROPERTIES}, []),
}

TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "string": ((str,), "text"),
    "integer": ((int,), "a whole number"),
    "number": ((int, float), "a number"),
    "boolean": ((bool,), "true or false"),
    "array": ((list, tuple), "a list"),
    "object": ((dict,), "a table"),
}


def check(value: object, schema: Schema = SCHEMA, key: str = "") -> None:
    """UsageError, in a line that begins with the key, where `value` is not what `schema` says.

    Understands what this module's schema uses, no more; values that the parts of a configuration
    check themselves (ranges, choices) are left to them.
    """
    choices = schema.get("anyOf")
    if isinstance(choices, list):
        for choice in choices:
            if _is(value, str(choice["type"])):
                check(value, choice, key)
                return
        kinds = " or ".join(TYPES[choice["type"]][1] for choice in choices)
        raise UsageError(f"{key}: {_shown(value)} is not {kinds}")
    kind = str(schema["type"])
    if not _is(value, kind):
        raise UsageError(f"{key or 'the whole'}: {_shown(value)} is not {TYPES[kind][1]}")
    if schema.get("pattern") == SIZE_PATTERN:
        _check_size(str(value), key)
    if isinstance(value, dict):
        _check_table(value, schema, key)
    elif isinstance(value, (list, tuple)):
        if len(value) > ITEMS_MAX:
            raise UsageError(f"{key}: a list of {len(value)}; {ITEMS_MAX} are the most")
        items = schema["items"]
        assert isinstance(items, dict)
        for number, item in enumerate(value):
            check(item, items, f"{key}[{number}]")


def _check_table(value: dict[object, object], schema: Schema, key: str) -> None:
    properties = schema["properties"]
    required = schema["required"]
    assert isinstance(properties, dict) and isinstance(required, list)
    for name, item in value.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in properties:
            from difflib import get_close_matches

            near = get_close_matches(str(name), properties, 1)
            known = [known for known in properties if known != SCHEMA_KEY]
            hint = f"{near[0]} is one" if near else f"one of {', '.join(known)}"
            raise UsageError(f"{path}: no such key; {hint}")
        check(item, properties[name], path)
    for name in required:
        if name not in value:
            raise UsageError(f"{key}: {name} is missing")


def _check_size(text: str, key: str) -> None:
    if text[-1:].isdigit():
        raise UsageError(
            f"{key}: {text!r} has no unit; write {text}M, or a number without quotes for bytes"
        )


def _is(value: object, kind: str) -> bool:
    types, _ = TYPES[kind]
    return isinstance(value, types) and (not isinstance(value, bool) or kind == "boolean")


def _shown(value: object) -> str:
    text = "true" if value is True else "false" if value is False else shown(value)
    return text if len(text) <= 60 else text[:57] + "..."
