"""What `make fuzz` does with a target: search, plant bugs, measure coverage."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

from tests.fuzz import native
from tests.fuzz.planted_native import PLANTED

INPUT_MAX = 1500
"""Bytes of an input: more make it slower and find no more."""
INPUT_SECONDS = 20
"""An input that takes longer is a finding."""
MEMORY = 2000
"""MiB for a target's process."""
TO_FIND = {"rings": 2_000_000, "frames": 100_000, "requests": 200_000}
"""Inputs within which a planted bug must be found."""


def names() -> list[str]:
    return list(native.TARGETS)


def say(text: str) -> None:
    print(f"fuzz: {text}", flush=True)


def search(targets: list[str], seconds: float, corpus: Path) -> int:
    """Give each target its share of the time; 1 if there are findings."""
    findings = 0
    for target in targets:
        directory = corpus / target
        directory.mkdir(parents=True, exist_ok=True)
        before = set(directory.parent.glob(f"{target}-finding-*"))
        share = max(int(seconds / len(targets)), 1)
        say(f"{target} for {share} s; corpus {directory}")
        _libfuzzer(target, share, directory)
        new = sorted(set(directory.parent.glob(f"{target}-finding-*")) - before)
        findings += len(new)
        for path in new:
            say(f"{target}: FINDING, its input is {path}")
    say(f"{findings} findings")
    return 1 if findings else 0


def _libfuzzer(target: str, seconds: int, directory: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        program = native.libfuzzer(target, Path(scratch))
        words = [
            str(program), f"-max_len={INPUT_MAX}", f"-max_total_time={seconds}",
            f"-timeout={INPUT_SECONDS}", f"-rss_limit_mb={MEMORY}", "-print_final_stats=1",
            f"-artifact_prefix={directory.parent}/{target}-finding-",
            str(directory), *native.seeds(target),
        ]  # fmt: skip
        _watch(words, {"FUZZ_THREAD": "1", **native.OPTIONS})


def _watch(words: list[str], more: dict[str, str]) -> None:
    """Run a libFuzzer program; of what it says only findings and the sum are shown."""
    process = subprocess.Popen(
        words, env={**os.environ, **more}, stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, errors="replace",
    )  # fmt: skip
    last, quiet = "", True
    assert process.stderr is not None
    with process, process.stderr:
        for line in process.stderr:
            quiet = quiet and not any(word in line for word in native.FOUND)
            if not quiet or line.startswith("stat::"):
                print(line, end="", flush=True)
            elif re.match(r"#\d+\s", line):
                last = line
    if last:
        say(last.strip())


def planted(targets: list[str]) -> int:
    """Plant every bug of the table that one of `targets` is to find; 1 if one was not found."""
    missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        native.objects(base)
        native.harness(base)
        for number, bug in enumerate(PLANTED):
            wanted = [target for target in bug.by if target in targets]
            directory = base / str(number)
            directory.mkdir()
            if wanted:
                native.build_with(bug, directory)
            for target in wanted:
                program = native.link(target, base, directory)
                begun = time.monotonic()
                status, _ = native.run(program, target, runs=TO_FIND[target], seconds=300)
                took = time.monotonic() - begun
                say(f"{bug}: {target} {'found it' if status else 'MISSED it'}, {took:.1f} s")
                missed += not status
    say(f"{missed} planted bugs were missed")
    return 1 if missed else 0


def coverage(targets: list[str], corpus: Path) -> None:
    """Print how much of the C path the inputs in `corpus` reach, by llvm-cov."""
    with tempfile.TemporaryDirectory() as scratch:
        programs, profiles = [], []
        for target in targets:
            if target not in native.TARGETS:
                continue
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
