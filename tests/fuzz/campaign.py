"""What `make fuzz` does with a target: search, plant bugs, measure coverage."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tests.fuzz import native, parsers, planted_native, planted_parsers, targets
from tests.fuzz.engine import kept

INPUT_MAX = 4096
"""Bytes of an input: more make it slower and find no more."""
INPUT_SECONDS = 20
"""An input that takes longer is a finding."""
MEMORY = 2000
"""MiB for a target's process."""
TO_FIND = {"rings": 2_000_000, "frames": 100_000, "requests": 200_000}
"""Inputs within which a planted bug must be found; of parsers TO_FIND_PARSERS."""
TO_FIND_PARSERS = 200_000
FOUND = (*native.FOUND, "Uncaught Python exception")


def names() -> list[str]:
    """All targets: of the C path, then of the parsers."""
    return [*native.TARGETS, *targets.names()]


def say(text: str) -> None:
    print(f"fuzz: {text}", flush=True)


def search(wanted: list[str], seconds: float, corpus: Path) -> int:
    """Give each target its share of the time; 1 if there are findings."""
    findings = 0
    for target in wanted:
        directory = corpus / target
        directory.mkdir(parents=True, exist_ok=True)
        before = set(corpus.glob(f"{target}-finding-*"))
        share = max(int(seconds / len(wanted)), 1)
        say(f"{target} for {share} s; corpus {directory}")
        options = [
            f"-max_len={INPUT_MAX}", f"-max_total_time={share}", f"-timeout={INPUT_SECONDS}",
            f"-rss_limit_mb={MEMORY}", "-print_final_stats=1",
            f"-artifact_prefix={corpus}/{target}-finding-",
        ]  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            if target in native.TARGETS:
                program = native.libfuzzer(target, Path(scratch))
                words = [str(program), *options, str(directory), *native.seeds(target)]
                _watch(words, {"FUZZ_THREAD": "1", **native.OPTIONS})
            else:
                for number, data in enumerate(kept(targets.find(target))):
                    Path(scratch, str(number)).write_bytes(data)
                words = [sys.executable, "-m", "tests.fuzz.guided", target, *options]
                _watch([*words, str(directory), scratch], {})
        new = sorted(set(corpus.glob(f"{target}-finding-*")) - before)
        findings += len(new)
        for path in new:
            say(f"{target}: FINDING, its input is {path}")
    say(f"{findings} findings")
    return 1 if findings else 0


def _watch(words: list[str], more: dict[str, str]) -> None:
    """Run a libFuzzer program; of what it says only findings and the sum are shown."""
    process = subprocess.Popen(
        words, cwd=Path.cwd(), env={**os.environ, **more}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    last, quiet = "", True
    assert process.stdout is not None
    with process, process.stdout:
        for line in process.stdout:
            quiet = quiet and not any(word in line for word in FOUND)
            if not quiet or line.startswith("stat::"):
                print(line, end="", flush=True)
            elif re.match(r"#\d+\s", line):
                last = line
    if last:
        say(last.strip())


def planted(wanted: list[str]) -> int:
    """Plant every bug of the tables that one of `wanted` is to find; 1 if one was not found."""
    missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for line, found in (*_planted_native(wanted, Path(scratch, "native")),
                            *_planted_parsers(wanted, Path(scratch, "parsers"))):  # fmt: skip
            missed += not found
            say(f"{line} {'found it' if found else 'MISSED it'}")
    say(f"{missed} planted bugs were missed")
    return 1 if missed else 0


def _planted_native(wanted: list[str], base: Path) -> Iterable[tuple[str, bool]]:
    base.mkdir()
    if not set(wanted) & set(native.TARGETS):
        return
    native.objects(base)
    native.harness(base)
    for number, bug in enumerate(planted_native.PLANTED):
        directory = base / str(number)
        directory.mkdir()
        if set(bug.by) & set(wanted):
            native.build_with(bug, directory)
        for target in [name for name in bug.by if name in wanted]:
            program = native.link(target, base, directory)
            begun = time.monotonic()
            status, _ = native.run(program, target, runs=TO_FIND[target], seconds=300)
            yield f"{bug}, {time.monotonic() - begun:.1f} s: {target}", status != 0


def _planted_parsers(wanted: list[str], base: Path) -> Iterable[tuple[str, bool]]:
    parsers.copy(base)
    for bug in planted_parsers.PLANTED:
        for target in [name for name in bug.by if name in wanted]:
            begun = time.monotonic()
            status, _ = parsers.run_with(bug, target, base, runs=TO_FIND_PARSERS, seconds=300.0)
            yield f"{bug}, {time.monotonic() - begun:.1f} s: {target}", status != 0


def coverage(wanted: list[str], corpus: Path) -> None:
    """Print how much of the C path the inputs in `corpus` reach, by llvm-cov."""
    with tempfile.TemporaryDirectory() as scratch:
        programs, profiles = [], []
        for target in [name for name in wanted if name in native.TARGETS]:
            program = native.libfuzzer(target, Path(scratch), coverage=True)
            profile = Path(scratch, f"{target}.profraw")
            subprocess.run(
                [str(program), "-runs=0", str(corpus / target), *native.seeds(target)],
                env={**os.environ, "LLVM_PROFILE_FILE": str(profile)},
                stderr=subprocess.DEVNULL, check=True,
            )  # fmt: skip
            programs.append(program)
            profiles.append(profile)
        if not programs:
            return
        merged = str(Path(scratch, "all.profdata"))
        subprocess.run(["llvm-profdata", "merge", "-o", merged, *map(str, profiles)], check=True)
        objects = [word for program in programs[1:] for word in ("-object", str(program))]
        sources = [str(native.KERNEL / f"{name}.c") for name in native.SOURCES]
        report = ["llvm-cov", "report", str(programs[0]), *objects, f"-instr-profile={merged}"]
        subprocess.run([*report, *sources], check=True)
