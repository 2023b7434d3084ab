"""vmm/testing/bounded.py: calls with an end, whatever they wait for."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.support import tiny
from vmm import Machine, MachineConfig
from vmm.machine.exits import TIMEOUT
from vmm.testing.bounded import LateError, close, ended_after, within
from vmm.testing.machines import MachineFactory


def test_what_a_call_gives() -> None:
    assert within(60, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(60, lambda: 1 // 0)


def test_a_call_that_does_not_return() -> None:
    go = threading.Event()
    with pytest.raises(LateError, match=r"<lambda> has not returned within 0 s"):
        within(0.1, lambda: go.wait())
    asked: list[float] = []
    with pytest.raises(LateError):
        within(60, lambda: go.wait(), lambda passed: bool(asked.append(passed) or len(asked) > 3))
    go.set()


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_every_machine_is_closed_and_each_failure_told(tmp_path: Path) -> None:
    kernel = tiny.kernel(tmp_path, tiny.COUNTING)
    go = threading.Event()

    def bad() -> None:
        raise OSError("a part does not close")

    factory = MachineFactory({"memory": "16M", "console": "none"})
    machines = [factory(kernel) for _ in range(4)]
    machines[0].start()
    machines[1].at_close(bad)
    machines[3].at_close(lambda: go.wait())
    try:
        with pytest.raises(BaseExceptionGroup) as caught:
            factory.close()
        late, other = caught.value.exceptions
        assert isinstance(late, LateError)
        assert "it is in <lambda> (" in str(late)
        assert isinstance(other, OSError)
        assert other.__notes__ == [f"closing vmm machine 1 ({kernel})"]
        assert [machine.state for machine in machines[:3]] == ["closed"] * 3
        factory.close()  # there is nothing left
    finally:
        go.set()


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_a_machine_is_ended_in_time(tmp_path: Path) -> None:
    config = MachineConfig(tiny.kernel(tmp_path, tiny.COUNTING), memory=16 << 20, console="none")
    with Machine(config) as machine:
        machine.start()
        with ended_after(machine, 60, "the test"):
            pass
        assert machine.state == "running"
        with ended_after(machine, 0.1, "the test"):
            assert machine.wait(timeout=60).kind == TIMEOUT
        assert machine.exit is not None
        assert machine.exit.message == "the test has taken more than 0.1 s"
        close(machine)
        close(machine)
