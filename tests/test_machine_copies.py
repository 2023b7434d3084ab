"""vmm/machine/copies.py: many busy machines start and end together."""

from __future__ import annotations

import pytest

from tests.support.bare import bare_machine, until
from tests.support.guests import DATA
from vmm import Machine

pytestmark = [pytest.mark.needs_kvm]

BUSY = """
1:  lock incq DATA
    jmp 1b
"""
COUNT = 12


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Machine]]:
    """The calls that start and end machines, in their order."""
    calls: list[tuple[str, Machine]] = []
    for name in ("start_parked", "let_go", "unplug", "close"):

        def record(machine: Machine, name: str = name, call: object = getattr(Machine, name)):  # type: ignore[no-untyped-def]
            calls.append((name, machine))
            return call(machine)  # type: ignore[operator]

        monkeypatch.setattr(Machine, name, record)
    return calls


def count(machine: Machine) -> int:
    return machine.memory.read_u64(DATA)


@pytest.mark.parametrize("running", [True, False])
def test_no_guest_runs_before_every_machine_has_its_threads(
    running: bool, order: list[tuple[str, Machine]]
) -> None:
    """Else the start of each waits for its turn among the vCPUs that run: seconds for 100."""
    with bare_machine(BUSY, "user") as m:
        m.start()
        until(lambda: count(m) > 0)
        if not running:
            m.pause()
        del order[:]
        copies = m.clone(COUNT)
        assert [copy.state for copy in copies] == ["running" if running else "created"] * COUNT
        if not running:
            assert not order
            copies.start()
        started = [(name, copy) for name, copy in order if copy in copies]
        assert started == [("start_parked", copy) for copy in copies] + [
            ("let_go", copy) for copy in copies
        ]
        before = [count(copy) for copy in copies]
        until(lambda: all(count(copy) > at for copy, at in zip(copies, before, strict=True)))
        copies.close()
        assert [copy.state for copy in copies] == ["closed"] * COUNT


def test_a_machine_that_is_started_parked_stands_still() -> None:
    with bare_machine(BUSY, "user") as m:
        m.start_parked()
        assert m.state == "running"
        m.vcpu_threads[0].wait_parked()
        assert count(m) == 0
        m.let_go()
        until(lambda: count(m) > 0)


def test_whoever_pauses_or_ends_it_between_is_obeyed() -> None:
    with bare_machine(BUSY, "user") as m:
        m.start_parked()
        m.pause()
        m.let_go()
        assert m.state == "paused"
        m.vcpu_threads[0].wait_parked()
        assert count(m) == 0
        m.stop()
        m.let_go()
        assert m.state == "stopped"
        assert count(m) == 0


def test_all_are_ended_before_the_first_is_closed(order: list[tuple[str, Machine]]) -> None:
    """Else each waits for its turn among the others' vCPUs, and KVM for its threads' turn."""
    with bare_machine(BUSY, "user") as m:
        m.start()
        with m.clone(COUNT) as copies:
            del order[:]
        names = [name for name, _ in order]
        assert names[:COUNT] == ["unplug"] * COUNT
        assert names.count("close") == COUNT
        assert [copy.exit.kind for copy in copies if copy.exit is not None] == ["stopped"] * COUNT
        copies.close()  # harmless
        assert m.state == "running"


def test_one_that_raises_does_not_keep_the_rest_open() -> None:
    with bare_machine(BUSY, "user") as m:
        copies = m.clone(3)

        def fails(text: str = "first") -> None:
            raise OSError(text)

        copies[0].on_close(fails)
        copies[1].on_close(lambda: fails("second"))
        with pytest.raises(OSError, match="first") as caught:
            copies.close()
        assert caught.value.__notes__ == ["and then: OSError: second"]
        assert [copy.state for copy in copies] == ["closed"] * 3
