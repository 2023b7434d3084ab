"""vmm/cli/doctor.py: the command, as people and programs call it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from vmm.doctor.text import WIDTH


def vmm(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vmm", "doctor", *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.needs_kvm
def test_json_has_every_key_and_status_0() -> None:
    done = vmm("--json")
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert answer["backend"] == "" or Path("/sys/module", answer["backend"]).is_dir()
    assert answer["api_version"] == 12
    assert answer["capabilities"]["KVM_CAP_IRQCHIP"]["value"] == 1
    assert answer["guest_speed"]["cpl0_mips"] > 0
    assert answer["guest_speed"]["cpl3_mips"] > 0
    assert answer["limits"]["vcpus_max"] >= 1
    for key in ("runs_linux", "usable", "nested", "syscall_enters_cpl0"):
        assert isinstance(answer[key], bool), key
    if answer["runs_linux"]:
        assert answer["problems"] == []
    else:
        assert all(problem["what"] and problem["mend"] for problem in answer["problems"])


@pytest.mark.needs_kvm
def test_the_text_is_narrow_plain_and_ends_in_the_verdict() -> None:
    done = vmm()
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= WIDTH
    verdict = " ".join(done.stdout.rsplit("\n\n", 1)[1].split())
    assert "run here (" in verdict and verdict.endswith(".")


@pytest.mark.needs_kvm
@pytest.mark.parametrize(
    ("env", "coloured"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
    ],
)
def test_colour_is_for_terminals_that_have_it(env: dict[str, str], coloured: bool) -> None:
    base = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    ours, theirs = pty.openpty()
    with open(ours, "rb", buffering=0) as terminal:
        process = subprocess.Popen(
            [sys.executable, "-m", "vmm", "doctor"], env={**base, **env}, stdout=theirs
        )
        os.close(theirs)
        output = b""
        try:
            while data := terminal.read(4096):
                output += data
        except OSError:  # EIO: the other end is closed
            pass
        assert process.wait(60) == 0
    assert (b"\x1b[1m" in output) is coloured


def test_a_missing_device_is_status_69_with_a_whole_report(tmp_path: Path) -> None:
    path = tmp_path / "kvm"
    done = vmm("--json", "--device", str(path))
    assert (done.returncode, done.stderr) == (69, "")
    answer = json.loads(done.stdout)
    assert answer["verdict"].startswith(f"Nothing runs here: {path} does not exist")
    assert answer["runs_linux"] is answer["usable"] is False
    assert answer["syscall_enters_cpl0"] is answer["api_version"] is None
    assert answer["capabilities"] == answer["limits"] == {}
    assert answer["problems"][0]["mend"]


def test_a_file_that_is_no_device_is_status_69_in_text_too() -> None:
    done = vmm("--device", "/dev/null")
    assert (done.returncode, done.stderr) == (69, "")
    assert "- /dev/null is not a KVM device\n  mend: " in done.stdout


@pytest.mark.parametrize("arguments", [["--jsn"], ["--js"], ["extra"], ["--device"]])
def test_wrong_usage_is_one_line_and_status_2(arguments: list[str]) -> None:
    done = vmm(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vmm: ") and done.stderr.count("\n") == 1
    assert "vmm doctor --help" in done.stderr


def test_help_documents_the_statuses() -> None:
    done = vmm("--help")
    assert done.returncode == 0
    for words in ("--json", "--device", "exit status", "  69 "):
        assert words in done.stdout
