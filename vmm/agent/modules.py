"""The kernel modules the agent needs: where they are, and which.

A kernel that has the drivers built in needs none, and then its modules need not be found. Looking
through a tree of thousands takes long, so what was found is kept, and looked at again when one of
the files has changed.
"""

from __future__ import annotations

import os

from vmm.agent import cache
from vmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

PREFIXES = ("vmlinuz-", "vmlinux-", "bzImage-", "kernel-")


def find_tree(kernel: str) -> str | None:
    """The `lib/modules/VERSION` that belongs to `kernel`, if it is where packages put it.

    That is lib/modules beside the kernel's directory (or the kernel), as in an unpacked package or
    on the host itself, and the directory itself where a kernel lies among its modules.
    """
    path = os.path.realpath(kernel)
    directory, name = os.path.split(path)
    if os.path.isdir(os.path.join(directory, "kernel")):
        return directory
    version = next((name[len(p) :] for p in PREFIXES if name.startswith(p)), "")
    for above in (directory, os.path.dirname(directory)):
        for modules in ("lib/modules", "usr/lib/modules"):
            base = os.path.join(above, modules)
            names = [version] if version else _only(base)
            for found in names:
                tree = os.path.join(base, found)
                if os.path.isdir(os.path.join(tree, "kernel")):
                    return tree
    return None


def check_tree(path: str) -> None:
    """UsageError where it is no lib/modules/VERSION."""
    if not os.path.isdir(os.path.join(path, "kernel")):
        raise UsageError(
            f"--modules {path} has no directory 'kernel'; give the kernel's lib/modules/VERSION"
        )


def _only(base: str) -> list[str]:
    """The one directory in `base`; none where there are several: which would be a guess."""
    try:
        found = os.listdir(base)
    except OSError:
        return []
    return found if len(found) == 1 else []


def collect(tree: str, wanted: Sequence[str], optional: Sequence[str] = ()) -> list[bytes]:
    """The modules called `wanted` and all they depend on, in the order to insert them.

    Those of `optional` are left out where the kernel does not have them.

    Raises:
        UsageError: the kernel has one of them neither built in nor as a module.
    """
    kept = _kept(tree, wanted, optional)
    if kept is not None:
        return kept
    from vmm.initramfs.modules import ModuleTree

    found = ModuleTree(tree)
    names = []
    for name in (*optional, *wanted):
        try:
            found.find(name)
        except UsageError:
            if name in wanted:
                raise UsageError(
                    f"the agent needs {name}, which kernel {found.version} ({tree}) has neither "
                    "built in nor as a module"
                ) from None
            continue
        names.append(name)
    modules = found.closure(names)
    lines = [_identity(module.file) for module in modules]
    cache.write(_name(tree, wanted, optional), "\n".join(["found", *lines]).encode())
    return [module.read() for module in modules]


def _name(tree: str, wanted: Sequence[str], optional: Sequence[str]) -> str:
    from hashlib import sha256

    text = "\n".join([os.path.realpath(tree), *wanted, "", *optional])
    return "modules-" + sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _identity(path: str) -> str:
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns} {path}"


def _kept(tree: str, wanted: Sequence[str], optional: Sequence[str]) -> list[bytes] | None:
    """What was found before, if it is still so."""
    data = cache.read(_name(tree, wanted, optional))
    if data is None:
        return None
    modules = []
    from vmm.initramfs.modules import Module

    try:
        for line in data.decode("utf-8", "surrogateescape").split("\n")[1:]:
            path = line.split(" ", 2)[2]
            if _identity(path) != line:
                return None
            modules.append(Module("", path, "").read())
    except (OSError, IndexError, UsageError):
        return None
    return modules
