"""What `make bench` shows and keeps: progress, one table, JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.series import Series

RESULTS = Path(__file__).with_name("results")


def show_progress(text: str) -> None:
    """One line on a terminal's standard error, written over by the next; "" clears it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def table(rows: list[Series]) -> str:
    """The series as text: median, quartiles, count, and the ratio to the reference."""
    references = {row.comparison: row for row in rows if row.reference}
    width = max(len(row.contender) for row in rows) + 2
    lines = []
    comparison = ""
    for row in rows:
        if row.comparison != comparison:
            comparison = row.comparison
            lines += ["", f"({row.row}) {comparison}, {row.unit}"]
            lines.append(f"    {'':{width}}{'median':>9}{'quartiles':>17}{'n':>5}{'ratio':>9}")
        low, high = row.quartiles
        spread = f"{figure(low)} .. {figure(high)}"
        ratio = "1" if row.reference else ""
        if not row.reference and comparison in references:
            ratio = f"{row.ratio(references[comparison]):.2f}"
        lines.append(
            f"    {row.contender:{width}}{figure(row.median):>9}{spread:>17}"
            f"{len(row.samples):>5}{ratio:>9}{'  ' + row.note if row.note else ''}"
        )
    return "\n".join(lines[1:])


def figure(value: float) -> str:
    """Three significant digits or so, no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def host_facts() -> dict[str, object]:
    """What the figures depend on."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    modules = [name for name in os.listdir("/sys/module") if name.startswith("kvm_")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _first_line(["git", "describe", "--always", "--dirty"]),
        "cpu": model,
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "kernel": platform.release(),
        "kvm": ", ".join(sorted(modules)) or "none",
        "python": platform.python_version(),
        "qemu": _first_line(["qemu-system-x86_64", "--version"]),
    }


def save(facts: dict[str, object], rows: list[Series]) -> Path:
    """Write everything, each sample too, to benchmarks/results/; the file's path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{str(facts['date'])[:19].replace(':', '')}.json"
    series = [
        {
            "row": row.row,
            "comparison": row.comparison,
            "contender": row.contender,
            "unit": row.unit,
            "reference": row.reference,
            "note": row.note,
            "median": row.median,
            "quartiles": row.quartiles,
            "samples": row.samples,
        }
        for row in rows
    ]
    path.write_text(json.dumps({"host": facts, "series": series}, indent=1) + "\n")
    return path


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, cwd=RESULTS.parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return (done.stdout.splitlines() or [""])[0]
