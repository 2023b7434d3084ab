"""The words of `vmm exec` before `--`: where the kernel is left out, and where `--` is."""

from __future__ import annotations

import os
import shlex

from vmm.cli.arguments import HELP
from vmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.cli.arguments import Arguments, Parser

IMAGES = ("arch/x86/boot/bzImage", "vmlinux")
SOURCES = ("Kconfig", "Makefile", "scripts")
"""What the top of Linux' sources has."""


def parse(
    parser: Parser, words: list[str], command: list[str], dashes: bool
) -> tuple[Arguments, str | None]:
    """The arguments, and the tree whose kernel they say, where they name it (or nothing at all).

    Raises:
        UsageError: in a line that says what would work.
    """
    from vmm.config_paths import here

    places = operands(parser, words)
    if not dashes and len(places) > 1:
        at = places[1]
        parser.parse(words[:at], words[at:])  # complains of an option that there is not
        raise UsageError(
            f"{words[at]!r}: the command comes after --: vmm exec {shlex.join(words[:at])} -- "
            f"{shlex.join(words[at:])}"
        )
    asks = any(word in ("-h", HELP) for word in words)
    tree = None
    if not places and not asks:
        tree = tree_above(here())
        # First: an option at the end that has no value is to be complained of.
        words = [image(tree), *words] if tree is not None else words
        if tree is None and command:
            raise UsageError(missing(here()))
    elif len(places) == 1 and os.path.isdir(words[places[0]]):
        path = words[places[0]]
        from vmm.initramfs.modules import is_build_tree

        if not is_build_tree(path):
            raise UsageError(
                f"kernel {path} is a directory in which no kernel was built; give it a bzImage or "
                "vmlinux"
            )
        tree = path
        words = [*words[: places[0]], image(path), *words[places[0] + 1 :]]
    elif len(places) == 1 and not dashes:
        # `vmm exec uname -r`: the kernel was left out.
        at = places[0]
        known = {name for option in parser.options for name in option.names}
        options = {word.partition("=")[0] for word in words[at + 1 :]}
        if not asks and not os.path.exists(words[at]) and not (options and options <= known):
            kernel = "" if tree_above(here()) is not None else "KERNEL "
            raise UsageError(
                f"{words[at]!r}: the command comes after --: "
                f"vmm exec {kernel}{shlex.join([*words[:at], '--', *words[at:]])}"
            )
    return parser.parse(words, command), tree


def operands(parser: Parser, words: list[str]) -> list[int]:
    """The places of what is no option, nor an option's value."""
    takes = {
        name: bool(option.metavar) and not option.optional
        for option in parser.options
        for name in option.names
    }
    places, skip = [], False
    for number, word in enumerate(words):
        if skip:
            skip = False
        elif len(word) < 2 or word[0] != "-":
            places.append(number)
        else:
            skip = takes.get(word, False)
    return places


def tree_above(directory: str) -> str | None:
    """The tree this directory is in, if a kernel was built there."""
    from vmm.initramfs.modules import is_build_tree

    while not is_build_tree(directory):
        above = os.path.dirname(directory)
        if above == directory:
            return None
        directory = above
    return directory


def image(tree: str) -> str:
    """The kernel of a build tree. Raises UsageError."""
    for name in IMAGES:
        path = os.path.join(tree, name)
        if os.path.exists(path):
            return path
    raise UsageError(
        f"no KERNEL given, and the tree {tree} has none built yet: make -j$(nproc) bzImage modules"
    )


def missing(directory: str) -> str:
    """That there is no kernel, and what to do."""
    if all(os.path.exists(os.path.join(directory, name)) for name in SOURCES):
        return (
            "no KERNEL given, and none is built in this tree yet: make defconfig kvm_guest.config "
            "&& make -j$(nproc) bzImage modules"
        )
    return (
        "no KERNEL given, and no kernel was built in this directory or one above: vmm exec KERNEL "
        "[option ...] -- CMD [ARG ...]"
    )
