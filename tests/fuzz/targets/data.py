"""Data that a person or another machine wrote: configurations, options, snapshots."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tests.fuzz.source import Source
from tests.fuzz.target import Target, scratch
from vmm.block.drive import Drive
from vmm.block.vhost_user import VhostUserBlk
from vmm.cli.tables import parsers
from vmm.config_file import configure, from_dict
from vmm.cpu import policy
from vmm.errors import SnapshotError, UsageError
from vmm.net.config import Net
from vmm.snapshot import manifest, plain
from vmm.snapshot.folder import Folder
from vmm.snapshot.index import CHUNK, Index
from vmm.snapshot.restore import configure as configure_restored
from vmm.snapshot.store import Snapshot
from vmm.virtio import rng
from vmm.virtio.console_config import PortConfig
from vmm.virtio.fs import Share
from vmm.virtio.vsock_config import VsockConfig

CONFIG: dict[str, Any] = {
    "kernel": "/boot/vmlinuz",
    "initrds": ["/boot/initrd"],
    "append": "quiet",
    "memory": "512M",
    "cpus": 2,
    "cpu": "host",
    "timeout": 30,
    "drives": [{"path": "/disk.img", "format": "raw", "readonly": True, "serial": "S"}],
    "nets": [{"kind": "user", "mac": "52:54:00:00:00:01"}, {"kind": "none"}],
    "ports": [{"name": "p", "file": "/dev/null"}],
    "vsock": {"cid": 5},
    "shares": [{"path": "/srv", "tag": "srv"}],
    "rng": "1M/1s",
    "balloon": "16M",
    "transport": "pci",
    "console": "none",
}
TOML = """kernel = "/boot/vmlinuz"
memory = "1G"
cpus = 2
[[drives]]
path = "/disk.img"
[[nets]]
kind = "user"
"""


def file() -> Callable[[bytes], None]:
    """A configuration file: the first byte says which kind."""
    directory = scratch()
    paths = [os.path.join(directory, name) for name in ("c.json", "c.toml")]

    def run(data: bytes) -> None:
        path = paths[data[0] & 1] if data else paths[0]
        with open(path, "wb") as out:
            out.write(data[1:])
        with suppress(UsageError):
            configure(path, {})

    return run


def file_seeds() -> list[bytes]:
    return [b"\0" + json.dumps(CONFIG).encode(), b"\1" + TOML.encode()]


def tree() -> Callable[[bytes], None]:
    """A configuration as plain data, with edits."""

    def run(data: bytes) -> None:
        with suppress(UsageError):
            from_dict(Source(data).edited(CONFIG))

    return run


PARSERS: tuple[Callable[[str], object], ...] = (
    Drive.parse, Net.parse, PortConfig.parse, VsockConfig.parse, Share.parse, VhostUserBlk.parse,
    rng.parse, policy.parse,
)  # fmt: skip


def words() -> Callable[[bytes], None]:
    """One option's value: the first byte says whose."""

    def run(data: bytes) -> None:
        parse = PARSERS[data[0] % len(PARSERS)] if data else PARSERS[0]
        with suppress(UsageError):
            parse(data[1:].decode("utf-8", "surrogateescape"))

    return run


def words_seeds() -> list[bytes]:
    texts = [
        b"/disk.img,format=qcow2,readonly,cache=none,queues=2,serial=x,iops=100,bps=1M",
        b"user,mac=52:54:00:12:34:56,forward=tcp:127.0.0.1:80:8080,queues=2,mtu=9000,pcap=/f",
        b"console,file=/f,name=x", b"cid=5,path=/v,vhost", b"/srv,tag=x,readonly",
        b"/sock,queues=2",
        b"1M/1s", b"host,+avx,-sse4_2",
    ]  # fmt: skip
    found = [bytes([number]) + text for number, text in enumerate(texts)]
    return [*found, b"\1tap,name=tap0,vhost=on", b"\1lan=x", b"\1socket=/s", b"\0/a,b=c,,d"]


def arguments() -> Callable[[bytes], None]:
    """A command line's words, cut at zeros: the first byte says which command."""
    commands = list(parsers().values())

    def run(data: bytes) -> None:
        command = commands[data[0] % len(commands)] if data else commands[0]
        line = data[1:].decode("utf-8", "surrogateescape").split("\0")
        with suppress(UsageError):
            command.parse(line)

    return run


def arguments_seeds() -> list[bytes]:
    lines = (
        b"vmlinuz\0--memory\x001G\0--cpus=2\0--drive\0/d,readonly\0--append\0quiet",
        b"--root\0/\0--rw\0.\0--\0make\0-j2", b"--help", b"-m\0001G\0-v\0-v", b"--\0--",
    )  # fmt: skip
    return [bytes([number]) + line for number in range(len(parsers())) for line in lines]


def values() -> Callable[[bytes], None]:
    """JSON text of a state."""

    def run(data: bytes) -> None:
        with suppress(ValueError):
            found = plain.loads(data)
            with suppress(TypeError, ValueError, RecursionError):
                plain.dumps(found)
        with suppress(ValueError):
            manifest.parse(data)

    return run


def values_seeds() -> list[bytes]:
    state = {"schema": 1, "a": b"xyz", "b": {1: [2, None], "c": "d"}, "e": [True, "\0"]}
    return [plain.dumps(state), b"[" * 100 + b"]" * 100, b'{"$": "AA=="}', b'{"$dict": [[1, 2]]}']


def index() -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        source = Source(data)
        size = 4096 * source.number(2)
        with suppress(SnapshotError):
            found = Index.unpack(source.rest(), "input", size)
            assert all(number * CHUNK < size for number in found.sums)
            assert all(start + length <= size for start, length in found.runs)

    return run


def index_seeds() -> list[bytes]:
    some = Index({0: 5, 2: 7}, [(0, 4096), (8192, 8192)]).pack()
    return [(200).to_bytes(2, "little") + some, (1).to_bytes(2, "little") + Index({}, []).pack()]


MEMORY = 1 << 20


def snapshot() -> Callable[[bytes], None]:
    """A directory whose manifest is changed, with a checksum that is right again."""
    directory = scratch()
    path = os.path.join(directory, "s")
    os.mkdir(path)
    os.environ["XDG_STATE_HOME"] = directory  # the key of this run's seals
    contents = {
        manifest.STATE: plain.dumps({"schema": 1, "vcpus": [{}]}),
        manifest.MEMORY: bytes(MEMORY),
        manifest.INDEX: Index({}, []).pack(),
        "disk0": bytes(4096),
    }
    for name, data in contents.items():
        with open(os.path.join(path, name), "wb") as out:
            out.write(data)
    disk = {"path": "/disk.img", "size": 4096, "how": "copy", "file": "disk0"}
    good = {
        "format": manifest.FORMAT,
        "schema": manifest.SCHEMA,
        "vmm": "0.1.0",
        "id": "00",
        "created": "2026-01-01T00:00:00Z",
        "base": None,
        "host": {"machine": "x86_64", "kernel": "6.1", "kvm": "kvm_amd", "family": 6},
        "guest": {"tsc_khz": 1000000, "features": "fpu sse"},
        "config": {"memory": MEMORY, "cpus": 1, "drives": [{"path": "/disk.img"}],
                   "console": "none", "kernel": "/k"},
        "directory": "/",
        "disks": [disk],
        "files": manifest.seal(path, list(contents)),
    }  # fmt: skip
    where = os.path.join(path, manifest.NAME)

    def run(data: bytes) -> None:
        source = Source(data)
        how = source.number(1)
        told = source.edited(good) if source.left else copy.deepcopy(good)
        with suppress(TypeError, ValueError, AttributeError):
            told[manifest.CHECKSUM] = manifest.checksum(told)
        with open(where, "w", encoding="utf-8") as out:
            json.dump(told, out)
        with suppress(UsageError), Snapshot(path, trusted=how & 1 > 0 or None) as found:
            with suppress(UsageError):
                found.verify()
            found.state()
            found.index()
            given = {"drives": [Drive("/other")]} if how & 2 else {}
            configure_restored(found, "overlay" if how & 4 else "own", given)
        folder = Folder(path)
        with suppress(SnapshotError):
            manifest.read(folder)
        folder.close()

    return run


_SNAPSHOT = ("vmm.snapshot.manifest", "vmm.snapshot.store", "vmm.snapshot.trust", "vmm.shapes",
             "vmm.snapshot.restore", "vmm.snapshot.disks")  # fmt: skip
TARGETS = (
    Target("config-file", file, file_seeds, ("vmm.config_file", "vmm.config_schema")),
    Target("config", tree, lambda: [b"", bytes(12)],
           ("vmm.config_file", "vmm.config_schema", "vmm.config", "vmm.config_types")),
    Target("options", words, words_seeds,
           ("vmm.block.drive", "vmm.net.config", "vmm.virtio.console_config", "vmm.cpu.policy",
            "vmm.virtio.vsock_config", "vmm.virtio.fs", "vmm.virtio.rng")),
    Target("arguments", arguments, arguments_seeds, ("vmm.cli.arguments",)),
    Target("state-text", values, values_seeds, ("vmm.snapshot.plain", "vmm.snapshot.manifest")),
    Target("index", index, index_seeds, ("vmm.snapshot.index",)),
    Target("snapshot", snapshot, lambda: [b"", b"\1", b"\2\0\0\7", b"\7" * 20], _SNAPSHOT),
)  # fmt: skip
