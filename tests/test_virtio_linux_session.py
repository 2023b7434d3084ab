"""A person's session over both transports: a login on the virtio console, typed on a terminal that
changes its size; a shared directory held to what POSIX says of files; entropy. Then each driver is
taken away and given back 50 times under load, without loss.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import struct
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import programs, tiny
from vmm.testing.kernels import Kernel

pytestmark = [
    pytest.mark.needs_linux_kvm,
    pytest.mark.timeout(900),
    pytest.mark.parametrize("transport", ["mmio", "pci"]),
]

ROUNDS = 50
WITHIN = 300
"""Seconds for anything the guest is asked for."""
PASSWORD, HASH = "secret", "$1$vmm$baJ9sWm1PuzQO2d3Oi/ck/"
PROMPT = b"~ # "

SCRIPT = f"""
mkdir -p /etc
echo 'root:{HASH}:0:0:root:/root:/bin/sh' > /etc/passwd
echo 'root:x:0:' > /etc/group
login_here() {{
    until [ -c /dev/hvc0 ]; do sleep 0.1; done
    getty -i -L 0 hvc0 vt100
}}
login_here

dmesg -n 1  # each request to a directory that is away is an error to the kernel
rebind() {{
    echo $2 > /sys/bus/virtio/drivers/$1/unbind
    echo $2 > /sys/bus/virtio/drivers/$1/bind
}}
device() {{ cd /sys/bus/virtio/drivers/$1; echo virtio*; }}
fs=$(device virtiofs) rng=$(device virtio_rng) console=$(device virtio_console)
cd /
( while :; do cat /dev/hwrng || sleep 0.05; done > /dev/null 2>&1 ) &
load=$!
( while :; do cat /mnt/random || sleep 0.1; done > /dev/null 2>&1 ) &
i=0; while [ $i -lt {ROUNDS} ]; do
    grep -q ' /mnt ' /proc/mounts || mount -t virtiofs data /mnt || echo "failed: mount $i"
    echo "round $i" > /mnt/rounds/$i && sync /mnt/rounds/$i || echo "failed: write $i"
    until [ -c /dev/vport*p1 ]; do sleep 0.02; done
    port=$(echo /dev/vport*p1)
    echo "round $i" > $port || echo "failed: port $i"
    rebind virtiofs $fs
    umount -l /mnt
    rebind virtio_rng $rng
    rebind virtio_console $console
    i=$((i+1))
done
kill $load $!
mount -t virtiofs data /mnt || echo "failed: mount"
echo "after: $(md5sum < /mnt/random) $(head -c 1000 /dev/hwrng | wc -c)"
login_here
"""


class Person(tiny.AtTerminal):
    """Somebody who types commands; what is echoed never looks like their output."""

    def log_in(self) -> None:
        self.expect(b"login: ", WITHIN)
        self.type(b"root\r")
        self.expect(b"Password: ", WITHIN)
        self.type(PASSWORD.encode() + b"\r")
        self.expect(PROMPT, WITHIN)

    def ask(self, command: str) -> str:
        """What a shell command prints."""
        self.type(f'echo "<"">$({command})</"">"\r'.encode())
        self.expect(b"<>", WITHIN)
        return self.expect(b"</>", WITHIN).decode()

    def interrupt(self) -> None:
        """Press Ctrl-C until the shell is back: it may not have started the command yet."""
        for _ in range(WITHIN // 2):
            self.type(b"\x03")
            with contextlib.suppress(AssertionError):
                self.expect(PROMPT, 2)
                return
        raise AssertionError(self.output)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))


def test_a_session(
    cloud_kernel: Kernel, make_initrd: Callable[..., Path], tmp_path: Path, transport: str
) -> None:
    share, log = tmp_path / "share,d", tmp_path / "log"
    for made in (share, share / "files", share / "rounds"):
        made.mkdir()
    data = os.urandom(1_000_000)
    (share / "random").write_bytes(data)
    initrd = make_initrd(
        SCRIPT,
        kernel=cloud_kernel,
        modules=[f"virtio_{transport}", "virtio_console", "virtio_rng", "virtiofs"],
        files={"bin/posix-files": programs.compiled("posix_files", tmp_path)},
    )
    shared = str(share).replace(",", ",,")
    with Person(
        "run", str(cloud_kernel.vmlinuz), "--initrd", str(initrd), "--append", "quiet",
        "--cpus", "2", "--timeout", "850", "--transport", transport, "--console", "hvc",
        "--port", f"name=log,file={log}", "--rng", "--fs", f"{shared},tag=data,suid",
    ) as person:  # fmt: skip
        person.resize(33, 99)
        person.log_in()
        assert person.ask("tty") == "/dev/hvc0"
        assert person.ask("id -un") == "root"
        person.ask('until [ "$(stty size)" = "33 99" ]; do sleep 0.1; done')
        person.resize(50, 132)
        person.ask('until [ "$(stty size)" = "50 132" ]; do sleep 0.1; done')
        person.type(b'echo "sl""eeps"; sleep 1000\r')
        person.expect(b"sleeps", WITHIN)
        person.interrupt()
        assert person.ask("head -c 1000 /dev/hwrng | wc -c") == "1000"
        person.ask("mount -t virtiofs data /mnt")
        assert person.ask("md5sum < /mnt/random").split()[0] == hashlib.md5(data).hexdigest()
        said = person.ask("posix-files /mnt/files")
        print(said)
        assert re.fullmatch(r"checks: \d\d\d failed: 0", said.strip()), said
        files = share / "files"
        assert os.readlink(files / "arrow") == "some/where/else"
        assert (files / "over").read_text() == "both"
        assert (files / "attributes").stat().st_mtime_ns == 1500000002_987654321
        assert (files / "open" / "made").stat().st_uid == 65534
        person.type(b"exit\r")

        rounds = person.expect(b"after: ", WITHIN)
        assert b"failed: " not in rounds, rounds
        assert person.expect(b"\r\n").split() == [
            hashlib.md5(data).hexdigest().encode(),
            b"-",
            b"1000",
        ]
        person.log_in()
        person.type(b"poweroff -f\r")
        assert person.wait(WITHIN) == 0
    for number in range(ROUNDS):
        assert (share / "rounds" / str(number)).read_text() == f"round {number}\n"
    assert log.read_text() == "".join(f"round {number}\n" for number in range(ROUNDS))
