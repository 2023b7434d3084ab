"""vmm/config_paths.py: a program may change its directory while its machines are there."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from tests.support import tiny
from vmm import Machine, MachineConfig
from vmm.config_paths import absolute, settle_console

pytestmark = [pytest.mark.needs_kvm, pytest.mark.timeout(60)]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two directories; the first is the working one, each has an image."""
    for name, byte in (("a", b"\0"), ("b", b"x")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "d.img").write_bytes(byte * (1 << 20))
    monkeypatch.chdir(tmp_path / "a")
    return tmp_path / "a", tmp_path / "b"


def machine(kernel: str, drive: str = "d.img") -> Machine:
    return Machine(
        MachineConfig(
            kernel, memory="64M", drives=[drive], vsock="cid=5,path=v.sock",
            ports=["name=p,socket=p.sock", "name=q,file=q.out"], console="file:log",
        )
    )  # fmt: skip


@pytest.mark.parametrize("relative", [False, True])
def test_snapshots_and_what_is_left(relative: bool, places: tuple[Path, Path]) -> None:
    a, b = places
    kernel = tiny.kernel(a, tiny.COUNTING)
    kernel = os.path.basename(kernel) if relative else kernel
    made = sorted(os.listdir(a))
    with machine(kernel) as m:
        m.start()
        os.chdir(b)
        m.snapshot("keep", disks="keep")
        m.snapshot("copy")
    assert sorted(os.listdir(a)) == sorted([*made, "log", "q.out"])
    assert sorted(os.listdir(b)) == ["copy", "d.img", "keep"]
    told = json.loads((b / "keep" / "manifest.json").read_text())
    assert told["directory"] == str(a)
    assert told["disks"][0]["path"] == str(a / "d.img")
    os.chdir("/")
    for name in ("keep", "copy"):
        with Machine.restore(str(b / name)) as restored:
            disk = restored.virtio_device("blk0").image  # type: ignore[attr-defined]
            found = bytearray(1 << 20)
            disk.read([memoryview(found)], 0)
            assert found == bytes(1 << 20)
            assert {"v.sock", "p.sock"} <= set(os.listdir(a))
    assert sorted(os.listdir(a)) == sorted([*made, "log", "q.out"])
    assert sorted(os.listdir(b)) == ["copy", "d.img", "keep"]


def test_copies_and_their_sockets(places: tuple[Path, Path]) -> None:
    a, b = places
    with machine(tiny.kernel(a, tiny.COUNTING), "d.img,snapshot") as m:
        m.start()
        os.chdir(b)
        with m.clone(2):
            names = set(os.listdir(a))
            assert {"v.sock.1", "v.sock.2", "p.sock.1", "q.out.1", "log.1"} <= names
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(a / "p.sock.2"))
        assert not [name for name in os.listdir(a) if ".sock." in name]
    assert os.listdir(b) == ["d.img"]


def test_every_path_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = MachineConfig(
        drives=["a,,b.img,format=qcow2,backing=base.img"],
        nets=["socket=n.sock,pcap=n.pcap", "lan=here,pcap=l.pcap", "tap=tap7"],
        ports=["name=p,socket=p.sock", "name=q,file=q"],
        vsock="cid=3,path=v.sock",
        vhost_user_blks=["b.sock", "/abs/b.sock"],
        shares=["d,tag=t"],
        console="hvc,file:log",
    )
    made = absolute(config)
    settle_console(made, str(tmp_path))
    text = repr(made)
    for name in ("a,b.img", "base.img", "n.sock", "n.pcap", "l.pcap", "p.sock", "q", "v.sock",
                 "b.sock", "d", "log"):  # fmt: skip
        assert f"{tmp_path}/{name}" in text, name
    assert (made.nets[1].name, made.nets[2].name) == ("here", "tap7")
    assert made.vhost_user_blks[1].socket == "/abs/b.sock"
    assert made.console == f"hvc,file:{tmp_path}/log"
    assert absolute(made) == made
    assert config.drives[0].path == "a,b.img"  # it is another one's, too


def test_a_socket_whose_absolute_name_would_be_too_long_stays_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.chdir(deep)
    with Machine(MachineConfig(memory=16 << 20, ports=["name=p,socket=p.sock"])) as m:
        assert m.config.ports[0].socket == "p.sock"
        assert os.listdir(deep) == ["p.sock"]
    assert os.listdir(deep) == []
