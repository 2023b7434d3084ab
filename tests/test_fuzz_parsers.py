"""The parsers written in Python, and devices, on inputs made from a seed; planted bugs are found.

`make fuzz` searches for hours, guided by coverage; see tests/fuzz.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz import parsers, targets
from tests.fuzz.engine import Generator, kept
from tests.fuzz.planted import Planted
from tests.fuzz.planted_parsers import PLANTED
from tests.fuzz.source import Chance, Source

RUNS = {"virtio": 150, "snapshot": 300, "agent-tree": 300, "fault": 60, "state": 300, "stream": 300}
"""Inputs that are made of a target, by the beginning of its name; of others USUAL."""
USUAL = 1500
SECONDS = 120.0
TO_FIND = 40_000
"""Inputs within which a planted bug must be found; most are within the first hundred."""
QUICK = (
    "elf: note's length", "uki: section table", "image: header cut short", "wire: window",
    "tree: name with a slash", "nbd: error number", "stream: frame's length", "pci: wide reads",
)  # fmt: skip
CHOSEN = [
    bug for bug in PLANTED if bug.name in QUICK or os.environ.get("VMM_FUZZ_PLANTED") == "all"
]


def groups() -> dict[tuple[str, int], list[str]]:
    """Targets that a process runs one after the other: by module and how many inputs each has."""
    found: dict[tuple[str, int], list[str]] = {}
    for target in targets.every():
        if target.name == "control":
            continue
        module = target.start.__module__.rpartition(".")[2]
        runs = next((n for begin, n in RUNS.items() if target.name.startswith(begin)), USUAL)
        found.setdefault((module, runs), []).append(target.name)
    return found


@pytest.mark.parametrize(("of", "names"), groups().items(), ids=lambda item: str(item[0]))
def test_a_seeded_run_finds_nothing(of: tuple[str, int], names: list[str], tmp_path: Path) -> None:
    keep = tmp_path / "finding"
    status, said = parsers.run(",".join(names), runs=of[1], seconds=SECONDS, keep=keep)
    assert status == 0, said + (keep.read_bytes().hex() if keep.exists() else "")
    assert [line.split(":")[0] for line in said.splitlines()] == names


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_a_seeded_run_of_control_requests() -> None:
    status, said = parsers.run("control", runs=200, seconds=SECONDS)
    assert status == 0, said


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sources")
    parsers.copy(directory)
    return directory


@pytest.mark.parametrize("bug", CHOSEN, ids=str)
def test_a_planted_bug_is_found(bug: Planted, sources: Path, tmp_path: Path) -> None:
    for target in bug.by:
        keep = tmp_path / target
        status, said = parsers.run_with(
            bug, target, sources, runs=TO_FIND, seconds=SECONDS, keep=keep
        )
        assert status == 1 and f"FINDING {target}: " in said, said
        assert keep.exists(), "the input is kept"


def test_a_bug_that_does_not_fit_any_more_is_told(sources: Path) -> None:
    bug = Planted("x", "vmm/units.py", (("no such line", ""),), ("sizes",))
    with pytest.raises(AssertionError, match=r"x: 0 of 'no such line' in vmm/units\.py"):
        parsers.run_with(bug, "sizes", sources, runs=1, seconds=1.0)


def test_all_planted_bugs_fit() -> None:
    """Also those that only `make fuzz` plants."""
    for bug in PLANTED:
        assert bug.apply((parsers.ROOT / bug.file).read_text())
        assert set(bug.by) <= set(targets.names())
    assert set(QUICK) <= {bug.name for bug in PLANTED}


def test_inputs_are_the_same_for_a_seed() -> None:
    corpus = kept(targets.find("image"))
    assert len(corpus) > 5
    generators = [Generator(corpus, seed) for seed in (3, 3, 4)]
    made = [[generator.make() for _ in range(100)] for generator in generators]
    assert made[0] == made[1] != made[2]


def test_a_source_says_what_its_bytes_say() -> None:
    tree = {"a": [1, {"b": "c"}], "d": b"x"}
    data = bytes(range(7, 60))
    assert Source(data).edited(tree) == Source(data).edited(tree) != tree
    assert tree == {"a": [1, {"b": "c"}], "d": b"x"}, "a copy is edited"
    assert Source(b"").integer() == 0 and Source(b"").take(4) == b""
    first = [Chance(b"abc").randrange(1000) for _ in range(2)]
    assert first[0] == first[1]
    assert Chance(b"ab").random() != Chance(b"ac").random()
