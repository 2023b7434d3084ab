"""Command-line options: a table in, values or one line of complaint out.

Not argparse: importing that and building its parser takes 6 ms, a seventh of the whole of a
`vmm run` on a small guest. What is understood is what getopt_long(3) does: `--name VALUE`,
`--name=VALUE`, flags, `--` before operands; no abbreviations.
"""

from __future__ import annotations

from vmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

HELP = "--help"
INDENT = 24
"""The column the options' descriptions start in; a third of a narrow terminal."""


class Option:
    """One option.

    Args:
        names: `-v`, `--verbose`: the last is what it is called in `Arguments`.
        help: one line.
        metavar: what its value is called; empty for a flag.
        default: its value where it is not given.
        repeat: whether each use counts; otherwise the last one does.
        optional: its value may be left out, and then is empty; if given, it follows a `=`.
    """

    __slots__ = ("default", "help", "metavar", "name", "names", "optional", "repeat")

    def __init__(
        self,
        *names: str,
        help: str,
        metavar: str = "",
        default: str = "",
        repeat: bool = False,
        optional: bool = False,
    ) -> None:
        self.names = names
        self.name = names[-1]
        self.help = help
        self.metavar = metavar
        self.default = default
        self.repeat = repeat
        self.optional = optional


class Arguments:
    """What a command line said: `operands`, and the values of its options by name."""

    __slots__ = ("_given", "_options", "operands")

    def __init__(self, options: Sequence[Option]) -> None:
        self.operands: list[str] = []
        self._options = {option.name: option for option in options}
        self._given: dict[str, list[str]] = {}

    def add(self, option: Option, value: str) -> None:
        """`option` was given with `value` (a flag: with any)."""
        self._given.setdefault(option.name, []).append(value)

    def given(self, name: str) -> bool:
        """Whether the option was given at all; the value of a flag."""
        return name in self._given

    def value(self, name: str) -> str:
        """The last value given, or the default."""
        return self._given[name][-1] if name in self._given else self._options[name].default

    def everything(self) -> list[tuple[str, str]]:
        """Each option with each value given for it."""
        return [(name, value) for name, values in self._given.items() for value in values]

    def values(self, name: str) -> list[str]:
        """Every value given, in order."""
        return self._given.get(name, [])


class Parser:
    """The options and operands of one command.

    Args:
        command: `vmm run`.
        summary: one sentence, for the help.
        options: besides --help, which each command has.
        operand: what its one operand is called, which must be given; empty for none.
        instead: an option with which there is no operand.
        after: what follows the options, for the help.
        epilog: the end of the help.
    """

    def __init__(
        self,
        command: str,
        summary: str,
        options: Sequence[Option],
        *,
        operand: str = "",
        instead: str = "",
        after: str = "",
        epilog: str = "",
    ) -> None:
        self.command = command
        self.summary = summary
        self.options = (*options, Option("-h", HELP, help="this help"))
        self.operand = operand
        self.instead = instead
        self.after = after
        self.epilog = epilog

    def parse(self, argv: Sequence[str], after: Sequence[str] = ()) -> Arguments:
        """The arguments; UsageError says what is wrong. With --help, nothing is missed.

        `after` is what followed `--` and is not in `argv`; a complaint may name it.
        """
        found = Arguments(self.options)
        by_name = {name: option for option in self.options for name in option.names}
        rest = list(argv)
        before: list[str] = []  # the word before each operand
        while rest:
            word = rest.pop(0)
            if word == "--":
                found.operands += rest
                break
            if len(word) < 2 or word[0] != "-":
                found.operands.append(word)
                before.append(argv[-len(rest) - 2] if len(rest) + 1 < len(argv) else "")
                continue
            name, has_value, value = word.partition("=")
            option = by_name.get(name)
            if option is None:
                raise self._wrong(self._unknown(argv, word, name, by_name, after))
            if not option.metavar:
                if has_value:
                    raise self._wrong(f"{name} takes no value, not even {value!r}")
            elif not has_value and not option.optional:
                # A value may begin with a dash (--append -x), but be no option's name.
                if not rest or rest[0].partition("=")[0] in by_name:
                    raise self._wrong(f"{name} needs a value, {name} {option.metavar}")
                value = rest.pop(0)
            found.add(option, value)
        if not found.given(HELP):
            without = bool(self.instead) and found.given(self.instead)
            operand = "" if without else self.operand
            if operand and len(found.operands) > 1:
                from vmm.cli.foreign import surplus

                pairs = list(zip(found.operands, [*before, *found.operands], strict=False))
                hint = surplus(self.command, operand, pairs, by_name)
                if hint:
                    raise self._wrong(hint)
            self._check_operands(found.operands, operand)
        return found

    @property
    def usage(self) -> str:
        """The command line in one line."""
        return " ".join(filter(None, (self.command, self.operand, "[option ...]", self.after)))

    def help_text(self) -> str:
        """What --help prints, as wide as the terminal."""
        from textwrap import wrap

        from vmm.cli.width import columns, fit

        width = columns()
        indent = min(INDENT, width // 3)
        lines = [fit(f"usage: {self.usage}", width), "", *wrap(self.summary, width), "", "options:"]
        for option in self.options:
            left = "  " + ", ".join(option.names) + self.metavar(option)
            if len(left) > indent - 2:
                lines.append(fit(left, width))
                left = ""
            for text in wrap(option.help, width - indent, break_on_hyphens=False):
                lines.append(f"{left:{indent}}{text}")
                left = ""
        epilog = f"\n{fit(self.epilog, width)}" if self.epilog else ""
        return "\n".join(lines) + "\n" + epilog

    @staticmethod
    def metavar(option: Option) -> str:
        """What stands after the option's name in help: its value's name, if it takes one."""
        if option.optional:
            return f"[={option.metavar}]"
        return f" {option.metavar}" if option.metavar else ""

    def _check_operands(self, operands: list[str], operand: str) -> None:
        if not operand:
            if operands:
                raise self._wrong(f"{operands[0]!r} is one argument too many")
        elif not operands:
            raise self._wrong(f"no {operand} given")
        elif not operands[0] and operand != "KERNEL":
            raise self._wrong(f"{operand} is an empty name")
        elif len(operands) > 1:
            raise self._wrong(
                f"only one {operand} can be given, not {operands[0]!r} and {operands[1]!r}"
            )

    def _unknown(
        self,
        argv: Sequence[str],
        word: str,
        name: str,
        known: dict[str, Option],
        after: Sequence[str],
    ) -> str:
        from vmm.cli.foreign import complaint

        hint = complaint(self.command, argv, name, known, after)
        if hint:
            return hint
        if len(word) > 2 and word[1] != "-" and word[:2] in known:
            return f"{word!r}: write short options one by one, a value after a space"
        return f"{name!r} is no option"

    def _wrong(self, what: str) -> UsageError:
        return UsageError(f"{what} (see {self.command} --help)")


class Spelled:
    """A context in which a UsageError about a value that another program spells so, as in
    `--drive file=disk.img,if=virtio`, is replaced by one that says our words for it."""

    __slots__ = ("_args",)

    def __init__(self, args: Arguments) -> None:
        self._args = args

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, err: BaseException | None, trace: object) -> None:
        if isinstance(err, UsageError):
            from vmm.cli.foreign import spelling

            hint = spelling(self._args)
            if hint:
                raise UsageError(hint) from None
