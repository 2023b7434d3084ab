"""A root file system that has nothing but busybox: what the agent brings up in it, and for whom.

One machine with most kinds of devices, whose drivers and addresses are the agent's to see to; one
on an initrd that mounts no devpts, as pytest's own machines.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import netns
from vmm import Machine, MachineConfig
from vmm.testing.initrds import busybox
from vmm.testing.kernels import Kernel

pytestmark = [pytest.mark.needs_linux_kvm, pytest.mark.timeout(600)]

OUT, GATEWAY, SERVER = "10.7.0.2", "10.7.0.1", "10.7.0.53"
PASSWD = """\
root:x:0:0:root:/root:/bin/sh
# not a line
anna:x:1000:1000:Anna,,,:/home/anna:/bin/ash
"""
GROUP = "root:x:0:\nanna:x:1000:\nkvm:x:104:berta,anna\naudio:x:29:anna\nother:x:77:annabel\n"


def make_root(top: Path) -> Path:
    """A root file system of busybox, with users."""
    for directory in ("bin", "etc", "home/anna"):
        (top / directory).mkdir(parents=True)
    (top / "bin" / "busybox").write_bytes(Path(busybox()).read_bytes())
    (top / "bin" / "busybox").chmod(0o755)
    listed = subprocess.run([busybox(), "--list"], capture_output=True, text=True, check=True)
    for applet in listed.stdout.split():
        if applet != "busybox":
            (top / "bin" / applet).symlink_to("busybox")
    (top / "etc" / "passwd").write_text(PASSWD)
    (top / "etc" / "group").write_text(GROUP)
    (top / "etc" / "hosts").write_text("10.1.1.1 elsewhere")
    (top / "etc" / "resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    os.chown(top / "home" / "anna", 1000, 1000)
    (top / "root").mkdir(mode=0o700)
    top.chmod(0o755)
    return top


@pytest.fixture
def namespace() -> Iterator[None]:
    """A host with an interface, a default route and a name server, for passt."""
    with netns.network_namespace():
        netns.ip("tuntap add out mode tap")
        netns.ip(f"addr add {OUT}/24 dev out")
        netns.ip("link set out up")
        netns.ip(f"route add default via {GATEWAY} dev out")
        yield


def test_what_was_asked_for_is_up(cloud_kernel: Kernel, tmp_path: Path, namespace: None) -> None:
    root = make_root(tmp_path / "root")
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["/sbin/mkfs.ext4", "-q", str(image)], check=True, capture_output=True)
    for name in ("kept dir", "thrown"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "there").write_text("from the host\n")
    kept, thrown = tmp_path / "kept dir", tmp_path / "thrown"
    config = MachineConfig(
        str(cloud_kernel.vmlinuz), root=str(root), append="quiet", timeout=500,
        nets=["user", "tap,address=192.168.77.1/24",
              f"tap,ip=10.66.0.9/16,gateway=10.66.0.1,dns={SERVER},dns=10.7.0.54"],
        drives=[f"{image},snapshot"], rng=True, balloon=0, ports=[f"name=p,file={tmp_path}/port"],
        rw=[str(kept)], overlay=[str(thrown)],
    )  # fmt: skip
    with Machine(config) as m:
        m.start()
        networks(m)
        devices(m, tmp_path)
        directories(m, kept, thrown)
        users(m)
        terminals(m)
        names(m)


def output(m: Machine, script: str, **options: object) -> str:
    done = m.run(["sh", "-c", script], text=True, check=True, timeout=100, **options)
    return str(done.stdout)


def networks(m: Machine) -> None:
    assert f"inet {OUT}/24" in output(m, "ip addr show eth0"), m.console.text()
    assert "inet 192.168.77.2/24" in output(m, "ip addr show eth1")
    assert "inet 10.66.0.9/16" in output(m, "ip addr show eth2")
    routes = output(m, "ip route").splitlines()
    assert any(line.startswith(f"default via {GATEWAY} dev eth0") for line in routes), routes
    assert any(line.startswith("default via 192.168.77.1 dev eth1") for line in routes), routes
    output(m, "ping -c 1 -W 20 192.168.77.1")
    assert f"nameserver {SERVER}\nnameserver 10.7.0.54\n" in output(m, "cat /etc/resolv.conf")
    assert "inet 127.0.0.1/8" in output(m, "ip addr show lo")


def devices(m: Machine, tmp_path: Path) -> None:
    drivers = output(m, "ls /sys/bus/virtio/drivers").split()
    for driver in ("virtio_net", "virtio_blk", "virtio_rng", "virtio_balloon", "virtio_console"):
        assert driver in drivers
    # The container's root could not load the disk's file system.
    assert output(m, "mkdir /d && mount /dev/vda /d && echo x > /d/x && cat /d/x") == "x\n"
    assert len(m.run(["head", "-c", "16", "/dev/hwrng"], timeout=60).stdout) == 16
    output(m, "for port in /dev/vport*p1; do echo through > $port; done")
    limit = time.monotonic() + 60
    while (tmp_path / "port").read_text() != "through\n":
        assert time.monotonic() < limit
        time.sleep(0.1)


def directories(m: Machine, kept: Path, thrown: Path) -> None:
    for directory in (kept, thrown):
        script = "cat there; echo changed > there; echo new > new; cat there"
        said = output(m, script, cwd=directory)
        assert said == "from the host\nchanged\n"
    assert (kept / "there").read_text() == "changed\n"
    assert (kept / "new").read_text() == "new\n"
    assert (thrown / "there").read_text() == "from the host\n"
    assert not (thrown / "new").exists()


def users(m: Machine) -> None:
    script = "id -u; id -g; id -G; echo $HOME $USER $LOGNAME $SHELL"
    assert output(m, script, user="anna").split("\n")[:4] == [
        "1000", "1000", "1000 29 104", "/home/anna anna anna /bin/ash",
    ]  # fmt: skip
    assert output(m, script, user="1000").split("\n")[2] == "1000 29 104"
    assert output(m, script, user="anna:kvm").split("\n")[:3] == ["1000", "104", "104"]
    assert output(m, script, user="4242:77").split("\n")[:4] == ["4242", "77", "77", "/ /bin/sh"]
    assert output(m, script, user=4242).split("\n")[:2] == ["4242", "0"]
    assert output(m, "echo $HOME", user="anna", env={"HOME": "/elsewhere"}) == "/elsewhere\n"
    said = output(m, "pwd; echo x > mine; ls -n mine", cwd="/home/anna", user="anna").split()
    assert (said[0], said[3], said[4]) == ("/home/anna", "1000", "1000")
    # What a user's programs open again by name is theirs.
    script = "echo said > /dev/stdout; echo err > /dev/stderr"
    assert output(m, script, user="anna") == "said\n"
    assert m.run(["cat", "/dev/stdin"], input=b"data", user="anna").stdout == b"data"
    assert m.run(["cat", "/etc/shadow", "/x"], user="anna").returncode != 0
    assert m.run(["sh", "-c", "echo x > /etc/x"], user="anna").returncode != 0
    shown = m.run(["sh", "-c", "tty; echo x > $(tty)"], user="anna", tty=True).stdout
    assert shown == b"/dev/pts/0\r\nx\r\n"
    for user, line in (
        ("nobody", "/etc/passwd has no user nobody"),
        ("annabel", "/etc/passwd has no user annabel"),
        ("anna:nogroup", "/etc/group has no group nogroup"),
        ("4294967295", "no user 4294967295"),
        ("-1", "no user -1"),
        (":77", "no user "),
    ):
        with pytest.raises(LookupError, match=line):
            m.run(["true"], user=user)
    with pytest.raises(PermissionError):
        m.run(["true"], user="anna", cwd="/root")


def terminals(m: Machine) -> None:
    said = m.run(
        ["sh", "-c", "tty; stty size; echo $TERM; echo x > /dev/tty"], tty=True, text=True
    ).stdout
    assert said == "/dev/pts/0\n24 80\nxterm\nx\n"
    with m.popen(["sh", "-c", "stty size; read l; stty size"], tty=True, size=(40, 120)) as p:
        assert p.stdin is not None and p.stdout is not None
        assert p.stdout.readline() == b"40 120\r\n"
        p.resize(11, 22)
        p.stdin.write(b"\n")
        p.stdin.flush()
        assert p.stdout.read() == b"\r\n11 22\r\n"


def names(m: Machine) -> None:
    assert output(m, "hostname") == "vmm\n"
    hosts = output(m, "cat /etc/hosts")
    assert hosts == "10.1.1.1 elsewhere\n127.0.0.1\tlocalhost vmm\n"


def test_a_terminal_on_an_initrd_without_devpts(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path]
) -> None:
    initrd = make_initrd("echo ready; while :; do sleep 1000; done", kernel=cloud_kernel)
    config = MachineConfig(
        str(cloud_kernel.vmlinuz), initrds=[str(initrd)], append="quiet", timeout=300, agent=True
    )
    with Machine(config) as m:
        m.start()
        m.console.wait_for("ready", timeout=280)
        assert "devpts" not in m.run(["cat", "/proc/mounts"], text=True).stdout
        for _ in range(2):
            said = m.run(["sh", "-c", "echo TERM=$TERM; stty size; tty"], tty=True, text=True)
            assert said.stdout == "TERM=xterm\n24 80\n/dev/pts/0\n"
