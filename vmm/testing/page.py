"""A page about a failing test: its machines' consoles, events, faults, calls and registers on one
time axis. One file that needs no other, of bounded size, in which what a guest wrote is text."""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
import platform
import re
import time
from html import escape

from vmm.testing.look import one_line, printable
from vmm.testing.page_style import SCRIPT, STYLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

    from vmm.events import Event
    from vmm.testing.look import Look

    Phases = list[tuple[str, float, float]]

ROWS_MAX, ROWS_FIRST = 6000, 1000
"""Rows of the log; where there are more, so many of the first are shown, and the last."""
TEXT_MAX = 1 << 20
"""Characters in all rows."""
LINE_MAX = 2000
BLOCK_MAX = 100_000
"""Characters of the traceback, of a machine's registers."""
COLUMNS = 160
"""The axis is drawn in so many parts where every line is not to be told from the next."""
MARKS_MAX = 300
"""Marks in one lane."""
INIT = re.compile(r"Run (\S+) as init process")

KINDS = (
    ("console", "console"), ("call", "calls"), ("event", "events"), ("fault", "faults"),
    ("error", "errors"), ("test", "test"),
)  # fmt: skip
STEPS = ("asked", "built", "started", "first byte", "init", "agent")
STEP_TITLES = {
    "built": "from the test's call to a machine that is built: files read, devices opened",
    "started": "until its vCPUs ran",
    "first byte": "until the first byte on the console",
    "init": "until the kernel started its init",
    "agent": "until the agent in the guest answered",
}


class Row:
    """One row of the log."""

    __slots__ = ("detail", "end", "failed", "kind", "machine", "text", "time")

    def __init__(
        self, time: float, machine: int, kind: str, text: str, detail: str = "",
        end: float | None = None, failed: bool = False,
    ) -> None:  # fmt: skip
        self.time = time
        self.machine = machine
        self.kind = kind
        self.text = text
        self.detail = detail
        self.end = end
        self.failed = failed


def render(
    item: pytest.Item,
    report: pytest.TestReport,
    looks: list[Look],
    phases: Phases,
    left_out: int = 0,
) -> str:
    """The page of `item`, whose `report` failed while its machines were as `looks` say."""
    rows = [row for at, look in enumerate(looks) for row in _rows(at, look)]
    failed_at = next(
        (end for when, _, end in reversed(phases) if when == report.when), looks[0].time
    )
    rows += [Row(begun, -1, "test", f"{when} begins") for when, begun, _ in phases]
    rows.append(Row(failed_at, -1, "test", f"{report.when} fails", failed=True))
    rows.sort(key=lambda row: row.time)
    zero = min([begun for _, begun, _ in phases] or [rows[0].time])
    axis = Axis(zero, max([failed_at, *(look.time for look in looks)]))
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    name = _text(item.nodeid)
    parts = [
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>",
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        "<meta name='color-scheme' content='light dark'>",
        f"<title>{name} failed</title><style>{STYLE}</style></head><body>",
        _header(item, report, axis),
        _traceback(report),
        "<section class='cards'>",
        *(_card(at, look) for at, look in enumerate(looks)),
        f"<p>{left_out} more machines are not shown.</p>" if left_out else "",
        "</section>",
        _timeline(axis, looks, rows, phases, failed_at),
        _log(axis, looks, rows),
        _registers(looks),
        f"<footer>Written by vmm's pytest plugin. The files beside this page have the whole: "
        f"{', '.join(f'machine-{at}' for at in range(len(looks)))}.*</footer>",
        f"<script>{SCRIPT}</script></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _text(value: object, limit: int = LINE_MAX) -> str:
    """For HTML: printable, bounded, and without any meaning."""
    text = str(value)
    if len(text) > limit:
        text = f"{text[:limit]} [... {len(text) - limit} characters]"
    return escape(printable(text), quote=True)


class Axis:
    """Seconds from `zero` to `end`, as percents of the page's width."""

    def __init__(self, zero: float, end: float) -> None:
        self.zero = zero
        self.length = max((end - zero) * 1.01, 1e-3)

    def at(self, time: float) -> float:
        """Where `time` is, within the axis."""
        return round(min(max((time - self.zero) / self.length, 0.0), 1.0) * 100, 3)

    def style(self, begun: float, ended: float | None = None) -> str:
        left = self.at(begun)
        if ended is None:
            return f"left:{left}%"
        return f"left:{left}%;width:max({round(self.at(ended) - left, 3)}%,3px)"

    def told(self, time: float) -> str:
        return f"{round(time - self.zero, 3) + 0.0:+.3f}"

    def ticks(self) -> list[tuple[float, str]]:
        """(percent, label) of round times."""
        step = 10.0**-6
        for step in (a * 10.0**b for b in range(-6, 7) for a in (1, 2, 5)):
            if self.length / step <= 10:
                break
        count = int(self.length / step)
        return [(self.at(self.zero + n * step), seconds(n * step)) for n in range(count + 1)]


def seconds(value: float) -> str:
    """A length of time for a person."""
    if value == 0:
        return "0"
    if value < 0.001:
        return f"{value * 1e6:.0f} µs"
    if value < 1:
        return f"{value * 1e3:.4g} ms"
    return f"{value:.4g} s"


# --- rows -----------------------------------------------------------------------------------------


def _rows(at: int, look: Look) -> Iterable[Row]:
    recorder = look.recorder
    if recorder is not None:
        for when, line in recorder.lines():
            yield Row(when, at, "console", line)
        for call in recorder.calls:
            took = f"{seconds(call.ended - call.begun)}" if call.ended else "goes on"
            detail = f"{call.result or 'done'} ({took})\n{call.output}".rstrip()
            end = call.ended or look.time
            text = one_line(f"{call.what} {call.words}")
            yield Row(call.begun, at, "call", text, detail, end, call.failed)
    else:
        for line in look.console.splitlines():
            yield Row(look.time, at, "console", line)
    yield from _event_rows(at, look)


def _event_rows(at: int, look: Look) -> list[Row]:
    """The events; a pause lasts until the machine goes on, a fault until it is cleared."""
    rows: list[Row] = []
    open_rows: dict[str, Row] = {}
    for event in look.events:
        kind, failed = _kind(event)
        text = str(event).removeprefix("fault: ")
        row = Row(event.time, at, kind, text, failed=failed)
        rows.append(row)
        if kind == "fault":
            values = event.values()
            what, key = values.get("what"), f"{values.get('device')} {values.get('kind')}"
            begins, ends = what == "set", what == "cleared"
        else:
            key, begins = "", event.name == "paused"
            ends = event.name in ("resumed", "rolled back")
        if begins:
            row.end = look.time
            open_rows[key] = row
        elif ends and key in open_rows:
            open_rows.pop(key).end = event.time
        elif event.name == "stopped":
            for row in open_rows.values():
                row.end = event.time
            open_rows.clear()
    return rows


def _kind(event: Event) -> tuple[str, bool]:
    if event.name == "fault":
        return "fault", False
    if event.name in ("device error", "panicked"):
        return "error", True
    exit = getattr(event, "exit", None)
    return "event", exit is not None and not exit.ok


def _bounded(rows: list[Row]) -> tuple[list[Row], int, list[Row]]:
    """The first rows, how many are left out after them, and the last."""

    def cost(row: Row) -> int:
        return min(len(row.text), LINE_MAX) + min(len(row.detail), LINE_MAX) + 150

    if len(rows) <= ROWS_MAX and sum(map(cost, rows)) <= TEXT_MAX:
        return rows, 0, []
    first, spent = 0, 0
    while first < ROWS_FIRST and first < len(rows) and spent < TEXT_MAX // 4:
        spent += cost(rows[first])
        first += 1
    last, spent = len(rows), 0
    while last > first and len(rows) - last < ROWS_MAX - ROWS_FIRST and spent < TEXT_MAX * 3 // 4:
        last -= 1
        spent += cost(rows[last])
    return rows[:first], last - first, rows[last:]


# --- parts of the page ----------------------------------------------------------------------------


def _header(item: pytest.Item, report: pytest.TestReport, axis: Axis) -> str:
    import vmm
    from vmm.machine.failure import backend

    path, _, name = item.nodeid.rpartition("::")
    facts = [
        f"{_text(report.when)} failed after {seconds(report.duration)}",
        time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        f"vmm {vmm.__version__}",
        f"Linux {_text(os.uname().release)}, {backend() or 'no KVM'}",
        f"Python {platform.python_version()}",
    ]
    return (
        f"<header><p class='path'>{_text(path)}</p><h1><b>failed</b> {_text(name)}</h1>"
        f"<ul class='facts'>{''.join(f'<li>{fact}</li>' for fact in facts)}</ul></header>"
    )


def _traceback(report: pytest.TestReport) -> str:
    text = report.longreprtext
    if len(text) > BLOCK_MAX:
        text = f"[... {len(text) - BLOCK_MAX} characters]\n{text[-BLOCK_MAX:]}"
    lines = []
    for line in text.splitlines():
        kind = {"E": " class='e'", ">": " class='at'"}.get(line[:1], "")
        lines.append(f"<span{kind}>{_text(line)}</span>")
    return "<section><pre class='tb'>" + "\n".join(lines) + "</pre></section>"


def marks(look: Look) -> dict[str, float]:
    """When each step of its start was done, in their order, as far as they were."""
    found = dict(look.recorder.marks) if look.recorder else {}
    if look.machine.started_at:
        found["started"] = look.machine.started_at
    if look.recorder is not None:
        for when, line in look.recorder.lines():
            if INIT.search(line):
                found["init"] = when
                break
    return {step: found[step] for step in STEPS if step in found}


def _card(at: int, look: Look) -> str:
    config = look.machine.config
    facts = [
        os.path.basename(str(config.kernel or "no kernel")),
        f"{config.memory >> 20} MiB" if config.memory >= 1 << 20 else f"{config.memory} B",
        f"{config.cpus} vCPU{'s' * (config.cpus != 1)}",
        *(f"{len(config.drives)} disk{'s' * (len(config.drives) != 1)}" for _ in config.drives[:1]),
        *(f"{len(config.nets)} net{'s' * (len(config.nets) != 1)}" for _ in config.nets[:1]),
    ]
    if look.machine.restored:
        facts.insert(0, "restored from a snapshot")
    steps, before = "", None
    for name, when in sorted(marks(look).items(), key=lambda pair: pair[1]):
        if before is not None:
            steps += (
                f"<li title='{STEP_TITLES[name]}'><span>{name}</span>"
                f"<b>+{seconds(max(when - before, 0))}</b></li>"
            )
        before = when
    missing = [name for name in ("started", "first byte") if name not in marks(look)]
    steps += "".join(f"<li class='never'><span>{name}</span><b>never</b></li>" for name in missing)
    return (
        f"<article class='m{at % 6}'><h2><i></i>{_text(look.name)}</h2>"
        f"<p class='state'>{_text(look.state)}</p>"
        f"<ul class='facts'>{''.join(f'<li>{_text(fact)}</li>' for fact in facts)}</ul>"
        f"<ol class='steps'>{steps}</ol></article>"
    )


def _timeline(
    axis: Axis, looks: list[Look], rows: list[Row], phases: Phases, failed_at: float
) -> str:
    ticks = "".join(
        f"<span style='left:{at}%'>{label}</span>" for at, label in axis.ticks() if at < 97
    )
    lanes = [f"<div class='lane ticks'><b></b><div>{ticks}</div></div>"]
    bars = "".join(
        f"<span class='ph' style='{axis.style(begun, ended)}'"
        f" title='{_text(when)}: {seconds(ended - begun)}'>{_text(when)}</span>"
        for when, begun, ended in phases
    )
    lanes.append(f"<div class='lane'><b>test</b><div>{bars}</div></div>")
    for at, look in enumerate(looks):
        own = [row for row in rows if row.machine == at]
        lanes.append(f"<h3 class='m{at % 6}'><i></i>{_text(look.name)}</h3>")
        lanes.append(_boot_lane(axis, look))
        lanes.append(_density(axis, [row for row in own if row.kind == "console"]))
        for kind, title in KINDS[1:5]:
            chosen = [row for row in own if row.kind == kind]
            if chosen:
                drawn = "".join(_mark(axis, row) for row in chosen[-MARKS_MAX:])
                lanes.append(f"<div class='lane'><b>{title}</b><div>{drawn}</div></div>")
    line = (
        f"<div class='fail'><b></b><div><span style='{axis.style(failed_at)}'></span></div></div>"
    )
    return f"<section class='time'>{line}{''.join(lanes)}</section>"


def _boot_lane(axis: Axis, look: Look) -> str:
    found = sorted(marks(look).items(), key=lambda pair: pair[1])
    bars = ""
    for number, ((_, begun), (name, ended)) in enumerate(itertools.pairwise(found)):
        if ended >= axis.zero:
            bars += (
                f"<span class='st s{number}' style='{axis.style(begun, ended)}' title='"
                f"{name}: {seconds(ended - begun)}, {STEP_TITLES[name]}'>{name}</span>"
            )
    return f"<div class='lane'><b>start</b><div>{bars}</div></div>"


def _density(axis: Axis, rows: list[Row]) -> str:
    """How many lines were printed when."""
    counts = [0] * COLUMNS
    for row in rows:
        if row.time >= axis.zero:
            counts[min(int(axis.at(row.time) / 100 * COLUMNS), COLUMNS - 1)] += 1
    most = max(counts)
    width = 100 / COLUMNS
    bars = "".join(
        f"<span class='de' style='left:{round(at * width, 3)}%;width:{round(width, 3)}%;"
        f"height:{round(20 + 80 * (count / most) ** 0.5)}%' title='{count} lines'></span>"
        for at, count in enumerate(counts)
        if count
    )
    return f"<div class='lane'><b>console</b><div>{bars}</div></div>"


def _mark(axis: Axis, row: Row) -> str:
    bad = (" bad" if row.failed else "") + (" span" if row.end is not None else "")
    title = _text(f"{axis.told(row.time)} s  {row.text}  {row.detail}", 300)
    return (
        f"<a class='k-{row.kind}{bad}' style='{axis.style(row.time, row.end)}'"
        f" title='{title}' href='#{_anchor(row)}'></a>"
    )


def _anchor(row: Row) -> str:
    return f"r{row.machine}-{row.kind}-{int(row.time * 1e6)}"


def _log(axis: Axis, looks: list[Look], rows: list[Row]) -> str:
    first, missing, last = _bounded(rows)
    kinds = {row.kind for row in rows}
    many = len(looks) > 1
    inputs = "".join(
        f"<input type='checkbox' id='f-{kind}' checked><label class='k-{kind}' for='f-{kind}'>"
        f"{title} <small>{sum(row.kind == kind for row in rows)}</small></label>"
        for kind, title in KINDS
        if kind in kinds
    )
    if many:
        inputs += "".join(
            f"<input type='checkbox' id='f-m{at}' checked><label class='m{at % 6}' for='f-m{at}'>"
            f"<i></i>{at}</label>"
            for at in range(len(looks))
        )
    body = [_row(axis, row, many) for row in first]
    if missing:
        body.append(f"<li class='gap'>{missing} rows are left out here: see the files beside</li>")
    body += [_row(axis, row, many) for row in last]
    return (
        f"<section class='log'>{inputs}"
        "<input type='search' id='find' placeholder='find' aria-label='find in the log'>"
        f"<output id='found'></output><ol class='rows'>{''.join(body)}</ol></section>"
    )


def _row(axis: Axis, row: Row, many: bool) -> str:
    bad = " bad" if row.failed else ""
    which = f"<i title='machine {row.machine}'></i>" if many else ""
    color = f" m{row.machine % 6} n{row.machine}" if row.machine >= 0 else ""
    detail = f"<small>{_text(row.detail)}</small>" if row.detail else ""
    anchor = "" if row.kind == "console" else f" id='{_anchor(row)}'"
    return (
        f"<li class='k-{row.kind}{color}{bad}'{anchor}><time>{axis.told(row.time)}</time>{which}"
        f"<b>{'' if row.kind == 'console' else row.kind}</b><span>{_text(row.text)}{detail}</span>"
        "</li>"
    )


def _registers(looks: list[Look]) -> str:
    found = []
    for at, look in enumerate(looks):
        if look.registers:
            title = "failure report" if look.reported else "registers"
            found.append(
                f"<details open class='m{at % 6}'><summary><i></i>{_text(look.name)}: {title}"
                f"</summary><pre>{_text(look.registers, BLOCK_MAX)}</pre></details>"
            )
    return f"<section>{''.join(found)}</section>" if found else ""
