"""Debian's kernel packages, fetched once and kept unpacked.

    kernel = debian_kernel("cloud-amd64")
    kernel.vmlinuz, kernel.modules

A package is downloaded by apt-get (so its signature is checked against the host's keys), unpacked
by dpkg -x, and never installed. It is kept in $VMM_CACHE/kernels/PACKAGE_VERSION, VMM_CACHE being
~/.cache/vmm unless set; a .deb someone put in $VMM_CACHE/kernels is used without a download.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vmm.errors import BootError, HostError, UsageError

FLAVOURS = ("cloud-amd64", "amd64")
"""linux-image-FLAVOUR: "cloud-amd64" is small and LZ4-packed, "amd64" the full one, XZ-packed."""


@dataclass(frozen=True)
class Kernel:
    """One unpacked kernel package.

    `name` is PACKAGE_VERSION, `release` what `uname -r` says in it, `vmlinuz` the bzImage,
    `modules` its lib/modules/RELEASE, `directory` the directory all of it is in.
    """

    name: str
    release: str
    vmlinuz: Path
    modules: Path
    directory: Path

    def vmlinux(self) -> Path:
        """The ELF kernel inside the bzImage, extracted on the first call (30 to 60 MB)."""
        target = self.directory / "vmlinux"
        if not target.exists():
            # Imported here: fetching a kernel does not need the boot loaders.
            from vmm.boot.loader import extract_vmlinux

            _write_whole(target, extract_vmlinux(str(self.vmlinuz)))
        return target


def cache_directory() -> Path:
    """Where kernels are kept: $VMM_CACHE, or ~/.cache/vmm (XDG_CACHE_HOME is followed)."""
    chosen = os.environ.get("VMM_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmm"


def check_owner(kernels: Path) -> None:
    """HostError where the directory is another user's, as root finds it with sudo that keeps HOME:
    what is unpacked and compiled there, that user could exchange meanwhile."""
    if kernels.stat().st_uid != os.geteuid():
        raise HostError(
            f"kernel cache {kernels} belongs to another user; have VMM_CACHE name a directory of "
            "your own"
        )


def debian_kernel(flavour: str = "cloud-amd64", *, download: bool = True) -> Kernel:
    """The newest cached Debian kernel of `flavour`, fetched first if there is none.

    Raises HostError if it is neither in the cache nor to be had, with what was tried.
    """
    if flavour not in FLAVOURS:
        raise UsageError(f"kernel flavour {flavour!r}: choose from {', '.join(FLAVOURS)}")
    kernels = cache_directory() / "kernels"
    found = _cached(kernels, flavour)
    if found is None:
        found = _unpack_debs(kernels, flavour)
    if found is None:
        if not download:
            raise HostError(
                f"no Debian kernel linux-image-{flavour} in {kernels};"
                f" fetch it with: {sys.executable} -m vmm.testing.kernels {flavour}"
            )
        _download(kernels, flavour)
        found = _unpack_debs(kernels, flavour)
    if found is None:
        raise HostError(f"apt-get left no package linux-image-*-{flavour}_*.deb in {kernels}")
    return found


def kernel_at(path: Path) -> Kernel:
    """The kernel in a file of one's own, with its modules if they are where packages put them (see
    `vmm.agent.modules.find_tree`). Raises UsageError if there is no such file."""
    from vmm.agent.modules import find_tree

    if not path.is_file():
        raise UsageError(f"kernel {path}: no such file; give a bzImage or an ELF vmlinux")
    tree = find_tree(str(path))
    modules = Path(tree) if tree else path.parent / "no-modules"
    return Kernel(path.name, modules.name if tree else "", path, modules, path.parent)


def _pattern(flavour: str) -> re.Pattern[str]:
    # linux-image-6.1.0-56-cloud-amd64_6.1.192-2_amd64; the full flavour has nothing before "amd64".
    return re.compile(rf"linux-image-([0-9][0-9.+~a-z]*(?:-[0-9]+)?-{flavour})_([^_]+)_amd64")


def _newest(names: list[str], flavour: str) -> str | None:
    """The one of `names` (packages of `flavour`) with the highest version."""
    fitting = [name for name in names if _pattern(flavour).fullmatch(name)]
    return max(
        fitting, default=None, key=lambda name: [int(n) for n in re.findall(r"[0-9]+", name)]
    )


def _cached(kernels: Path, flavour: str) -> Kernel | None:
    if not kernels.is_dir():
        return None
    name = _newest([entry.name for entry in kernels.iterdir() if entry.is_dir()], flavour)
    return _kernel(kernels / name, flavour) if name else None


def _kernel(directory: Path, flavour: str) -> Kernel:
    match = _pattern(flavour).fullmatch(directory.name)
    assert match is not None
    release = match[1]
    modules = directory / "lib" / "modules" / release
    if not modules.is_dir():
        modules = directory / "usr" / "lib" / "modules" / release
    kernel = Kernel(
        directory.name, release, directory / "boot" / f"vmlinuz-{release}", modules, directory
    )
    for path in (kernel.vmlinuz, kernel.modules):
        if not path.exists():
            raise BootError(f"kernel cache: {path} is missing; remove {directory} and try again")
    return kernel


def _unpack_debs(kernels: Path, flavour: str) -> Kernel | None:
    """Unpack the newest .deb of `flavour` lying in `kernels`, if any."""
    if not kernels.is_dir():
        return None
    # apt writes the colon of an epoch as %3a; versions of kernels have none.
    name = _newest([deb.stem for deb in kernels.glob("*.deb")], flavour)
    if name is None:
        return None
    check_owner(kernels)
    # Renamed when complete: an interrupted unpack, or one at the same time, leaves nothing half.
    with tempfile.TemporaryDirectory(dir=kernels, prefix=".unpack-") as scratch:
        tree = Path(scratch) / "tree"
        run_tool(["dpkg", "-x", str(kernels / f"{name}.deb"), str(tree)])
        try:
            tree.rename(kernels / name)
        except OSError:
            if not (kernels / name).is_dir():
                raise
    (kernels / f"{name}.deb").unlink(missing_ok=True)
    return _kernel(kernels / name, flavour)


def _download(kernels: Path, flavour: str) -> None:
    if shutil.which("apt-get") is None:
        raise HostError(
            f"no apt-get here to fetch linux-image-{flavour}; put Debian's"
            f" linux-image-VERSION-{flavour}_*.deb into {kernels}"
        )
    kernels.mkdir(parents=True, exist_ok=True)
    check_owner(kernels)

    def newest() -> str:
        depends = run_tool(["apt-cache", "depends", f"linux-image-{flavour}"])
        packages = re.findall(rf"Depends: (linux-image-[0-9]\S*-{flavour})\b", depends)
        if not packages:
            raise HostError(f"this host's apt offers no linux-image-{flavour} (not Debian?)")
        return str(packages[0])

    _apt_download(newest, kernels)


def download_package(package: str, directory: Path) -> Path:
    """The .deb of `package`, fetched by apt-get into `directory`, where it appears when whole.

    Raises HostError if there is no apt-get or it cannot.
    """
    if shutil.which("apt-get") is None:
        raise HostError(f"no apt-get here to fetch {package}; put Debian's into {directory}")
    return _apt_download(lambda: package, directory)


def _apt_download(package: Callable[[], str], directory: Path) -> Path:
    """Fetch what `package` says, asked once more when the package lists had to be renewed."""
    try:
        return _try_download(package(), directory)
    except HostError:
        # No package lists yet (a fresh machine), or lists older than the archive.
        root = [] if os.geteuid() == 0 else ["sudo", "-n"]
        run_tool([*root, "apt-get", "-q", "update"])
        return _try_download(package(), directory)


def _try_download(package: str, directory: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=directory, prefix=".download-") as scratch:
        run_tool(["apt-get", "-q", "download", package], cwd=scratch)
        for deb in Path(scratch).glob("*.deb"):
            return deb.rename(directory / deb.name)
    raise HostError(f"apt-get download {package} left no package")


def run_tool(command: list[str], cwd: str | None = None) -> str:
    """Standard output of `command`; HostError if it is not there or fails, with its last line."""
    try:
        done = subprocess.run(
            command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise HostError(f"{command[0]}: not found; install it") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise HostError(f"{' '.join(command)}: exit status {done.returncode}: {' '.join(last)}")
    return done.stdout


def _write_whole(target: Path, data: bytes) -> None:
    """Write `target` so that nobody ever sees a part of it."""
    handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(scratch, 0o644)
        os.rename(scratch, target)
    except BaseException:
        os.unlink(scratch)
        raise


def main(arguments: list[str]) -> int:
    """`python -m vmm.testing.kernels [FLAVOUR ...]`: fetch, and print where the kernels are; with
    `--path [FLAVOUR]` only the path of one, the cloud kernel if none is named, for a script."""
    try:
        if arguments[:1] == ["--path"]:
            print(debian_kernel(*(arguments[1:] or FLAVOURS[:1])).vmlinuz)
            return 0
        for flavour in arguments or FLAVOURS:
            kernel = debian_kernel(flavour)
            print(f"{flavour}: {kernel.vmlinuz}")
    except (HostError, UsageError) as error:
        print(f"kernels: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
