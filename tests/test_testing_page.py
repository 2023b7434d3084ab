"""vmm/testing/page.py, artifacts.py and failing.py: what a failing test leaves."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support import projects, tiny
from tests.support.projects import run_pytest, write
from vmm import Machine, MachineConfig
from vmm.events import Event
from vmm.testing import page
from vmm.testing.look import Look, printable
from vmm.testing.recorder import HEAD, TAIL, Recorder

HOSTILE = (
    b"</span></li><script>alert(1)</script><img src=x onerror=alert(2)>\n"
    b"\x1b[2J\x1b]0;title\x07 \xe2\x80\xae turned & 'quoted' \"twice\" <!-- \xff ]]>\n"
)
TEST = """
import pytest

@pytest.mark.parametrize("name", ["../../<b>x", "plain"])
def test_it(machine_factory, name):
    machine = machine_factory({kernel!r}, memory="16M")
    machine.start()
    machine.wait_for("ready", timeout=60)
    with machine.faults.stall(0):
        pass
    with pytest.raises(TimeoutError):
        machine.wait_for("</script>no", timeout=0.05)
    machine.pause()
    machine.resume()
    assert machine.state == "<i>elsewhere</i>"
"""


class Page(HTMLParser):
    """What is in a page: its elements, their attributes, the text of each kind of row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "li":
            self.rows.append((str(dict(attrs).get("class", "")).partition(" ")[0], ""))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows:
            self.rows[-1] = (self.rows[-1][0], self.rows[-1][1] + data)

    def of(self, kind: str) -> list[str]:
        return [text for row, text in self.rows if row == f"k-{kind}"]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A project with two failing tests, that has run, and what pytest printed."""
    directory = tmp_path_factory.mktemp("left")
    project = projects.new(directory)
    code = tiny.prints(HOSTILE + b"ready\n") + tiny.COUNTING
    write(project, TEST, kernel=tiny.kernel(directory, code))
    done = run_pytest(project, "--vmm-artifacts=kept", "--junit-xml=junit.xml")
    yield project, done.stdout


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_files_that_a_ci_keeps(left: tuple[Path, str]) -> None:
    project, told = left
    names = sorted(path.name for path in (project / "kept").iterdir())
    assert len(names) == 2
    assert names[1] == "test_it.py-test_it[plain]"
    assert re.fullmatch(r"test_it\.py-test_it\[[b-]+x\]-[0-9a-f]{8}", names[0]), names
    directory = project / "kept" / names[1]
    assert f"{directory}/report.html\n" in told
    assert (directory / "machine-0.console.log").read_bytes() == HOSTILE + b"ready\n"
    assert (directory / "machine-0.registers.txt").read_text().startswith("vCPU 0: 32-bit")
    lines = (directory / "machine-0.events.jsonl").read_text().splitlines()
    first, *rest = map(json.loads, lines)
    assert first["event"] == "machine"
    assert first["config"]["memory"] == 16 << 20
    assert first["state"] == "running"
    assert first["marks"]["asked"] < first["marks"]["built"] < first["marks"]["first byte"]
    kinds = [row["event"] for row in rest]
    assert {"started", "paused", "resumed", "fault", "call"} <= set(kinds)
    assert [row["time"] for row in rest] == sorted(row["time"] for row in rest)
    waits = [row for row in rest if row["event"] == "call"]
    assert [(row["call"], row["failed"]) for row in waits] == [("wait", False), ("wait", True)]
    assert waits[1]["ended"] > waits[1]["time"]


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_junit_has_the_place(left: tuple[Path, str]) -> None:
    project, _ = left
    cases = ET.parse(project / "junit.xml").getroot().iter("testcase")  # ours
    for case in cases:
        told = {one.get("name"): one.get("value") for one in case.iter("property")}
        assert Path(str(told["vmm_report"])).is_file()
        assert told["vmm_machine_0"] == "running"


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_a_report_for_a_terminal(left: tuple[Path, str]) -> None:
    _, told = left
    assert "\x1b" not in told
    assert "\u202e" not in told
    assert "␛[2J␛]0;title␇ \\u202e turned & 'quoted' \"twice\"" in told
    assert re.search(r"calls, last 2 -+\n +\+\d+\.\d{3} s  wait ready: ready, \d", told)
    assert "vmm/testing" not in told


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_a_page_has_all_of_it(left: tuple[Path, str]) -> None:
    project, _ = left
    found = Page((project / "kept" / "test_it.py-test_it[plain]" / "report.html").read_text())
    console = found.of("console")
    assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in console[0]
    assert "␛[2J␛]0;title␇ \\u202e turned & 'quoted' \"twice\" <!-- \ufffd ]]>" in console[1]
    assert console[2].endswith("ready")
    assert [text.rpartition("event")[2] for text in found.of("event")] == [
        "started", "paused", "resumed",
    ]  # fmt: skip
    assert "vcpu0 stall set" in found.of("fault")[0]
    assert "wait ready" in found.of("call")[0]
    assert "TimeoutError: 0.05 s passed without '</script>no'" in found.of("call")[1]
    assert "call fails" in found.of("test")[-1]
    assert "assert 'running' == '<i>elsewhere</i>'" in found.text
    assert "rip  " in found.text
    times = [float(match) for match in re.findall(r"(?m)^([+-]\d+\.\d{3})", "\n".join(
        text for kind, text in found.rows if kind.startswith("k-")))]  # fmt: skip
    assert times == sorted(times)
    steps = [text for kind, text in found.rows if kind == ""]
    for step in ("built+", "started+", "first byte+"):
        assert any(text.startswith(step) for text in steps), steps


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.parametrize("name", ["[plain]", "b-x]"])
def test_nothing_in_a_page_does_anything_but_filter(left: tuple[Path, str], name: str) -> None:
    project, _ = left
    [path] = [path for path in (project / "kept").iterdir() if name in path.name]
    text = (path / "report.html").read_text()
    found = Page(text)
    tags = [tag for tag, _ in found.elements]
    assert tags.count("script") == tags.count("style") == 1
    assert not {"img", "link", "iframe", "object", "form", "base", "b2"} & set(tags)
    for tag, attributes in found.elements:
        assert not [key for key in attributes if key.startswith("on")], (tag, attributes)
        assert "src" not in attributes
        if "href" in attributes:
            assert str(attributes["href"]).startswith("#")
    assert not re.search(r"url\(|@import|https?://", text)
    policy = dict(found.elements)["meta"]
    policies = [a["content"] for t, a in found.elements if a.get("http-equiv")]
    assert policy
    assert len(policies) == 1
    assert str(policies[0]).startswith("default-src 'none'; ")
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    targets = [str(a["href"])[1:] for _, a in found.elements if "href" in a]
    assert set(targets) <= set(ids)


# --- without a project ----------------------------------------------------------------------------


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_a_page_is_bounded(tmp_path: Path) -> None:
    """Whatever a guest prints, however long its lines are."""
    config = MachineConfig(tiny.kernel(tmp_path, tiny.HALT), memory=16 << 20, console="none")
    recorder = Recorder(0.0)
    with Machine(config) as machine:
        recorder.follow(machine)
        for number in range(20_000):
            machine.console.write(b"line %d <&>\n" % number)
        machine.console.write(b"\0" * (2 << 20))  # the longest when it is escaped
        for number in range(2000):
            machine.emit(Event())
            if number < 1500:
                machine.console.wait_for("\0", timeout=1, since=0)
        look = Look(machine, "vmm machine 0", recorder)
    assert len(recorder.console()) <= HEAD + TAIL + 100
    report = SimpleNamespace(when="call", duration=1.0, longreprtext="E  x\n" * 100_000)
    item = SimpleNamespace(nodeid="test_x.py::test_y[" + "&" * 10_000 + "]")
    text = page.render(item, report, [look] * 3, [("call", 0.0, look.time)])  # type: ignore[arg-type]
    assert len(text) < 12 << 20
    assert "rows are left out here" in text
    assert "line 0 &lt;&amp;&gt;" in text
    assert len(look.sections()[0][1]) < 100_000


def test_lines_have_the_time_at_which_they_began() -> None:
    recorder = Recorder(0.0)
    written: list[bytes] = []
    for data in (b"one\nt", b"wo\r\n", b"\n", b"three"):
        recorder._console(written.append, data)
    times = [time for _, time in recorder._first_writes]
    assert recorder.lines() == [
        (times[0], "one"), (times[0], "two"), (times[2], ""), (times[3], "three"),
    ]  # fmt: skip
    assert b"".join(written) == recorder.console() == b"one\ntwo\r\n\nthree"
    assert recorder.marks["first byte"] == times[0]


@pytest.mark.parametrize("size", [HEAD, TAIL, TAIL + 1, 2 * TAIL + 1, 2 * TAIL + HEAD, 4 * TAIL])
def test_what_is_kept_of_much_output(size: int) -> None:
    recorder = Recorder(0.0)
    data = b"".join(b"%07d\n" % number for number in range(size // 8 + 1))[:size]
    for at in range(0, size, 10_000):
        recorder._console(lambda data: None, data[at : at + 10_000])
    kept = recorder.console()
    match = re.search(rb"\n\[\.\.\. (\d+) bytes are left out \.\.\.\]\n", kept)
    if match is None:
        assert kept == data
    else:
        head, tail = kept[: match.start()], kept[match.end() :]
        assert (head, tail) == (data[: len(head)], data[-len(tail) :])
        assert len(head) + int(match[1]) + len(tail) == size
        assert (len(head), len(tail)) == (HEAD, TAIL)
    lines = [line for _, line in recorder.lines()]
    assert lines[0] == "0000000"
    assert "\n".join(lines).endswith(data[-100:].decode().rstrip("\n"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 日本", "plain é 日本"),
        ("\x1b[31m\x00\x7f", "␛[31m␀␡"),
        ("\x9b2J", "\\u009b2J"),
        ("a\u202eb\u2066c\u200bd\u2028e", "a\\u202eb\\u2066c\\u200bd\\u2028e"),
        ("tab\tend\n", "tab\tend\n"),
        ("\ud800", "\\ud800"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_where_nothing_can_be_left(tmp_path: Path) -> None:
    """A failure to write is a line of the report, and `off` leaves nothing."""
    project = projects.new(tmp_path)
    write(
        project,
        "def test_it(machine_factory):\n"
        "    machine_factory({kernel!r}, memory='16M')\n"
        "    assert 0\n",
        kernel=tiny.kernel(tmp_path, tiny.HALT),
    )
    (project / "kept").write_text("a file")
    done = run_pytest(project, "--vmm-artifacts=kept")
    assert done.returncode == 1
    assert "INTERNALERROR" not in done.stdout + done.stderr
    assert re.search(
        r"vmm report -+\ncannot be written: (FileExists|NotADirectory)Error", done.stdout
    )
    done = run_pytest(project, "--vmm-artifacts=off")
    assert "vmm machine 0: registers" in done.stdout
    assert "vmm report" not in done.stdout
    (project / "pytest.ini").write_text("[pytest]\nvmm_artifacts = below/here\n")
    done = run_pytest(project)
    assert f"{project}/below/here/test_it.py-test_it/report.html\n" in done.stdout


@pytest.mark.needs_linux_kvm
@pytest.mark.timeout(600)
def test_a_page_about_linux(tmp_path: Path, cloud_kernel: object) -> None:
    """How it came up, and the commands on it."""
    project = projects.new(tmp_path)
    write(
        project,
        """
import pytest

@pytest.mark.vmm(append="loglevel=7")
def test_it(booted_machine):
    booted_machine.run(["sh", "-c", "echo '<b>out'; ls /nope"])
    booted_machine.put(__file__, "/tmp/it.py")
    booted_machine.popen(["sleep", "1000"])
    assert booted_machine.run(["uname", "-s"]).stdout == b"Plan 9"
""",
    )
    done = run_pytest(
        project, "--vmm-require", "--vmm-artifacts=kept", "-o", "vmm_boot_timeout=300", timeout=500
    )
    directory = project / "kept" / "test_it.py-test_it"
    assert directory.is_dir(), done.stdout
    rows = list(map(json.loads, (directory / "machine-0.events.jsonl").read_text().splitlines()))
    marks = rows[0]["marks"]
    assert marks["asked"] < marks["built"] < marks["first byte"] < marks["agent"]
    calls = [(row["call"], row["result"], row["failed"]) for row in rows if row["event"] == "call"]
    assert calls == [
        ("wait", "ready", False),
        ("run", "status 1", True),
        ("put", "", False),
        ("popen", "has not ended", False),
        ("run", "status 0", False),
    ]
    found = Page((directory / "report.html").read_text())
    steps = [text.partition("+")[0] for kind, text in found.rows if kind == ""]
    assert [text for text in steps if text in page.STEPS] == [
        "built", "started", "first byte", "init", "agent",
    ]  # fmt: skip
    called = "".join(found.of("call"))
    assert "run sh -c" in called
    assert "<b>out\nls: /nope: No such file or directory" in called
