"""What a helper program is left with: passt, virtiofsd, qemu-storage-daemon, the uffd handler.

Whoever starts one says in a Confinement which files it serves and what else it needs. A thread
gives up the rest (no_new_privs, Landlock, capabilities, system calls), starts the program, which
has what the thread has, and ends: no program in between, and nothing of this process changes.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from contextlib import suppress

from vmm.sandbox import denied, landlock, privileges, seccomp

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import TypeVar

    T = TypeVar("T")

READ = landlock.READ
SERVE = landlock.READ_FILE | landlock.WRITE
"""Rights on a file that is read and written; with DEVICE, on a device."""
DEVICE = landlock.IOCTL_DEV
RUN = READ | landlock.EXECUTE
"""Rights on a program that is run, and its loader."""

LIBRARIES = (
    "/lib", "/lib64", "/lib32", "/usr/lib", "/usr/lib64", "/usr/libexec", "/usr/share",
    "/usr/local/lib", "/nix/store", "/gnu/store", "/etc/ld.so.cache", "/etc/ld.so.preload",
    "/etc/localtime", "/etc/gnutls", "/etc/ssl/openssl.cnf", "/etc/crypto-policies",
    "/sys/devices/system/cpu", "/sys/devices/system/node", "/dev/urandom", "/dev/random",
    "/proc/sys/crypto", "/proc/cpuinfo", "/proc/meminfo",
)  # fmt: skip
"""What programs read at their start, whatever they are: libraries and what describes the system."""
PROGRAMS = ("/bin", "/sbin", "/usr", "/opt", "/nix/store", "/gnu/store", "/run/current-system")
"""What a script, such as one that wraps a program, may read and run besides."""

_WRITING = landlock.WRITE_FILE | landlock.MAKE
CAP_DAC_OVERRIDE = 1
ENVIRONMENT = ("PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "QEMU_MODULE_DIR")
"""Names that a helper gets, and LC_*: nothing else of this process's environment."""
PYTHON_ENVIRONMENT = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")
"""Names that a helper in Python gets besides: where its modules are."""

_programs: dict[object, bytes] = {}
"""Compiled filters."""


class Confinement:
    """What one helper program needs.

    Args:
        files: paths, or descriptors, and the Landlock rights on each and what is below it, beside
            the program and its libraries; None: the program sandboxes itself by mounts of its own,
            which Landlock forbids, so files are left to it.
        keep: numbers of capabilities that it needs, if this process has them.
        sockets: it makes sockets of its own.
        tcp: with `sockets`, it binds and connects TCP.
        signals: it sends signals to processes outside.
        environment: names of variables it gets beside ENVIRONMENT.
        programs: it runs other programs, which PROGRAMS says.
    """

    __slots__ = ("environment", "files", "keep", "programs", "signals", "sockets", "tcp")

    def __init__(
        self,
        files: Sequence[tuple[str | int, int]] | None = (),
        *,
        keep: Iterable[int] = (),
        sockets: bool = False,
        tcp: bool = False,
        signals: bool = False,
        environment: Sequence[str] = (),
        programs: bool = False,
    ) -> None:
        self.files = files
        self.keep = frozenset(keep)
        self.sockets = sockets
        self.tcp = tcp
        self.signals = signals
        self.environment = environment
        self.programs = programs

    def variables(self) -> dict[str, str]:
        """The environment it gets."""
        names = {*ENVIRONMENT, *self.environment}
        return {
            name: value
            for name, value in os.environ.items()
            if name in names or name.startswith("LC_")
        }

    def run(self, program: str, start: Callable[[], T], more: Sequence[tuple[str, int]] = ()) -> T:
        """What `start` returns, in a thread that has no more than `program` needs, and the files
        `more`. It must not import modules or open files. Raises what it raises, and OSError."""
        import _thread

        files = None
        if self.files is not None:
            files = [*_basic(program, self.programs), *self.files, *more]
        code = self._filter()
        done = _thread.allocate_lock()
        result: list[T] = []
        failed: list[BaseException] = []

        def confined() -> None:
            try:
                try:
                    self._enter(files, code)
                except OSError as err:
                    reason = f"this host does not let it be confined ({err.strerror})"
                    raise OSError(err.errno, reason) from err
                result.append(start())
            except BaseException as err:
                failed.append(err)
            finally:
                done.release()

        done.acquire()
        _thread.start_new_thread(confined, ())
        done.acquire()
        if failed:
            raise failed[0]
        return result[0]

    def _enter(self, files: list[tuple[str | int, int]] | None, code: bytes) -> None:
        privileges.no_new_privs()
        scopes = landlock.SCOPE_ABSTRACT_UNIX | landlock.SCOPE_SIGNAL
        if self.signals:
            scopes = landlock.SCOPE_ABSTRACT_UNIX
        landlock.restrict(files, ports=None if self.tcp else (), scopes=scopes)
        keep = set(self.keep)
        if self.files and _needs_override(self.files):
            keep.add(CAP_DAC_OVERRIDE)
        privileges.drop_capabilities(keep)
        if seccomp.available(seccomp.fails(0)):
            seccomp.restrict(code)

    def _filter(self) -> bytes:
        names = list(denied.ALWAYS)
        if self.files is not None:
            names += denied.MOUNTS + denied.METADATA + denied.PROCESSES
        if not self.sockets:
            names += denied.SOCKETS
        if not self.signals and landlock.abi() < 6:  # else Landlock keeps them in
            names += denied.SIGNALS
        key = tuple(names)
        found = _programs.get(key)
        if found is None:
            refused = seccomp.fails(errno.EPERM)
            others = dict.fromkeys(names, refused)
            calls: seccomp.Calls = {}
            if self.files is not None:
                # clone3 keeps its flags in memory, which no filter sees: the C library takes clone.
                others["clone3"] = seccomp.fails(errno.ENOSYS)
                calls = {
                    "clone": [(0, "without", (denied.CLONE_NEW,))],
                    "prlimit64": [(0, "in", (0,))],
                }
            found = _programs[key] = seccomp.compile_filter(
                calls, seccomp.ALLOW, others, refusal=refused
            )
        return found


def _needs_override(files: Iterable[tuple[str | int, int]]) -> bool:
    """Whether this thread may do with `files` what the rights say by its capabilities alone, as
    root with the image of another user."""
    if not privileges.capabilities()[0] >> CAP_DAC_OVERRIDE & 1:
        return False
    wanted = [
        (path, os.R_OK | (os.W_OK if rights & _WRITING else 0))
        for path, rights in files
        if isinstance(path, str)
    ]
    with privileges.none_effective():
        refused = [each for each in wanted if not os.access(*each, effective_ids=True)]
    return any(os.access(*each, effective_ids=True) for each in refused)  # else it is not there


def _basic(program: str, programs: bool) -> list[tuple[str | int, int]]:
    """The rights on a program itself, its loader, its libraries."""
    real = os.path.realpath(program)
    found: list[tuple[str | int, int]] = [("/dev/null", SERVE), ("/dev/zero", READ)]
    found += [(path, READ) for path in LIBRARIES]
    found += [(path, READ) for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path]
    found.append((real, RUN))
    its = loader(real)
    if its:
        found.append((its, RUN))
    if programs or its is None:
        found += [(path, RUN) for path in PROGRAMS + LIBRARIES[:3]]
    prefix = os.path.dirname(os.path.dirname(real))
    if prefix not in ("/", "/usr"):  # installed elsewhere, with its libraries
        found += [(f"{prefix}/{name}", READ) for name in ("lib", "lib64", "libexec", "share")]
    return found


def python_files() -> list[tuple[str | int, int]]:
    """The rights on what a Python like this one reads: its library, the packages."""
    found: list[tuple[str | int, int]] = [(path or ".", READ) for path in sys.path]
    for prefix in {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}:
        found += [(f"{prefix}/{name}", READ) for name in ("lib", "lib64", "pyvenv.cfg")]
    return found


def loader(program: str) -> str | None:
    """The loader that the ELF file `program` names (PT_INTERP), or an empty string; None: it is a
    script."""
    with suppress(OSError, struct.error), open(program, "rb") as file:
        head = file.read(64)
        if head[:5] != b"\x7fELF\x02":
            return None
        (table,) = struct.unpack_from("<Q", head, 32)
        size, count = struct.unpack_from("<HH", head, 54)
        file.seek(table)
        data = file.read(size * count)
        for at in range(0, len(data), size or 1):
            kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", data, at)
            if kind == 3:
                file.seek(offset)
                return os.fsdecode(file.read(min(length, 4096)).rstrip(b"\0"))
        return ""
    return None
