"""The C path of virtqueues (vmm/virtio/kernel) under sanitizers: built, replayed, searched.

The programs are in native/: `rings` breaks rules, `frames` and `requests` keep them and look at
what becomes of the data. With clang they are libFuzzer's; with gcc a generator of our own feeds
them, the same for a seed each time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.fuzz.planted import Planted

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNEL = ROOT / "vmm" / "virtio" / "kernel"
HARNESS = HERE / "native"
CORPUS = HERE / "corpus"
SOURCES = ("ring", "disk", "net")
TARGETS = ("rings", "frames", "requests")
RENAMED = ("readv", "writev", "preadv2", "pwritev")
"""System calls of the sources that the harness has functions of its own for (world.c)."""
BETWEEN = "-fsanitize-coverage=trace-pc"
"""Every branch of the sources calls the harness, which may then change what they read next."""
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
OPTIONS = {"ASAN_OPTIONS": "handle_abort=1:detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
FOUND = "FINDING", "ERROR: AddressSanitizer", "runtime error:", "ERROR: libFuzzer"
"""What a program says of a finding, at the start of what it says."""


class BuildError(Exception):
    """The compiler refused; its words."""


def _compile(words: list[str]) -> None:
    made = subprocess.run(words, capture_output=True, text=True, check=False)
    if made.returncode:
        raise BuildError(made.stderr)


def flags(kernel: Path) -> list[str]:
    return ["-g", "-std=gnu11", "-pthread", f"-I{kernel}", f"-I{HARNESS}"]


def objects(directory: Path, kernel: Path = KERNEL, names: tuple[str, ...] = SOURCES) -> None:
    """Compile `names` of the sources in `kernel` with gcc and sanitizers to `directory`."""
    renamed = [f"-D{call}=world_{call}" for call in RENAMED]
    for name in names:
        source, target = kernel / f"{name}.c", directory / f"{name}.o"
        more = ["-O1", *SANITIZERS, BETWEEN, *renamed, "-c", "-o", str(target), str(source)]
        _compile(["gcc", *flags(kernel), *more])


def harness(directory: Path) -> None:
    """Compile the harness itself, which needs no sanitizer, with gcc to `directory`."""
    for name in ("world", "main", *TARGETS):
        source, target = HARNESS / f"{name}.c", directory / f"{name}.o"
        _compile(["gcc", *flags(KERNEL), "-O2", "-c", "-o", str(target), str(source)])


def link(target: str, directory: Path, kernel: Path | None = None) -> Path:
    """Make the program of `target` of the objects in `directory`; those of the sources that
    `kernel` has are taken from there."""
    program = (kernel or directory) / f"fuzz-{target}"
    parts = [directory / f"{name}.o" for name in ("world", "main", target)]
    for name in SOURCES:
        own = (kernel or directory) / f"{name}.o"
        parts.append(own if own.exists() else directory / f"{name}.o")
    _compile(["gcc", "-pthread", *SANITIZERS, "-o", str(program), *map(str, parts)])
    return program


def libfuzzer(target: str, directory: Path, coverage: bool = False) -> Path:
    """Make the program of `target` with clang and libFuzzer; `coverage`: for llvm-cov, and without
    the sanitizers, which would slow it down."""
    program = directory / (f"cov-{target}" if coverage else f"fuzz-{target}")
    renamed = [f"-D{call}=world_{call}" for call in RENAMED]
    kinds = ["-fsanitize=fuzzer"]
    if coverage:
        between = ["-fprofile-instr-generate", "-fcoverage-mapping"]
    else:
        kinds += SANITIZERS
        between = ["-fsanitize-coverage=trace-loads"]
    common = ["clang", *flags(KERNEL), "-O2", *kinds]
    parts = []
    for name in SOURCES:
        parts.append(directory / f"{program.name}-{name}.o")
        source = str(KERNEL / f"{name}.c")
        _compile([*common, *renamed, *between, "-c", "-o", str(parts[-1]), source])
    parts += [HARNESS / "world.c", HARNESS / f"{target}.c"]
    more = between[:1] if coverage else []
    _compile([*common, *more, "-o", str(program), *map(str, parts)])
    return program


def build_with(bug: Planted, directory: Path) -> None:
    """Compile the source that `bug` changes, with the bug, to `directory`; see `link`."""
    for path in KERNEL.glob("*.[ch]"):
        shutil.copy(path, directory)
    source = directory / bug.file
    source.write_text(bug.apply(source.read_text()))
    objects(directory, directory, (source.stem,))


def seeds(target: str) -> list[str]:
    """Directories with inputs of `target` that are kept."""
    directory = CORPUS / target
    return [str(directory)] if directory.is_dir() else []


def run(
    program: Path,
    target: str,
    *,
    runs: int,
    seconds: float,
    seed: int = 1,
    keep: Path | None = None,
) -> tuple[int, str]:
    """Replay and generate; the exit status (0: nothing was found) and what was said.

    `keep`: where the last input, that of a finding, is written to.
    """
    environment = {**os.environ, **OPTIONS}
    if keep is not None:
        environment["FUZZ_FINDING"] = str(keep)
    words = [str(program), f"-seed={seed}", f"-runs={runs}", f"-seconds={int(seconds)}"]
    try:
        done = subprocess.run(
            [*words, *seeds(target)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds + 20,
        )
    except subprocess.TimeoutExpired as err:
        said = err.stderr or b""
        return 124, "FINDING: an input without an end\n" + said.decode(errors="replace")[-2000:]
    if keep is not None:
        size, data = keep.read_bytes()[:4], keep.read_bytes()[4:]
        keep.write_bytes(data[: int.from_bytes(size, "little")])
    return done.returncode, done.stderr + done.stdout
