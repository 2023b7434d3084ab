"""vmm.cli.arguments: what a table of options understands, and what it says of the rest."""

from __future__ import annotations

import pytest

from vmm import UsageError
from vmm.cli.arguments import Option, Parser
from vmm.cli.say import LONGEST, say
from vmm.cli.width import USUAL as WIDTH

PARSER = Parser(
    "vmm test",
    "Do nothing.",
    (
        Option("--file", metavar="PATH", repeat=True, help="a file " + "of many words " * 10),
        Option("-s", "--size", metavar="N", default="1", help="a size"),
        Option("--a-very-long-option-name", metavar="VALUE", help="long"),
        Option("--maybe", metavar="WHAT", optional=True, help="may have a value"),
        Option("-v", "--verbose", help="a flag"),
    ),
    operand="THING",
    epilog="the end\n",
)


@pytest.mark.parametrize(
    ("line", "operands", "size", "files", "verbose"),
    [
        ("x", ["x"], "1", [], False),
        ("x -v", ["x"], "1", [], True),
        ("-v -v x", ["x"], "1", [], True),
        ("--size 2 x", ["x"], "2", [], False),
        ("--size=2 x --size=3", ["x"], "3", [], False),
        ("-s 2 x", ["x"], "2", [], False),
        ("-s=2 x", ["x"], "2", [], False),
        ("--size -2 x", ["x"], "-2", [], False),
        ("--size= x", ["x"], "", [], False),
        ("--size=a=b x", ["x"], "a=b", [], False),
        ("--file a --file b x", ["x"], "1", ["a", "b"], False),
        ("--file - x", ["x"], "1", ["-"], False),
        ("-", ["-"], "1", [], False),
        ("-- -v", ["-v"], "1", [], False),
        ("-v -- --", ["--"], "1", [], True),
    ],
)
def test_understood(
    line: str, operands: list[str], size: str, files: list[str], verbose: bool
) -> None:
    found = PARSER.parse(line.split())
    assert found.operands == operands
    assert found.value("--size") == size
    assert found.values("--file") == files
    assert found.given("--verbose") is verbose


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "no THING given"),
        ("x y", "only one THING can be given, not 'x' and 'y'"),
        ("x --sise 1", "'--sise' is no option; --size is one"),
        ("x --sise=1", "'--sise' is no option; --size is one"),
        ("x --zzz", "'--zzz' is no option"),
        ("x -s2", "'-s2': write short options one by one, a value after a space"),
        ("x --size", "--size needs a value, --size N"),
        ("x -s", "-s needs a value, -s N"),
        ("x --size -v", "--size needs a value, --size N"),
        ("x --size --file=y", "--size needs a value, --size N"),
        ("x -v=1", "-v takes no value, not even '1'"),
    ],
)
def test_not_understood(line: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        PARSER.parse(line.split())
    assert str(caught.value) == f"{says} (see vmm test --help)"


@pytest.mark.parametrize("line", ["--help", "-h", "x y --help", "-v -h"])
def test_help_needs_no_operand(line: str) -> None:
    assert PARSER.parse(line.split()).given("--help")


def test_the_help_is_a_table_that_fits() -> None:
    lines = PARSER.help_text().splitlines()
    assert lines[:5] == ["usage: vmm test THING [option ...]", "", "Do nothing.", "", "options:"]
    assert "  -s, --size N          a size" in lines
    assert lines[lines.index("  --a-very-long-option-name VALUE") + 1] == " " * 24 + "long"
    assert lines[-2:] == ["", "the end"]
    assert max(map(len, lines)) <= WIDTH


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("plain", "vmm: plain\n"),
        ("two\nlines\r", "vmm: two\\nlines\\r\n"),
        ("\x1b[31mred", "vmm: \\x1b[31mred\n"),
        ("name \udcff", "vmm: name \\udcff\n"),
        ("ä € 漢", "vmm: ä € 漢\n"),
    ],
)
def test_what_is_said_is_one_line(
    message: str, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    say(message)
    assert capfd.readouterr() == ("", line)


def test_a_long_line_loses_its_middle(capfd: pytest.CaptureFixture[str]) -> None:
    say("a" * 5000 + "z" * 5000)
    err = capfd.readouterr().err
    assert err.startswith("vmm: aaa") and err.endswith("zzz\n") and "a ... z" in err
    assert len(err) < LONGEST + 20


@pytest.mark.parametrize(("line", "given", "value"), [
    ("x", False, ""), ("--maybe x", True, ""), ("--maybe=a x", True, "a"),
    ("--maybe=a=b x", True, "a=b"), ("--maybe=a --maybe x", True, ""),
])  # fmt: skip
def test_a_value_that_may_be_left_out(line: str, given: bool, value: str) -> None:
    found = PARSER.parse(line.split())
    assert found.operands == ["x"]
    assert found.given("--maybe") is given
    assert found.value("--maybe") == value
