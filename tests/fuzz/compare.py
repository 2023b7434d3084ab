"""Which engine finds planted bugs, and how soon: ours, Atheris, Hypothesis (not in the dev extra).

    python -m tests.fuzz.compare [SECONDS]         processor seconds that each has for a bug

All three begin with the same seeds. docs/fuzzing.md has the figures.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz import parsers, targets
from tests.fuzz.engine import kept
from tests.fuzz.planted_parsers import PLANTED
from tests.fuzz.source import NUMBERS

ENGINES = ("ours", "atheris", "hypothesis")


def by_hypothesis(name: str) -> None:
    """Search until a bug is found, which ends the process."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    target = targets.find(name)
    run = target.start()
    corpus = kept(target)
    numbers = st.builds(
        lambda number, size, order: (number & (1 << 8 * size) - 1).to_bytes(size, order),
        st.sampled_from(NUMBERS),
        st.sampled_from((1, 2, 4, 8)),
        st.sampled_from(("little", "big")),
    )
    piece = st.one_of(st.binary(max_size=16), numbers)
    edit = st.tuples(st.integers(0, 1 << 16), st.integers(0, 64), piece)

    @settings(max_examples=1 << 30, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.one_of(st.binary(max_size=1000), st.sampled_from(corpus)), st.lists(edit, max_size=9))
    def search(data: bytes, edits: list[tuple[int, int, bytes]]) -> None:
        for at, removed, put in edits:
            at %= len(data) + 1
            data = data[:at] + put + data[at + removed :]
        run(data)

    search()


def words(engine: str, target: str, seed: int, directory: Path) -> list[str]:
    """The command of a search."""
    python = [sys.executable, "-m"]
    if engine == "ours":
        return [*python, "tests.fuzz.engine", target, f"--seed={seed}", "--seconds=3600"]
    if engine == "hypothesis":
        return [*python, "tests.fuzz.compare", "--hypothesis", target]
    for number, data in enumerate(kept(targets.find(target))):
        (directory / str(number)).write_bytes(data)
    return [*python, "tests.fuzz.guided", target, f"-seed={seed}", "-max_len=4096", str(directory)]


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--hypothesis"]:
        by_hypothesis(arguments[1])
        return
    limit = int(arguments[0]) if arguments else 20

    def confine() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))

    found: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch, "root")
        parsers.copy(root)
        for number, bug in enumerate(PLANTED):
            path = root / bug.file
            before = path.read_text()
            path.write_text(bug.apply(before))
            line = f"{bug.name:36}"
            for engine in ENGINES:
                directory = Path(scratch, f"{engine}-{number}")
                directory.mkdir()
                begun = resource.getrusage(resource.RUSAGE_CHILDREN)
                done = subprocess.run(
                    words(engine, bug.by[0], 1, directory), cwd=root, preexec_fn=confine,
                    stdin=subprocess.DEVNULL, capture_output=True, check=False,
                )  # fmt: skip
                ended = resource.getrusage(resource.RUSAGE_CHILDREN)
                took = ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime
                if done.returncode > 0:
                    found[engine].append(took)
                line += f" {took:7.1f}" if done.returncode > 0 else "      --"
            path.write_text(before)
            print(line, flush=True)
    for engine, times in found.items():
        middle = sorted(times)[len(times) // 2] if times else 0.0
        print(f"{engine}: {len(times)} of {len(PLANTED)}, median {middle:.1f} s of processor time")


if __name__ == "__main__":
    main(sys.argv[1:])
