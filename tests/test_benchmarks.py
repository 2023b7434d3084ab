"""benchmarks: statistics, the table, the command line, and guests that do what is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import bare, blk, exits, guests, native, net, output, snapshots, start
from benchmarks.series import Series, interleave
from vmm.errors import HostError


def series(contender: str, *samples: float, reference: bool = False) -> Series:
    return Series("x", "a walk", contender, "ms", reference, samples=list(samples))


def test_contenders_take_turns_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []

    def contender(name: str) -> Callable[[], Sequence[float]]:
        def run() -> Sequence[float]:
            calls.append(name)
            return [len(calls)]

        return run

    results = interleave(
        {"a": contender("a"), "b": contender("b")}, 2, lambda text: None, "walk", warm_up=1
    )
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert results == {"a": [[4], [5]], "b": [[3], [6]]}


def test_the_table_has_medians_and_ratios_to_the_reference() -> None:
    lines = output.table(
        [series("ours", 1, 30, 2), series("theirs", 4, 10, 4, reference=True)]
    ).splitlines()
    assert lines[0] == "(x) a walk, ms"
    # The median of 1/4, 30/10 and 2/4.
    assert lines[2].split() == ["ours", "2.00", "1.50", "..", "16.0", "3", "0.50"]
    assert lines[3].split() == ["theirs", "4.00", "4.00", "..", "7.00", "3", "1"]


def test_without_a_reference_there_is_no_ratio() -> None:
    assert output.table([series("ours", 7)]).splitlines()[2].split()[-1] == "1"  # that is n


def test_every_sample_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "RESULTS", tmp_path / "results")
    path = output.save({"date": "2026-01-02T03:04:05+00:00"}, [series("ours", 1, 2, 30)])
    assert path.name == "2026-01-02T030405.json"
    kept = json.loads(path.read_text())
    assert kept["series"][0]["samples"] == [1, 2, 30]
    assert kept["series"][0]["median"] == 2


@pytest.mark.parametrize("name", ["z", "", "starts", "a b"])
def test_a_row_that_is_not(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([name]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"bench: no row {name!r}; there are a (start), b (create)")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_command_that_fails_is_told() -> None:
    with pytest.raises(Exception, match=r"-c import sys; sys.exit\('oh'\) ended with 1: oh"):
        start.spawn([sys.executable, "-c", "import sys; sys.exit('oh')"])()


def test_time_and_peak_memory_are_the_commands_own() -> None:
    code = "import time; a = bytearray(64 << 20); time.sleep(0.1)"
    taken, peak = start.spawn([sys.executable, "-c", code])()
    assert taken >= 100
    assert 64 < peak < 120


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("operation", guests.OPERATIONS)
def test_each_operation_exits_once(
    operation: str, cpl: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many accesses reach the register as are counted, and C's part ends as well."""
    accesses: list[int] = []

    class Counting(exits.Register):
        def read(self, offset: int, size: int) -> int:
            accesses.append(size)
            return super().read(offset, size)

        def write(self, offset: int, size: int, value: int) -> None:
            accesses.append(size)

    monkeypatch.setattr(exits, "Register", Counting)
    image = guests.exits_image(operation, 10)
    exits._through_machine(image, cpl)
    assert accesses == [4 if "MMIO" in operation else 1] * 10
    path = tmp_path / "image"
    path.write_bytes(image)
    with native.Native() as c:
        assert c.ask(f"exits {cpl} 10 {path}") > 0


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_the_c_programs_machine_runs_to_its_exit_port() -> None:
    assert subprocess.run([native.program(), "once"], check=False, timeout=60).returncode == 0


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.parametrize("bus", ["mmio", "pci"])
def test_the_bench_guest_reads_and_writes_a_disk(bus: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    size = 4 << 20
    blk.make_image(str(image), size)
    command = blk.vmm(bus, str(image))
    reads = [name for name in blk.JOBS if "write" not in blk.JOBS[name]]
    depths = [blk.JOBS[name]["depth"] for name in reads]
    for answer, depth in zip(
        bare.run(command, [blk.job(name, bus, 10) for name in reads]), depths, strict=True
    ):
        assert answer["requests"] >= depth
        assert answer["notifies"] <= answer["requests"] + depth
    image.write_bytes(bytes(size))
    bare.run(command, [blk.job("4 KiB random write, QD32", bus, 10)])
    data = image.read_bytes()
    written = [at for at in range(4096, size, 4096) if any(data[at : at + 8])]
    assert written
    assert all(int.from_bytes(data[at : at + 8], "little") == at for at in written)


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_the_bench_guest_sees_data_that_is_not_what_it_should_be(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * (1 << 20))
    with pytest.raises(HostError, match="failed: what was read is not what is there"):
        bare.run(blk.vmm("mmio", str(image)), [blk.job("4 KiB random read, QD1", "mmio", 10)])


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_the_bench_guest_runs_under_qemu(tmp_path: Path) -> None:
    image = tmp_path / "image"
    blk.make_image(str(image), 1 << 20)
    command = blk.qemu("mmio", str(image), "threads")
    (answer,) = bare.run(command, [blk.job("4 KiB random read, QD1", "mmio", 10)])
    assert answer["requests"]


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.parametrize("bus", ["mmio", "pci"])
def test_the_bench_guest_sends_and_receives_frames(bus: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, for a network namespace")
    with net.Network() as network:
        jobs = [net.job(name, bus, 10) for name in net.JOBS]
        for job, answer in zip(jobs, net.run(net.vmm(bus), jobs, network), strict=True):
            assert answer["frames"] >= job["depth"]
        assert (
            network.name in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
        )
    assert (
        network.name not in subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout
    )


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.timeout(120)
@pytest.mark.skipif(
    tuple(map(int, os.uname().release.split(".")[:2])) < (6, 7),
    reason="clones.c needs PAGEMAP_SCAN (Linux 6.7)",
)
def test_row_s_measures_all_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SIZES": {"128 MiB": 128 << 20}, "COPIES": 3, "ROLLBACKS": 2, "HELD": 3, "REPETITIONS": 1,
    }.items():  # fmt: skip
        monkeypatch.setattr(snapshots, name, value)
    rows = snapshots.measure(lambda text: None)
    assert {row.comparison for row in rows} == {
        "128 MiB restored, to its first exit",
        "3 copies made, each run to its first exit",
        "3 copies of a running, busy machine, until each has counted",
        "1000 pages of 128 MiB put back",
        "memory of each further copy, private, page tables too",
        "machines made, run to their first exit and closed (more is better)",
    }
    assert all(sample >= 0 for row in rows for sample in row.samples)
    assert sum(row.reference for row in rows) == 6
