"""What is beside KVM: compiled parts, libraries, helper programs, devices, limits of this host.

None of it is needed to boot a kernel. Each part says what it is for, and how to get it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress
from shutil import which

from vmm.kvm.access import as_root, device_mend

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DISTRIBUTION = "vmm-kvm"
"""The name on PyPI (pyproject.toml)."""
BUILT_IN, LIBRARY, PROGRAM, HOST = "built in", "library", "program", "host"
LIBRARIES = (
    ("cffi", "KVM's structures; needed", DISTRIBUTION),
    ("lz4", "kernels packed with LZ4", f"'{DISTRIBUTION}[full]'"),
    ("zstandard", "kernels packed with zstd", f"'{DISTRIBUTION}[full]'"),
    ("iced-x86", "the code in a failure report, as instructions", f"'{DISTRIBUTION}[full]'"),
    ("pyroute2", "making and addressing taps (--net tap, bridge=)", f"'{DISTRIBUTION}[net]'"),
)
"""Distribution, what it is for, what to give pip."""
VERSION_SECONDS = 5.0
"""How long a program may take to tell its version."""
VERSION_BYTES = 4096
VERSION = re.compile(r"\bv?(\d+[._]\d[\w.~+-]*)")
CAP_NET_ADMIN = 12
FEW_FILES = 1024
"""A limit under this many open files is told as low: it is the kernel's own default."""


class Part:
    """One part.

    Attributes:
        kind: BUILT_IN, LIBRARY, PROGRAM or HOST.
        there: whether it can be used.
        value: its version or state; of what is not there, why, or empty.
        purpose: what it is for, in a few words.
        mend: what to do where it is not there; empty where it is.
    """

    __slots__ = ("kind", "mend", "name", "purpose", "there", "value")

    def __init__(self, kind: str, name: str, value: str, purpose: str, mend: str = "") -> None:
        self.kind = kind
        self.name = name
        self.there = not mend
        self.value = value
        self.purpose = purpose
        self.mend = mend


def parts() -> list[Part]:
    """Every part, by kind; a tenth of a second."""
    return [*pieces(), *programs(), *host()]


def about() -> dict[str, str]:
    """Which vmm this is, and in which Python."""
    import vmm

    return {
        "version": vmm.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "executable": sys.executable,
        "where": os.path.dirname(os.path.abspath(vmm.__file__)),
    }


def pieces() -> list[Part]:
    """What is compiled into this vmm, and the libraries it finds."""
    return [_c_path(), _agent(), *map(_library, LIBRARIES)]


def _c_path() -> Part:
    from vmm.virtio import kernel

    purpose = "virtqueues of disks and cards in C; the same in Python, slower, without"
    if kernel.library() is not None:
        return Part(BUILT_IN, "C path", "compiled", purpose)
    return Part(
        BUILT_IN, "C path", "", purpose,
        f"{as_root('apt-get install gcc libc6-dev')}; then pip install --force-reinstall --no-deps "
        f"--no-cache-dir --no-binary {DISTRIBUTION} {DISTRIBUTION}",
    )  # fmt: skip


def _agent() -> Part:
    from vmm.agent import binary

    purpose = "commands and files in the guest (vmm exec, Machine.run)"
    if binary.found() is not None:
        return Part(BUILT_IN, "agent", "compiled", purpose)
    compiler = binary.compiler()
    if compiler is not None:
        return Part(BUILT_IN, "agent", f"on first use, by {compiler}", purpose)
    return Part(
        BUILT_IN, "agent", "", purpose,
        f"{as_root('apt-get install gcc libc6-dev')}: it is compiled on first use",
    )  # fmt: skip


def _library(row: tuple[str, str, str]) -> Part:
    from importlib.metadata import PackageNotFoundError, version

    name, purpose, package = row
    try:
        return Part(LIBRARY, name, version(name), purpose)
    except PackageNotFoundError:
        return Part(LIBRARY, name, "", purpose, f"pip install {package}")


def programs() -> list[Part]:
    """The programs vmm runs, and qemu-img, which its messages speak of."""
    from vmm.virtio.fs import VIRTIOFSD

    rows = (
        ("virtiofsd", VIRTIOFSD, "--fs, and --root DIR of vmm exec", "qemu-system-common"),
        ("qemu-storage-daemon", (), "--drive with format=qcow2 and others", "qemu-system-common"),
        ("passt", (), "--net user: the host's network without privileges", "passt"),
        ("qemu-img", (), "making and converting images, by hand", "qemu-utils"),
        ("busybox", ("/bin/busybox",), "the initrds of vmm.testing", "busybox-static"),
    )
    return [_program(*row) for row in rows]


def _program(name: str, elsewhere: Sequence[str], purpose: str, package: str) -> Part:
    path = which(name) or next((p for p in elsewhere if os.access(p, os.X_OK)), None)
    if path is None:
        return Part(PROGRAM, name, "", purpose, as_root(f"apt-get install {package}"))
    return Part(PROGRAM, name, f"{_version(path)} ({path})", purpose)


def _version(path: str) -> str:
    """What looks like a version in the first line that the program says of itself."""
    flag = "--help" if os.path.basename(path) == "busybox" else "--version"
    try:
        said = _output(path, flag)
    except (OSError, subprocess.TimeoutExpired) as err:
        return f"cannot be run: {getattr(err, 'strerror', None) or 'it does not answer'}"
    found = VERSION.search(said)
    if found is None and which("dpkg-query"):  # passt says "unknown version"
        with suppress(OSError, subprocess.SubprocessError):
            owner = _output("dpkg-query", "-S", os.path.realpath(path)).partition(":")[0]
            found = VERSION.search(" " + _output("dpkg-query", "-W", "-f", "${Version}", owner))
    return found[1] if found else "of unknown version"


def _output(*command: str) -> str:
    """The first line of what `command` writes. Raises OSError, SubprocessError."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=VERSION_SECONDS, check=False,
    )  # fmt: skip
    return done.stdout[:VERSION_BYTES].decode("utf-8", "replace").partition("\n")[0]


def host() -> list[Part]:
    """What this host lets this user have."""
    return [
        _user_namespaces(),
        _landlock(),
        _seccomp(),
        _cgroup(),
        _device("/dev/net/tun", "tun", "--net tap, bridge=", _can_make_taps()),
        _device("/dev/vhost-net", "vhost_net", "--net tap,vhost=on: frames by the kernel"),
        _device("/dev/vhost-vsock", "vhost_vsock", "--vsock cid=N,vhost: sockets by the kernel"),
        _userfault(),
        _open_files(),
        _huge_pages(),
    ]


def _device(path: str, module: str, purpose: str, value: str = "opens") -> Part:
    """A device node that is opened for reading and writing, as its users will."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
        return Part(HOST, path, value, purpose)
    except OSError as err:
        number, text = err.errno or 0, os.strerror(err.errno or 0)
    return Part(HOST, path, text, purpose, device_mend(path, module, number))


def _can_make_taps() -> str:
    if _effective_capabilities() >> CAP_NET_ADMIN & 1:
        return "opens"
    return "opens; only taps of this user can be used (making one needs CAP_NET_ADMIN)"


def _effective_capabilities() -> int:
    for line in _lines("/proc/self/status"):
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _user_namespaces() -> Part:
    from vmm.doctor.namespaces import limits, subordinate_ids, trouble

    name, purpose = "user namespaces", "sharing directories (--fs, --root) without root"
    wrong = trouble()
    if not wrong:
        return Part(HOST, name, f"work; {subordinate_ids()}", purpose)
    mends = limits()
    return Part(
        HOST, name, wrong, purpose,
        "; ".join(mends) or "run it outside this container, or as root",
    )  # fmt: skip


def _landlock() -> Part:
    from vmm.sandbox import landlock

    name, purpose = "Landlock", "--sandbox, helper programs: no other files are opened"
    version = landlock.abi()
    if not version:
        mend = "a kernel from Linux 5.13 on, with landlock in lsm= on its command line"
        return Part(HOST, name, "not in this kernel, or off", purpose, mend)
    ports = "files and TCP" if version >= 4 else "files"
    return Part(HOST, name, f"ABI {version} ({ports})", purpose)


def _seccomp() -> Part:
    from vmm.sandbox import seccomp

    name, purpose = "seccomp", "--sandbox, helper programs: few system calls are made"
    if not seccomp.available():
        return Part(HOST, name, "no filters", purpose, "a kernel with CONFIG_SECCOMP_FILTER")
    asks = seccomp.available(seccomp.NOTIFY)
    return Part(HOST, name, "filters" + (", supervised ones" if asks else ""), purpose)


def _cgroup() -> Part:
    from vmm.sandbox.cgroup import Cgroup

    name, purpose = "cgroups", "helper programs: all that one starts ends with it"
    try:
        made = Cgroup("doctor")
    except OSError as err:
        mend = "a directory of cgroup2 that this user may divide, as `systemd-run --user` gives"
        return Part(HOST, name, f"none can be made ({err.strerror or err})", purpose, mend)
    made.close()
    return Part(HOST, name, "one can be made for each helper", purpose)


def _userfault() -> Part:
    from vmm.errors import HostError
    from vmm.memory.userfault import open_userfault

    name, purpose = "userfaultfd", "vmm restore --pages uffd"
    try:
        os.close(open_userfault())
    except HostError as err:
        mend = as_root("sysctl vm.unprivileged_userfaultfd=1")
        why = str(err).partition("; ")[0].removeprefix("userfaultfd: ")
        return Part(HOST, name, why, purpose, mend)
    return Part(HOST, name, "works", purpose)


def _open_files() -> Part:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    name, purpose = "open files", "a machine takes 10 to 30 of them"
    mend = ""
    if 0 <= soft < FEW_FILES:
        mend = f"ulimit -n {_limit(hard)}"
        if soft == hard:
            mend = as_root(f"prlimit --nofile=65536 --pid {os.getppid()}")
    return Part(HOST, name, f"{_limit(soft)} (at most {_limit(hard)})", purpose, mend)


def _limit(value: int) -> str:
    return "unlimited" if value < 0 else str(value)


def _huge_pages() -> Part:
    fields = {k: v.split() for k, _, v in (line.partition(":") for line in _lines("/proc/meminfo"))}
    free, size = (int(fields.get(key, ["0"])[0]) for key in ("HugePages_Free", "Hugepagesize"))
    name, purpose = "huge pages", "memory of backing=hugetlbfs; else transparent ones"
    value = f"{free} of {size // 1024} MiB free; transparent: {_transparent()}"
    return Part(HOST, name, value, purpose)


def _transparent() -> str:
    for line in _lines("/sys/kernel/mm/transparent_hugepage/enabled"):
        return line.partition("[")[2].partition("]")[0] or "unknown"
    return "not in this kernel"


def _lines(path: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            yield from lines
    except OSError:
        return
