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

    from vmm.initramfs.modules import Module


def find_tree(kernel: str) -> str | None:
    """The `lib/modules/VERSION` that belongs to `kernel`, if it is where packages put it.

    That is lib/modules beside the kernel's directory (or the kernel), as in an unpacked package or
    on the host itself, the directory itself where a kernel lies among its modules, and the tree in
    which it was built, where it has modules.
    """
    from vmm.boot.kconfig import PREFIXES, build_tree

    path = os.path.realpath(kernel)
    directory, name = os.path.split(path)
    built = build_tree(path)
    if built is not None:
        return built if os.path.isfile(os.path.join(built, "modules.order")) else None
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
    """UsageError where it is no lib/modules/VERSION, nor a tree in which a kernel was built."""
    if os.path.isdir(os.path.join(path, "kernel")) or os.path.isfile(
        os.path.join(path, "modules.order")
    ):
        return
    below = sorted(
        name for name in _names(path) if os.path.isdir(os.path.join(path, name, "kernel"))
    )
    if below:
        raise UsageError(
            f"--modules {path} has several kernels' modules or one's; give one: "
            f"{os.path.join(path, below[-1])}"
        )
    raise UsageError(
        f"--modules {path} has no directory 'kernel'; give the kernel's lib/modules/VERSION"
    )


def _only(base: str) -> list[str]:
    """The one directory in `base`; none where there are several: which would be a guess."""
    found = _names(base)
    return found if len(found) == 1 else []


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


class Missing(UsageError):
    """A tree has some of the modules wanted neither as modules nor as built in: `names`."""

    def __init__(self, names: list[str], tree: str, version: str) -> None:
        super().__init__(
            f"the agent needs {', '.join(names)}, which kernel {version} ({tree}) has neither "
            "built in nor as a module"
        )
        self.names = names


def collect(
    tree: str, wanted: Sequence[str], optional: Sequence[str] = (), release: str = ""
) -> list[bytes]:
    """The modules called `wanted` and all they depend on, in the order to insert them.

    Those of `optional` are left out where the kernel does not have them. `release` is the kernel's,
    where it is known.

    Raises:
        Missing: the kernel has some of them neither built in nor as a module.
        UsageError: they are another kernel's; one is broken, or not whole.
    """
    kept = _kept(tree, wanted, optional, release)
    if kept is not None:
        return kept
    from vmm.initramfs.modules import ModuleTree

    found = ModuleTree(tree)
    names, missing = [], []
    for name in (*optional, *wanted):
        if found.has(name):
            names.append(name)
        elif name in wanted:
            missing.append(name)
    # What is there but cannot be had (not built yet) is told by `find`.
    for name in wanted:
        if name in missing and found.is_known(name):
            found.find(name)
    if missing:
        raise Missing(missing, tree, found.version)
    modules = found.closure(names)
    _check_release(tree, modules, release)
    lines = [_identity(module.file) for module in modules]
    head = f"found {_lists(tree)}"
    cache.write(
        _name(tree, wanted, optional, release),
        "\n".join([head, *lines]).encode("utf-8", "surrogateescape"),
    )
    return [module.read() for module in modules]


def _check_release(tree: str, modules: Sequence[Module], release: str) -> None:
    """UsageError where the modules were built for another kernel, which would refuse them."""
    built_for = next((module.release for module in modules if module.release), "")
    if built_for and release and built_for != release:
        raise UsageError(
            f"--modules {tree}: these modules are of kernel {built_for}, and the kernel is "
            f"{release}; give lib/modules/{release}"
        )


def _lists(tree: str) -> str:
    """What changes when a kernel is built anew, perhaps with what was a module built in."""
    stamps = []
    for name in ("modules.builtin", "modules.order"):
        try:
            stamps.append(_identity(os.path.join(tree, name)).rpartition(" ")[0])
        except OSError:
            stamps.append("none")
    return ", ".join(stamps)


def _name(tree: str, wanted: Sequence[str], optional: Sequence[str], release: str) -> str:
    from hashlib import sha256

    text = "\n".join([os.path.realpath(tree), release, *wanted, "", *optional])
    return "modules-" + sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _lies_in(path: str, tree: str) -> bool:
    """Whether `path` is one of the files below `tree`."""
    return os.path.normpath(path).startswith(os.path.join(os.path.normpath(tree), ""))


def _identity(path: str) -> str:
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns} {path}"


def _kept(
    tree: str, wanted: Sequence[str], optional: Sequence[str], release: str
) -> list[bytes] | None:
    """What was found before, if it is still so."""
    data = cache.read(_name(tree, wanted, optional, release))
    if data is None:
        return None
    modules = []
    from vmm.initramfs.modules import Module

    try:
        head, *lines = data.decode("utf-8", "surrogateescape").split("\n")
        if head != f"found {_lists(tree)}":
            return None
        for line in lines:
            path = line.split(" ", 2)[2]
            if not _lies_in(path, tree) or _identity(path) != line:
                return None
            modules.append(Module("", path, "").read())
    except (OSError, IndexError, UsageError):
        return None
    return modules
