"""A small Linux kernel for tests: everything a virtual machine needs built in, nothing else.

    kernel = tiny_kernel()
    kernel.vmlinux, kernel.bzimage

It is Debian's linux-source-6.1 with CONFIG on top of `make tinyconfig`: some minutes, once. The
result is kept in $VMM_CACHE/kernels/linux-tiny-VERSION-INPUTS (VMM_CACHE being ~/.cache/vmm unless
set), where INPUTS stands for CONFIG and the way it is built; a newer source alone builds no new
kernel. The source package is downloaded by apt-get, which checks its signature, unless someone put
linux-source-6.1_*.deb into $VMM_CACHE/kernels; it is never installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vmm.errors import HostError, UsageError
from vmm.testing.kernels import cache_directory, check_owner, download_package, run_tool

SOURCE = "linux-source-6.1"
CONFIG = """\
CONFIG_64BIT=y
CONFIG_SMP=y
CONFIG_HYPERVISOR_GUEST=y
CONFIG_PARAVIRT=y
CONFIG_KVM_GUEST=y
CONFIG_PVH=y
CONFIG_ACPI=y
CONFIG_X86_MPPARSE=y
CONFIG_PCI=y
CONFIG_PCI_MSI=y
CONFIG_RELOCATABLE=y
CONFIG_KERNEL_GZIP=y
CONFIG_PRINTK=y
CONFIG_PRINTK_TIME=y
CONFIG_EARLY_PRINTK=y
CONFIG_BUG=y
CONFIG_TTY=y
CONFIG_SERIAL_8250=y
CONFIG_SERIAL_8250_CONSOLE=y
CONFIG_HIGH_RES_TIMERS=y
CONFIG_MULTIUSER=y
CONFIG_FUTEX=y
CONFIG_EPOLL=y
CONFIG_EVENTFD=y
CONFIG_SIGNALFD=y
CONFIG_TIMERFD=y
CONFIG_POSIX_TIMERS=y
CONFIG_FILE_LOCKING=y
CONFIG_SHMEM=y
CONFIG_BINFMT_ELF=y
CONFIG_BINFMT_SCRIPT=y
CONFIG_BLK_DEV_INITRD=y
CONFIG_RD_GZIP=y
CONFIG_DEVTMPFS=y
CONFIG_TMPFS=y
CONFIG_PROC_FS=y
CONFIG_SYSFS=y
CONFIG_BLOCK=y
CONFIG_BLK_DEV=y
CONFIG_NET=y
CONFIG_UNIX=y
CONFIG_INET=y
CONFIG_NETDEVICES=y
CONFIG_NET_CORE=y
CONFIG_VIRTIO_MENU=y
CONFIG_VIRTIO_PCI=y
CONFIG_VIRTIO_MMIO=y
CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES=y
CONFIG_VIRTIO_BLK=y
CONFIG_VIRTIO_NET=y
CONFIG_VIRTIO_CONSOLE=y
"""
TOOLS = {
    "make": "make",
    "gcc": "gcc",
    "ld": "binutils",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "perl": "perl-base",
    "tar": "tar",
    "xz": "xz-utils",
    "gzip": "gzip",
}
"""What a build runs, and the Debian package each is in; gelf.h (libelf-dev) comes to it."""
RECIPE = "1"
"""Counted up when what `_build` does changes, so that kernels built the old way are left."""
INPUTS = hashlib.sha256(f"{SOURCE} {RECIPE}\n{CONFIG}".encode()).hexdigest()[:12]
_NAME = re.compile(rf"linux-tiny-(.+)-{INPUTS}")
TELL_EVERY = 15.0
"""Seconds between two lines that tell how far the compiler is."""


@dataclass(frozen=True)
class TinyKernel:
    """A built kernel.

    `version` is the source package's ("6.1.192-2"), `vmlinux` the ELF file without symbols (with
    a PVH note), `bzimage` the same packed with gzip, `config` its .config.
    """

    version: str
    directory: Path

    @property
    def vmlinux(self) -> Path:
        return self.directory / "vmlinux"

    @property
    def bzimage(self) -> Path:
        return self.directory / "bzImage"

    @property
    def config(self) -> Path:
        return self.directory / "config"


def tiny_kernel(*, build: bool = True, tell: bool | None = None) -> TinyKernel:
    """The newest cached kernel made from CONFIG, built first if there is none.

    Of several processes that need it at once one builds and the others wait. Standard error is told
    what happens with `tell`, which is True by default where that is a terminal.

    Raises HostError if it is not there and cannot be built: which tool is missing, or how the
    build's log ends.
    """
    kernels = cache_directory() / "kernels"
    found = _cached(kernels)
    if found is not None:
        return found
    if not build:
        raise HostError(
            f"no linux-tiny kernel in {kernels};"
            f" build it with: {sys.executable} -m vmm.testing.tiny"
        )
    if kernels.is_dir():
        check_owner(kernels)
    _check_tools()
    say = _tell if (sys.stderr.isatty() if tell is None else tell) else _silence
    try:
        kernels.mkdir(parents=True, exist_ok=True)
        with _alone(kernels, say):
            # Whoever held the lock before us may have built it.
            return _cached(kernels) or _make(kernels, say)
    except OSError as error:
        raise HostError(f"cannot build a kernel in {kernels}: {error}") from error


def _cached(kernels: Path) -> TinyKernel | None:
    if not kernels.is_dir():
        return None
    fitting = {
        entry: match[1]
        for entry in kernels.iterdir()
        if (match := _NAME.fullmatch(entry.name)) is not None
    }
    if not fitting:
        return None
    newest = max(fitting, key=lambda entry: [int(n) for n in re.findall("[0-9]+", fitting[entry])])
    return TinyKernel(fitting[newest], newest)


def _check_tools() -> None:
    missing = {package for name, package in TOOLS.items() if shutil.which(name) is None}
    if "gcc" not in missing:
        header = ["gcc", "-E", "-o", os.devnull, "-include", "gelf.h", "-x", "c", os.devnull]
        if subprocess.run(header, capture_output=True, check=False).returncode:
            missing.add("libelf-dev")
    if missing:
        raise HostError(
            f"building a kernel needs {', '.join(sorted(missing))};"
            f" install: apt install {' '.join(sorted(missing))}"
        )


@contextlib.contextmanager
def _alone(kernels: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the build lock, which ends with this process however that ends."""
    handle = os.open(
        kernels / ".tiny.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process builds the kernel; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _make(kernels: Path, say: Callable[[str], None]) -> TinyKernel:
    """Fetch, unpack, build, keep; with the lock held. The sources (1.5 GB) go in the end."""
    for left in kernels.glob(".tiny-*/"):  # of a builder that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=kernels, prefix=".tiny-") as name:
        scratch = Path(name)
        package = _source_package(kernels, scratch, say)
        version = package.name.split("_")[1]
        say(f"unpacking {package.name}")
        run_tool(["dpkg", "-x", str(package), str(scratch / "package")])
        tree = scratch / "tree"
        tree.mkdir()
        archive = scratch / "package" / "usr" / "src" / f"{SOURCE}.tar.xz"
        run_tool(["tar", "-xf", str(archive), "-C", str(tree), "--strip-components=1"])
        result = scratch / "result"
        result.mkdir()
        log = scratch / "log"
        try:
            _build(tree, result, log, say)
        except HostError as error:
            kept = kernels / "linux-tiny.log"
            log.replace(kept)
            tail = "\n".join(kept.read_text(errors="replace").splitlines()[-15:])
            raise HostError(
                f"building linux-tiny: {error}; the log is {kept}, its end:\n{tail}"
            ) from None
        target = kernels / f"linux-tiny-{version}-{INPUTS}"
        result.rename(target)
        say(f"built {target}")
        return TinyKernel(version, target)


def _source_package(kernels: Path, scratch: Path, say: Callable[[str], None]) -> Path:
    """The source's .deb: the one someone put there, else fetched (140 MB)."""
    for package in sorted(kernels.glob(f"{SOURCE}_*.deb")):
        return package
    say(f"fetching {SOURCE}")
    return download_package(SOURCE, scratch)


def _build(tree: Path, result: Path, log: Path, say: Callable[[str], None]) -> None:
    """Configure and compile `tree`; vmlinux, bzImage and config go to `result`."""
    (tree / "kernel" / "configs" / "vmm.config").write_text(CONFIG)
    _compile(["tinyconfig", "vmm.config"], tree, log, say)
    wanted = [line for line in CONFIG.splitlines() if line]
    got = (tree / ".config").read_text().splitlines()
    lost = [line for line in wanted if line not in got]
    if lost:
        raise HostError(f"the configuration came out without {', '.join(lost)}")
    say("compiling, which takes some minutes")
    _compile(["vmlinux", "bzImage"], tree, log, say)
    run_tool(["strip", "-o", str(result / "vmlinux"), str(tree / "vmlinux")])
    shutil.copyfile(tree / "arch/x86/boot/bzImage", result / "bzImage")
    shutil.copyfile(tree / ".config", result / "config")


def _compile(targets: list[str], tree: Path, log: Path, say: Callable[[str], None]) -> None:
    """`make` in `tree`, its output added to `log`."""
    jobs = len(os.sched_getaffinity(0))
    # Nicer than what else runs: nobody waits for the last second of four minutes.
    command = ["nice", "-n", "5", "make", f"-j{jobs}", *targets]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        "LC_ALL": "C",
        "KBUILD_BUILD_USER": "vmm",
        "KBUILD_BUILD_HOST": "vmm",
    }
    start = told = time.monotonic()
    with open(log, "a") as file:
        file.write(f"$ {' '.join(command)}\n")
    with (
        open(log, "ab") as output,
        subprocess.Popen(
            command, cwd=tree, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):  # fmt: skip
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
                if time.monotonic() - told > TELL_EVERY:
                    told = time.monotonic()
                    done = log.read_bytes().count(b"\n  CC ")
                    say(f"{done} files compiled in {told - start:.0f} s")
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise HostError(f"make {' '.join(targets)} ended with status {process.returncode}")


def _tell(text: str) -> None:
    print(f"tiny kernel: {text}", file=sys.stderr, flush=True)


def _silence(text: str) -> None:
    pass


def main(arguments: list[str]) -> int:
    """`python -m vmm.testing.tiny`: build if need be, and print where the kernel is."""
    try:
        if arguments:
            raise UsageError(f"{arguments[0]}: this takes no arguments")
        print(tiny_kernel().vmlinux)
    except (HostError, UsageError) as error:
        print(f"tiny: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
