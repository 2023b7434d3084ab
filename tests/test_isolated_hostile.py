"""vmm/isolated: a machine's process that lies, is mute, or dies harms nobody else.

Whatever it sends, each call of the program returns or raises one of the errors it is documented
to, in bounded time; the process is gone after `close`, and a neighbour has noticed nothing. The
processes are those of tests.support.liar.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support import liar, tiny
from tests.support.bare import until
from vmm import Machine, MachineConfig, VmmError
from vmm.isolated import nursery

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(120)]

MIB = 1 << 20
CALLS: list[Callable[[Machine], object]] = [
    lambda m: m.start(),
    lambda m: m.wait_for("ready", timeout=0.2),
    lambda m: m.send("x"),
    lambda m: m.pause(),
    lambda m: m.memory.read(0x100000, 64),
    lambda m: m.memory.write_u32(0x100000, 1),
    lambda m: m.vcpus[0].get_regs(),
    lambda m: m.vcpus[0].get_msrs([0x10]),
    lambda m: m.balloon.actual,
    lambda m: m.virtio_device("rng").limit.rates,
    lambda m: m.faults.active,
    lambda m: m.checkpoint(),
    lambda m: m.rollback(),
    lambda m: m.resume(),
    lambda m: m.power_button_unseen(),
    lambda m: m.stop(),
]
ALLOWED = (VmmError, OSError)


@pytest.fixture(scope="module")
def lying_zygote() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nursery, "_PROGRAM", liar.PROGRAM)
        patch.setattr(nursery, "_zygotes", [])
        yield
        for zygote in nursery._zygotes:
            zygote.close()


@pytest.fixture(scope="module")
def make(lying_zygote: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Machine]:
    kernel = tiny.kernel(tmp_path_factory.mktemp("kernel"), tiny.ECHO)

    def made(lie: str = "") -> Machine:
        config = MachineConfig(
            kernel, memory=16 * MIB, append=lie, default_append=False, balloon=0, rng="rate=1M"
        )
        return Machine(config, isolate=True)

    return made


@pytest.fixture(scope="module")
def long_neighbour(make: Callable[..., Machine]) -> Iterator[Machine]:
    with make() as m:
        m.start()
        m.wait_for("ready", timeout=60)
        yield m


@pytest.fixture
def neighbour(long_neighbour: Machine) -> Iterator[Machine]:
    """A machine of the same zygote that goes on as if nothing was."""
    m = long_neighbour
    yield m
    assert m.state == "running"
    m.send("x")
    assert m.wait_for("]", timeout=60).endswith("[x]")


def live_with(m: Machine) -> None:
    """Every call returns or raises, within its time; then the process is gone."""
    pid = m.process.process.pid  # type: ignore[attr-defined]
    for call in CALLS:
        begun = time.monotonic()
        try:
            call(m)
        except ALLOWED as err:
            assert "\n" not in str(err)
        took = time.monotonic() - begun
        assert took < 15, (call, took)
    begun = time.monotonic()
    m.close()
    assert time.monotonic() - begun < 5  # a second, on a host that does nothing else
    assert m.state == "closed"
    assert not os.path.exists(f"/proc/{pid}")


@pytest.mark.parametrize("lie", [name for name in liar.LIES if name not in ("flood", "drip")])
@pytest.mark.parametrize("where", ["facts", "answer", "event"])
def test_what_is_no_frame(
    make: Callable[..., Machine], neighbour: Machine, lie: str, where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from vmm.isolated import process

    # A mute process has so long to make the machine, or to answer what has no second of its own.
    monkeypatch.setattr(process, "LONG", 1.0)
    monkeypatch.setattr(process, "USUAL", 1.0)
    try:
        m = make(f"lie={lie}@{where}")
    except ALLOWED as err:
        assert where == "facts"
        assert "\n" not in str(err)
        return
    assert where != "facts"
    live_with(m)


def test_a_process_that_is_mute_is_killed_within_a_second(make: Callable[..., Machine]) -> None:
    for call in (Machine.pause, Machine.stop, Machine.close):
        m = make("lie=silent@answer")
        m.process._owner = lambda: None  # type: ignore[attr-defined]  # it hears of no end
        m._state = "running"
        begun = time.monotonic()
        try:
            getattr(m, call.__name__)()
        except VmmError as err:
            assert "did not answer" in str(err)
        assert time.monotonic() - begun < 3
        m.close()


@pytest.mark.parametrize("where", ["facts", "answer", "event"])
def test_answers_of_other_shapes(
    make: Callable[..., Machine], neighbour: Machine, where: str
) -> None:
    for seed in range(12):
        try:
            m = make(f"lie=mutate:{seed}@{where}")
        except ALLOWED as err:
            assert "\n" not in str(err)
            continue
        live_with(m)


def test_a_flood_of_events_is_bounded(make: Callable[..., Machine], neighbour: Machine) -> None:
    m = make("lie=flood@event")
    m.start()
    until(lambda: len(m.event_log) >= 1000)
    neighbour.pause()
    neighbour.resume()
    assert len(m.event_log) <= 1000
    m.close()
