"""Option values as other monitors write them, turned into the words of this command.

Each function takes the text of one value and returns the words that say the same here
(`["--drive", "disk.img,format=qcow2"]`), or None where the text is not a spelling it knows. The
module is imported only when a command line was wrong.

Spellings: QEMU 7.2 `qemu-system-x86_64 -help`, cloud-hypervisor and crosvm `--help`, kvmtool
`lkvm run --help`, Docker's `docker run --help`, libvirt's `virt-install --help`.
"""

from __future__ import annotations

import os

from vmm.errors import UsageError
from vmm.units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

Words = list[str]

PATH_KEYS = ("file", "path", "filename", "source", "src", "path_on_host", "file.filename")
READONLY = ("ro", "readonly", "read-only", "read_only", "is_read_only")
TRUE = ("", "on", "true", "yes", "1")
DRIVE_LEFT_OUT = (
    *("if", "id", "index", "media", "bus", "unit", "aio", "node-name", "detect-zeroes", "direct"),
    *("iommu", "pci_segment", "image_type", "boot", "bootindex", "size", "target", "o_direct"),
    *("block_size", "lock", "sparse", "file.driver", "file.locking", "cache.direct", "device"),
    "root",
)
"""Keys of a disk that have no counterpart here, and can be left out."""
PREFIXES = ("raw:", "file:", "qcow2:", "vmdk:", "vdi:", "vpc:")
DRIVE_WORDS = (*PATH_KEYS, "format", "driver", "image_type", "type", "cache", "serial")
NET_LEFT_OUT = (
    *("id", "model", "script", "downscript", "netdev", "addr", "iommu", "trans", "guest_ip", "net"),
    *("ip", "mask", "queue_size", "num_queues", "vhost_mode", "host_mac", "vhost_user"),
    *("ipv4", "ipv6", "hostname", "vlan", "virtualport.type", "addr.type", "server", "iface_id"),
)
"""Keys of a card that have no counterpart here, and can be left out."""
CPU_PREFIXES = (
    *("host-", "kvm32", "kvm64", "qemu32", "qemu64", "base", "486", "pentium", "core", "n270"),
    *("athlon", "phenom", "Opteron", "EPYC", "Penryn", "Conroe", "Nehalem", "Westmere"),
    *("SandyBridge", "IvyBridge", "Haswell", "Broadwell", "Skylake", "Cascadelake", "Cooperlake"),
    *("Icelake", "SapphireRapids", "GraniteRapids", "Snowridge", "Knights", "T2", "V1N1"),
)
"""Beginnings of CPU model names of QEMU, libvirt and Firecracker (its templates)."""


def parts(text: str) -> list[tuple[str, str | None]]:
    """The comma-separated parts of `text` as (key, value), value None without a `=`."""
    found: list[tuple[str, str | None]] = []
    for word in text.replace(",,", "\0").split(","):
        key, equals, value = word.replace("\0", ",").partition("=")
        found.append((key, value if equals else None))
    return found


def joined(words: list[str]) -> str:
    """The inverse of `parts`: a comma within a word is written twice."""
    return ",".join(word.replace(",", ",,") for word in words)


def drive(text: str) -> Words | None:
    """A disk: QEMU's `file=F,if=virtio,...`, cloud-hypervisor's `path=F`, Docker's `F:ro`."""
    from vmm.block.drive import FLAGS, KEYS, LIMITS
    from vmm.block.probe import FORMATS

    path, rest = "", []
    for number, (key, value) in enumerate(parts(text)):
        if key in PATH_KEYS and value:
            path = value
        elif number == 0 and key.startswith(PREFIXES) and value is None:
            path = key.partition(":")[2]  # QEMU's raw:disk.img
        elif number == 0 and ":/" in key and os.path.isfile(key.partition(":")[0]):
            path = key.partition(":")[0]  # Docker's disk.img:/dev/vda
        elif number == 0 and not os.path.exists(key) and key.endswith((":ro", ":rw")):
            path = key[:-3]
            rest += ["readonly"] * key.endswith(":ro")
        elif number == 0 and (value is None or os.path.exists(value)) and key not in DRIVE_WORDS:
            path = key if value is None else value  # virtme-ng's NAME=PATH
        elif key == "driver" and value in ("file", "host_device"):
            pass
        elif (key in READONLY and (value or "") in TRUE) or (key == "media" and value == "cdrom"):
            rest.append("readonly")
        elif key in ("format", "driver", "image_type", "type") and value:
            if value.lower() not in FORMATS:
                return None
            rest.append(f"format={value.lower()}")
        elif key in ("num_queues", "num-queues", "queues") and value:
            rest.append(f"queues={value}")
        elif key in ("throttling.bps-total", "throttling.iops-total"):
            rest.append(f"{key[11:].removesuffix('-total')}={value}")
        elif key == "cache" and value in ("writethrough", "directsync"):
            rest += ["cache=none"] * (value == "directsync")
        elif (key in FLAGS and (value or "") in TRUE) or (key in KEYS + LIMITS and value):
            rest.append(key if key in FLAGS else f"{key}={value}")
        elif key not in DRIVE_LEFT_OUT:
            return None
    return ["--drive", joined([path, *dict.fromkeys(rest)])] if path else None


def net(text: str) -> Words | None:
    """A card: QEMU's `user,id=n,hostfwd=...`, `tap,ifname=t`; `nat`, `bridge:br0` of others."""
    from vmm.net.config import KINDS

    kind, name, rest = "", "", []
    for number, (key, value) in enumerate(parts(text)):
        if number == 0 and value is None:
            kind, _, name = key.partition(":")
        elif key in ("tap", "bridge", "socket", "lan", "network") and number == 0:
            kind, name = key, value or ""
        elif key in ("type", "mode") and value:
            kind = value
        elif key in ("ifname", "tapif", "host_dev_name", "tap", "tap-name"):
            kind, name = "tap", value or ""
        elif key == "br" and value:
            name = value
        elif key in ("path", "socket", "addr.path") and value:
            kind, name = "socket", value
        elif key == "hostfwd" and value:
            rest.append(_hostfwd(value))
        elif key in ("mac", "macaddr", "guest_mac", "mac_address"):
            if not value:  # cloud-hypervisor's way to have one chosen
                continue
            rest.append(f"mac={value}")
        elif key in KINDS.get(kind, ()) and value:
            rest.append(f"{key}={value}")
        elif key not in NET_LEFT_OUT:
            return None
    kind = {
        "nat": "user", "default": "user", "network": "user", "slirp": "user", "passt": "user",
        "host": "user", "nic": "user", "": "user", "ethernet": "tap", "direct": "tap",
        "stream": "socket",
    }.get(kind, kind)  # fmt: skip
    if kind not in KINDS:
        return None
    if kind in ("user", "none"):
        name = ""
    if kind == "bridge" and not name:
        name = "br0"
    if kind in ("socket", "lan") and not name:
        return None
    return ["--net", joined([f"{kind}={name}" if name else kind, *rest])]


def _hostfwd(text: str) -> str:
    """QEMU's `tcp:[ADDRESS]:HOST-[ADDRESS]:GUEST` as `forward=tcp:[ADDRESS:]HOST:GUEST`."""
    protocol, _, rest = text.partition(":")
    host, _, guest = rest.partition("-")
    address, _, port = host.rpartition(":")
    where = f"{address}:{port}" if address else port
    return f"forward={protocol or 'tcp'}:{where}:{guest.rpartition(':')[2]}"


def forward(text: str) -> Words | None:
    """Docker's `-p [ADDRESS:]HOST:GUEST[/udp]`."""
    where, _, protocol = text.partition("/")
    pieces = where.split(":")
    if not all(piece.isdecimal() for piece in pieces[-2:]):
        return None
    if len(pieces) == 1:
        pieces *= 2
    return ["--net", f"user,forward={protocol or 'tcp'}:{':'.join(pieces)}"]


def memory(text: str) -> Words | None:
    """RAM: `size=512M,slots=2,maxmem=1G` of QEMU and cloud-hypervisor; `512M`."""
    found = dict(parts(text))
    size = found.get("size") or next(iter(found))
    try:
        parse_size(size, "--memory")
    except UsageError:
        return None
    return ["--memory", size]


TOPOLOGY = ("sockets", "dies", "clusters", "cores", "threads")


def cpus(text: str) -> Words | None:
    """vCPUs: `4,sockets=1,cores=4`, `cpus=4` of QEMU, `boot=4,max=8` of cloud-hypervisor."""
    found = dict(parts(text))
    count = found.get("cpus") or found.get("boot") or next(iter(found))
    if count in TOPOLOGY:
        numbers = [found.get(key) or "1" for key in TOPOLOGY]
        if not all(number.isdecimal() and len(number) < 5 for number in numbers):
            return None
        product = 1
        for number in numbers:
            product *= int(number)
        count = str(product)
    return ["--cpus", count] if count.isdecimal() else None


def cpu(text: str) -> Words | None:
    """A CPU model of QEMU, libvirt or Firecracker: the host's features stand in for it."""
    base, *rest = text.split(",")
    if base not in ("host", "max") and not base.startswith(CPU_PREFIXES):
        return None
    if not all(word[:1] in ("+", "-") or "=" in word for word in rest):
        return None
    switches = {"off": "-", "no": "-", "false": "-", "on": "+", "yes": "+", "true": "+"}
    kept = []
    for word in rest if base in ("host", "max") else ():
        name, _, switch = word.partition("=")
        if word[:1] in ("+", "-"):
            kept.append(word)
        elif switch in switches:
            kept.append(switches[switch] + name)
    return ["--cpu", ",".join([base if base in ("host", "max") else "host", *kept])]


FS_LEFT_OUT = (
    *("type", "security_model", "id", "fsdev", "accessmode", "mode", "bind", "local", "rw", "z"),
    *("cache", "consistency", "writeout", "multidevs", "fmode", "dmode"),
)
"""Keys of a shared directory that have no counterpart here, and can be left out."""


def fs(text: str) -> Words | None:
    """A directory: Docker's `DIR:PATH[:ro]` and `type=bind,source=DIR,...`, QEMU's
    `local,path=DIR,mount_tag=T`, kvmtool's `DIR,TAG`, crosvm's `DIR:TAG:type=fs`."""
    path = tag = ""
    readonly = False
    for number, (key, value) in enumerate(parts(text)):
        if key in ("path", "source", "src", "dir", "shared-dir", "source.dir") and value:
            path = value
        elif key in ("tag", "mount_tag", "target", "dst", "destination", "target.dir") and value:
            if tag:
                return None
            tag = value
        elif key in READONLY and (value or "") in TRUE:
            readonly = True
        elif number == 0 and key != "local" and (value is None or ":" in key):
            whole = key if value is None else f"{key}={value}"
            path, *more = whole.split(":") if not os.path.exists(whole) else [whole]
            tag = more[0] if more else tag
            readonly = "ro" in more[1:]
        elif value is None and number == 1 and not tag:
            tag = key
        elif "." not in key and key not in FS_LEFT_OUT:
            return None
    if not path:
        return None
    tag = tag.rstrip("/").rpartition("/")[2] or "share"
    return ["--fs", joined([path, f"tag={tag}", *["readonly"] * readonly])]


def console(text: str) -> Words | None:
    """Where the console goes: QEMU's `stdio`, `file:F`, cloud-hypervisor's `tty`, `off`."""
    if text == "/dev/null":
        return ["--console", "none"]
    keys = dict(parts(text))
    if "=" not in text and ":" not in text and ("/" in text or "." in text):
        return ["--console", f"file:{text}"]
    if "type" in keys:  # crosvm's type=file,path=P,hardware=serial
        text = f"{keys['type']}:{keys['path']}" if keys.get("path") else keys["type"] or ""
    elif text.startswith(("pty,", "stdio,", "file,path=")):  # virt-install's pty,target.type=serial
        text = text.replace(",path=", ":").partition(",")[0]
    kind, _, path = text.replace("=", ":", 1).partition(":")
    if path and kind not in ("file", "mon"):
        return None
    if kind == "file" and path:
        return ["--console", f"file:{path}"]
    if kind in ("pty", "hvc"):
        return ["--console", kind]
    if kind in ("hvc0", "virtio", "virtconsole", "virtio-console"):
        return ["--console", "hvc"]
    if kind in ("off", "null", "disabled", "false", "no"):
        return ["--console", "none"]
    if kind in ("stdio", "tty", "ttyS0", "serial", "mon", "on", "stdout", "chardev", "-"):
        return ["--console", "auto"]
    return None


def timeout(text: str) -> Words | None:
    """A time with units, as `timeout(1)` and systemd take: `90s`, `5m`, `1h30m`."""
    return _seconds("--timeout", text)


def grace(text: str) -> Words | None:
    """As `timeout`."""
    return _seconds("--grace", text)


def _seconds(option: str, text: str) -> Words | None:
    seconds, number = 0.0, ""
    for char in text:
        if char in "0123456789.":
            number += char
        elif char in "smhd" and number.strip(".") and number.count(".") < 2:
            seconds += float(number) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[char]
            number = ""
        else:
            return None
    return [option, f"{seconds:g}"] if seconds and not number else None


def port(text: str) -> Words | None:
    """Docker's `-p HOST:GUEST`: a port of the network, and none of a virtio console."""
    return forward(text)


def vhost_user_blk(text: str) -> Words | None:
    """cloud-hypervisor's `vhost_user=on,socket=PATH,num_queues=N`."""
    keys = dict(parts(text))
    path = keys.get("socket") or keys.get("path")
    if not path:
        return None
    queues = keys.get("queues") or keys.get("num_queues")
    return ["--vhost-user-blk", joined([path, *[f"queues={queues}"] * bool(queues)])]


def vsock(text: str) -> Words | None:
    """A socket device: `3`, `guest-cid=3` of QEMU, `cid=3,socket=P` of cloud-hypervisor,
    `guest_cid` and `uds_path` of Firecracker."""
    cid, path = "", "/tmp/vm.vsock"
    for key, value in parts(text):
        if value is None and key.isdecimal():
            cid = key
        elif key in ("cid", "guest-cid", "guest_cid") and value:
            cid = value
        elif key in ("path", "socket", "uds_path") and value:
            path = value
        elif key not in ("id", "vsock_id", "iommu", "pci_segment"):
            return None
    if not set(dict(parts(text))) - {"cid", "path"}:
        return None
    return ["--vsock", joined([f"cid={cid}", f"path={path}"])] if cid.isdecimal() else None


def rng(text: str) -> Words | None:
    """A source of entropy (`src=/dev/urandom`): the host's getrandom(2) is always the source."""
    if text.startswith("rate="):
        return [f"--rng={text}"]
    known = "/dev/" in text or "rng-" in text or text in ("on", "yes", "true", "auto", "virtio")
    return ["--rng"] if known else None


def balloon(text: str) -> Words | None:
    """A balloon: cloud-hypervisor's `size=64M`; `on`, `virtio` of others."""
    size = dict(parts(text)).get("size") or text
    if size in ("on", "virtio", "auto", "true", "yes"):
        return ["--balloon"]
    try:
        parse_size(size, "--balloon")
    except UsageError:
        return None
    return [f"--balloon={size}"]


def transport(text: str) -> Words | None:
    """The bus: `virtio-pci`, `pcie`, `virtio-mmio`."""
    name = text.lower().removeprefix("virtio-")
    if name in ("pci", "pcie", "q35"):
        return ["--transport", "pci"]
    return ["--transport", "mmio"] if name in ("mmio", "microvm") else None


def on_panic(text: str) -> Words | None:
    """What follows a panic: QEMU's `-action panic=`, libvirt's `on_crash`."""
    if text in ("poweroff", "shutdown", "destroy", "reboot", "restart", "exit-failure", "none"):
        return ["--on-panic", "exit"]
    return ["--on-panic", "pause"] if text in ("preserve", "stop") else None


def firecracker(path: str) -> Words | None:
    """The words for Firecracker's `--config-file`; None where `path` is no such file."""
    import json

    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(CONFIG_MAX))
        source, machine = found["boot-source"], found.get("machine-config", {})
        words = [str(source["kernel_image_path"])]
        append = [str(source.get("boot_args") or "")]
        if source.get("initrd_path"):
            words += ["--initrd", str(source["initrd_path"])]
        if machine.get("mem_size_mib"):
            words += ["--memory", f"{machine['mem_size_mib']}M"]
        if machine.get("vcpu_count"):
            words += ["--cpus", str(machine["vcpu_count"])]
        for disk in found.get("drives", ()):
            readonly = ["readonly"] * bool(disk.get("is_read_only"))
            words += ["--drive", joined([str(disk["path_on_host"]), *readonly])]
            if disk.get("is_root_device"):
                append.append(f"root=/dev/vda {'ro' if readonly else 'rw'}")
        for card in found.get("network-interfaces", ()):
            mac = [f"mac={card['guest_mac']}"] if card.get("guest_mac") else []
            words += ["--net", joined([f"tap={card['host_dev_name']}", *mac])]
        if found.get("vsock"):
            cid, prefix = found["vsock"]["guest_cid"], found["vsock"]["uds_path"]
            words += ["--vsock", joined([f"cid={cid}", f"path={prefix}"])]
        if "entropy" in found:
            words.append("--rng")
        if found.get("balloon"):
            words.append(f"--balloon={found['balloon']['amount_mib']}M")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    line = " ".join(filter(None, append))
    return [*words, *(["--append", line] if line else [])]


CONFIG_MAX = 1 << 20
"""Bytes of a configuration that are looked at."""

VALUES: dict[str, Callable[[str], Words | None]] = {
    "--balloon": balloon,
    "--console": console,
    "--cpu": cpu,
    "--cpus": cpus,
    "--drive": drive,
    "--fs": fs,
    "--grace": grace,
    "--memory": memory,
    "--net": net,
    "--on-panic": on_panic,
    "--port": port,
    "--rng": rng,
    "--timeout": timeout,
    "--transport": transport,
    "--vhost-user-blk": vhost_user_blk,
    "--vsock": vsock,
}
"""Options of this command whose values others write in other ways."""
