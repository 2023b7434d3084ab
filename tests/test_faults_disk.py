"""vmm.faults.disk: each fault, what it strikes, and the same again from the same seed."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.disk_guest import DATA, SLOT, DiskGuest
from vmm.errors import StateError, UsageError
from vmm.faults import disk_kinds
from vmm.faults.rules import EVENTS, Fault
from vmm.virtio import blk, mmio

SECTORS = 2048


def pattern(sector: int, count: int = 1, version: int = 0) -> bytes:
    return b"".join(b"%08d.%07d" % (each, version) * 32 for each in range(sector, sector + count))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    disk = tmp_path / "disk.img"
    disk.write_bytes(pattern(0, SECTORS))
    return disk


@pytest.fixture
def make(path: Path) -> Iterator[Callable[..., DiskGuest]]:
    guests: list[DiskGuest] = []

    def guest(**how: Any) -> DiskGuest:
        guests.append(DiskGuest(path, **how))
        return guests[-1]

    yield guest
    for each in guests:
        each.__exit__()


@pytest.fixture
def guest(make: Callable[..., DiskGuest]) -> DiskGuest:
    return make()


# --- what is struck -------------------------------------------------------------------------------


def test_the_nth_read_of_some_sectors_fails(guest: DiskGuest) -> None:
    told: list[str] = []
    guest.disk.on_error = told.append
    fault = guest.faults.fail(sectors=range(100, 200), on="read", nth=3, errno=errno.EIO)
    assert guest.get(99) == pattern(99)  # another sector
    assert guest.put(100, pattern(100)) == blk.S_OK  # another request
    assert guest.get(100) == pattern(100)
    assert guest.get(199, 1024) == pattern(199, 2)
    assert guest.request(blk.T_IN, 98, into=2048) == blk.S_IOERR  # reaches into them
    assert guest.get(150) == pattern(150)
    assert fault.count == 1
    assert list(fault.log) == [{"request": 3, "what": "read", "sector": 98}]
    assert told == []  # the guest is told, the person is not
    assert guest.flush() == blk.S_OK


@pytest.mark.parametrize(
    ("which", "struck"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"nth": 1}, [1]),
        ({"nth": [2, 5]}, [2, 5]),
        ({"after": 6}, [7, 8]),
        ({"times": 2}, [1, 2]),
        ({"after": 3, "times": 2}, [4, 5]),
        ({"probability": 0}, []),
        ({"sectors": 4}, [4]),
        ({"sectors": range(2, 4)}, [2, 3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("on", ["read", "write"])
def test_which_requests(
    guest: DiskGuest, on: str, which: dict[str, Any], struck: list[int]
) -> None:
    fault = guest.faults.fail(on=on, **which)
    failed = []
    for number in range(1, 9):
        if on == "read":
            status = guest.request(blk.T_IN, number, into=512)
        else:
            status = guest.put(number, pattern(number))
        if status != blk.S_OK:
            failed.append(number)
    assert failed == struck
    assert fault.count == len(struck)


@pytest.mark.parametrize(
    ("on", "kind", "out"),
    [
        ("flush", blk.T_FLUSH, b""),
        ("discard", blk.T_DISCARD, b"\x05" + bytes(7) + b"\x02" + bytes(7)),
        ("write zeroes", blk.T_WRITE_ZEROES, b"\x05" + bytes(7) + b"\x02" + bytes(7)),
    ],
)
def test_other_requests(guest: DiskGuest, on: str, kind: int, out: bytes) -> None:
    fault = guest.faults.fail(on=on)
    assert guest.request(kind, out=out) == blk.S_IOERR
    fault.clear()
    assert guest.request(kind, out=out) == blk.S_OK
    with guest.faults.fail(on="any"):
        assert guest.request(kind, out=out) == blk.S_IOERR
    if out:
        with guest.faults.fail(on=on, sectors=6), guest.faults.fail(on=on, sectors=7) as other:
            assert guest.request(kind, out=out) == blk.S_IOERR
        assert other.count == 0
        with guest.faults.fail(on=on, errno=errno.EOPNOTSUPP):
            # A discard is advice, but for a fault's.
            assert guest.request(kind, out=out) == blk.S_UNSUPP
    assert guest.request(kind, out=out) == blk.S_OK


def test_after_a_flush(guest: DiskGuest) -> None:
    guest.faults.fail(on="write", after_flush=2)
    for _ in range(2):
        assert guest.put(1, pattern(1)) == blk.S_OK
        assert guest.flush() == blk.S_OK
    assert guest.put(1, pattern(1)) == blk.S_IOERR


# --- what becomes of them -------------------------------------------------------------------------


def test_latency_is_each_requests_own(guest: DiskGuest) -> None:
    """A thousand seconds for one; the others, and the queue, do not wait for it."""
    fault = guest.faults.latency(1000, sectors=5)
    late, place = guest.submit(blk.T_IN, 5, into=512)
    for sector in range(10, 18):
        assert guest.get(sector) == pattern(sector)
    assert guest.status(place) == 0xAA
    fault.clear()  # those on their way stay on it
    assert guest.get(5) == pattern(5)
    assert guest.status(place) == 0xAA
    guest.disk.drain()
    assert guest.answered() == [late]
    assert guest.status(place) == blk.S_OK
    assert guest.disk.faults is None


def test_latency_passes(guest: DiskGuest) -> None:
    with guest.faults.latency(0.02, jitter=0.01):
        begin = time.monotonic()
        assert guest.get(3) == pattern(3)
        assert time.monotonic() - begin >= 0.02


def test_jitter_reorders(make: Callable[..., DiskGuest]) -> None:
    guest = make(seed=3)
    guest.faults.latency(0, jitter=0.2, on="read")
    heads = [guest.submit(blk.T_IN, sector, into=512)[0] for sector in range(8)]
    done = guest.answered(8)
    assert sorted(done) == sorted(heads)
    assert done != heads


@pytest.mark.parametrize("silent", [False, True])
def test_a_short_read(guest: DiskGuest, silent: bool) -> None:
    with guest.faults.short_read(keep=700, silent=silent, nth=1):
        status = guest.request(blk.T_IN, 8, into=2048)
    assert status == (blk.S_OK if silent else blk.S_IOERR)
    assert guest.memory.read(DATA + SLOT * guest.place, 2048) == pattern(8, 2)[:700] + bytes(1348)
    with guest.faults.short_read(silent=True):
        assert guest.get(8, 2048) != pattern(8, 4)


def test_dropped_writes(guest: DiskGuest, path: Path) -> None:
    guest.faults.drop(after_flush=1)
    assert guest.put(1, pattern(1, version=1)) == blk.S_OK
    assert guest.flush() == blk.S_OK
    assert guest.put(1, pattern(1, version=2)) == blk.S_OK
    assert guest.get(1) == pattern(1, version=1) == path.read_bytes()[512:1024]
    guest.faults.clear()
    assert guest.put(1, pattern(1, version=3)) == blk.S_OK
    assert guest.get(1) == pattern(1, version=3)


@pytest.mark.parametrize("some", [False, True])
def test_torn_writes(guest: DiskGuest, some: bool) -> None:
    guest.faults.torn(some=some)
    kept = set()
    for round_ in range(1, 21):
        assert guest.put(0, pattern(0, 8, version=round_)) == blk.S_OK
        found = guest.get(0, 8 * 512)
        new = [at for at in range(8) if found[at * 512 :][:512] == pattern(at, version=round_)]
        assert len(new) < 8
        if not some:
            assert new == list(range(len(new)))
        kept.add(tuple(new))
    assert len(kept) > 3
    if some:
        assert any(each and each != tuple(range(len(each))) for each in kept)


def test_a_large_write_is_torn_at_one_place(
    guest: DiskGuest, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_kinds, "SOME_MAX", 4)
    guest.faults.torn(some=True)
    for round_ in range(1, 11):
        assert guest.put(0, pattern(0, 8, version=round_)) == blk.S_OK
        found = path.read_bytes()
        new = [at for at in range(8) if found[at * 512 :][:512] == pattern(at, version=round_)]
        assert new == list(range(len(new)))


def test_corruption(guest: DiskGuest, path: Path) -> None:
    with guest.faults.corrupt(nth=1):
        bad, good = guest.get(7, 4096), guest.get(7, 4096)
    assert good == pattern(7, 8)
    assert bits(bad, good) == 1
    with guest.faults.corrupt(on="write"):
        for _ in range(20):
            assert guest.put(7, good) == blk.S_OK
            assert bits(path.read_bytes()[7 * 512 :][:4096], good) == 1


def bits(one: bytes, other: bytes) -> int:
    return sum((a ^ b).bit_count() for a, b in zip(one, other, strict=True))


def test_a_disk_that_is_gone_and_comes_back(guest: DiskGuest) -> None:
    with guest.faults.gone():
        assert guest.request(blk.T_IN, 0, into=512) == blk.S_IOERR
        assert guest.put(0, pattern(0)) == blk.S_IOERR
        assert guest.flush() == blk.S_IOERR
    assert guest.get(0) == pattern(0)


def test_a_disk_that_answers_when_it_is_back(guest: DiskGuest) -> None:
    fault = guest.faults.gone(silent=True)
    heads = {guest.submit(blk.T_IN, sector, into=512)[0] for sector in range(12)}
    assert guest.rings[0].used() == []
    assert fault.count == 12
    fault.clear()
    assert set(guest.answered(12)) == heads
    assert all(guest.status(place) == blk.S_OK for place in range(1, 13))


def test_no_space_pauses_once(make: Callable[..., DiskGuest]) -> None:
    guest = make(stop_when_full=True)
    stopped = threading.Event()
    guest.disk.on_stop = lambda why: stopped.set()
    guest.faults.fail(on="write", nth=1, errno=errno.ENOSPC)
    guest.submit(blk.T_OUT, 3, out=pattern(3, version=1))
    assert stopped.wait(30)
    assert guest.rings[0].used() == []
    guest.disk.resumed()  # there is space now
    guest.answered()
    assert guest.get(3) == pattern(3, version=1)


def test_faults_add_up(guest: DiskGuest) -> None:
    guest.faults.latency(0.01, on="read")
    guest.faults.corrupt(on="read")
    guest.faults.fail(on="read", nth=2)
    begin = time.monotonic()
    assert bits(guest.get(0), pattern(0)) == 1
    assert guest.request(blk.T_IN, 0, into=512) == blk.S_IOERR
    assert time.monotonic() - begin >= 0.02


# --- chance and the log ---------------------------------------------------------------------------


def outcome(guest: DiskGuest, seed: int) -> list[object]:
    """What a row of faults makes of a row of requests."""
    guest.control.reseed(seed)
    faults = [
        guest.faults.fail(probability=0.3),
        guest.faults.torn(some=True, probability=0.5),
        guest.faults.corrupt(probability=0.4),
        guest.faults.short_read(silent=True, probability=0.4),
    ]
    found: list[object] = []
    for sector in range(0, 256, 8):
        found.append(guest.put(sector, pattern(sector, 8, version=9)))
        found.append(guest.request(blk.T_IN, sector, into=4096))
        found.append(bytes(guest.memory.read(DATA + SLOT * guest.place, 4096)))
    found += [list(fault.log) for fault in faults]
    for fault in faults:
        fault.clear()
    assert all(fault.count for fault in faults)
    for sector in range(0, 256, 8):
        assert guest.put(sector, pattern(sector, 8)) == blk.S_OK
    return found


def test_the_same_seed_is_the_same_again(make: Callable[..., DiskGuest]) -> None:
    guest = make()
    first, again, other = outcome(guest, 1), outcome(guest, 1), outcome(guest, 2)
    assert first == again
    assert first != other


def test_a_fault_leaves_anothers_chance_alone(guest: DiskGuest) -> None:
    def struck(*, other: bool) -> list[object]:
        guest.control.reseed(7)
        if other:
            guest.faults.latency(0, jitter=0.001, probability=0.5)
        with guest.faults.corrupt(probability=0.5) as fault:
            for sector in range(40):
                assert guest.request(blk.T_IN, sector, into=512) == blk.S_OK
        guest.faults.clear()
        return list(fault.log)

    assert struck(other=False) == struck(other=True)


def test_the_log(guest: DiskGuest) -> None:
    with guest.faults.fail(on="read", sectors=range(3, 5), nth=2) as fault:
        assert guest.control.faults == (fault,)
        assert repr(fault) == (
            "<fault blk fail(on='read', errno='EIO', sectors=range(3, 5), nth=2): struck 0 times>"
        )
        for _ in range(2):
            guest.request(blk.T_IN, 3, into=512)
    fault.clear()
    assert repr(fault).endswith("struck 1 times, cleared>")
    assert [str(event) for event in guest.control.log] == [
        "fault: blk fail set: on=read, errno=EIO, sectors=range(3, 5), nth=2",
        "fault: blk fail struck: request=2, what=read, sector=3",
        "fault: blk fail cleared: struck=1",
    ]
    assert guest.control.faults == ()


def test_a_busy_fault_does_not_flood_the_log(guest: DiskGuest) -> None:
    with guest.faults.fail(on="read") as fault:
        for _ in range(EVENTS + 10):
            guest.request(blk.T_IN, 3, into=512)
    assert fault.count == len(fault.log) == EVENTS + 10
    assert len(guest.control.log) == EVENTS + 2


def test_without_faults_nothing_is_in_the_way(guest: DiskGuest) -> None:
    image = guest.disk.image
    assert guest.disk.faults is None
    with guest.faults.fail(nth=99), guest.faults.gone():
        assert guest.disk.image is not image
    assert guest.disk.image is image
    assert guest.disk.faults is None


# --- reset, close, threads ------------------------------------------------------------------------


def started_over(guest: DiskGuest) -> None:
    """Reset the device and start it again, within a time a person would wait."""
    done = threading.Thread(target=guest.start, daemon=True)
    done.start()
    done.join(60)
    assert not done.is_alive()


@pytest.mark.parametrize("how", ["late", "silent"])
def test_reset_while_requests_wait(guest: DiskGuest, how: str) -> None:
    fault: Fault
    if how == "late":
        fault = guest.faults.latency(100_000)
    else:
        fault = guest.faults.gone(silent=True)
    for sector in range(10):
        guest.submit(blk.T_IN, sector, into=512)
    started_over(guest)
    assert guest.rings[0].used() == []  # nothing of its former life
    assert fault.count == 10
    guest.faults.clear()
    assert guest.get(1) == pattern(1)
    assert guest.disk.faults is None


def test_reset_of_one_queue_while_requests_wait(make: Callable[..., DiskGuest]) -> None:
    guest = make(queues=2)
    guest.faults.latency(100_000)
    guest.submit(blk.T_IN, 1, into=512)
    reset = threading.Thread(target=guest.disk.reset_queue, args=(0,), daemon=True)
    reset.start()
    reset.join(60)
    assert not reset.is_alive()
    guest.enable(0)
    guest.faults.clear()
    assert guest.get(2) == pattern(2)


def test_close_while_requests_wait(path: Path) -> None:
    guest = DiskGuest(path)
    guest.faults.latency(100_000, on="read")
    guest.faults.gone(silent=True)
    for sector in range(10):
        guest.submit(blk.T_IN, sector, into=512)
    closing = threading.Thread(target=guest.disk.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()
    guest.__exit__()


def test_set_and_cleared_from_other_threads_under_load(guest: DiskGuest) -> None:
    over = threading.Event()
    errors: list[BaseException] = []

    def change(number: int) -> None:
        try:
            while not over.is_set():
                with guest.faults.latency(0.001, jitter=0.002, probability=0.5):
                    with guest.faults.fail(on="write", probability=0.5):
                        time.sleep(0.001)
                    with guest.faults.gone(silent=True):
                        time.sleep(0.001)
                if number == 0:
                    guest.faults.clear()
        except BaseException as err:
            errors.append(err)

    threads = [threading.Thread(target=change, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for round_ in range(60):
            for sector in range(8):
                if sector & 1:
                    guest.submit(blk.T_IN, sector, into=512)
                else:
                    guest.submit(blk.T_OUT, sector, out=pattern(sector, version=round_))
            if round_ % 10 == 9:
                started_over(guest)
            else:
                guest.answered(8)
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert not errors
    assert guest.control.faults == ()
    guest.disk.drain()
    assert guest.get(1) == pattern(1)
    assert guest.disk.faults is None


def test_notifies_are_served_while_a_request_waits(guest: DiskGuest) -> None:
    """The queue's thread (here: ours) never waits with a request."""
    guest.faults.latency(100_000, nth=1)
    begin = time.monotonic()
    guest.submit(blk.T_IN, 0, into=512)
    assert guest.get(1) == pattern(1)
    assert time.monotonic() - begin < 1000
    assert guest.transport.read(mmio.STATUS, 4) & 4


# --- wrong use ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "arguments", "says"),
    [
        ("fail", {"on": "reads"}, r"faults.disk\(0\).fail: on='reads' is not one of read, write"),
        ("fail", {"on": ()}, "on is empty"),
        ("fail", {"errno": 0}, "errno=0 is not one of errno's"),
        ("fail", {"errno": 99999}, "errno=99999 is not"),
        ("fail", {"nth": 0}, "nth=0 is not a count from 1"),
        ("fail", {"nth": []}, r"nth=\[\] is not a count from 1"),
        ("fail", {"after": -1}, "after=-1 is not a count from 0"),
        ("fail", {"times": 0}, "times=0 is not a count from 1"),
        ("fail", {"probability": 1.5}, "probability=1.5 is not from 0 to 1"),
        ("fail", {"after_flush": -1}, "after_flush=-1 is not a count from 0"),
        ("fail", {"sectors": range(0, 10, 2)}, "is not a range, or a number"),
        ("fail", {"sectors": "all"}, "sectors='all' is not a range"),
        ("fail", {"sectors": range(5, 5)}, r"range\(5, 5\) is not within the 2048 there are"),
        ("fail", {"sectors": 2048}, "is not within the 2048"),
        ("fail", {"on": "flush", "sectors": 1}, "a flush has no sectors"),
        ("latency", {"delay": -1}, r"disk\(0\).latency: delay=-1 is not seconds from 0"),
        ("latency", {"delay": float("nan")}, "delay=nan is not seconds"),
        ("latency", {"delay": 1, "jitter": "x"}, "jitter='x' is not seconds"),
        ("short_read", {"keep": -1}, "keep=-1 is not bytes from 0"),
        ("drop", {"on": "read"}, "a read cannot be dropped"),
        ("corrupt", {"on": "flush"}, "on='flush' is not read or write"),
        ("volatile", {"cache": 1}, "cache=1 is not at least 512 bytes"),
    ],
    ids=str,
)
def test_wrong_arguments(guest: DiskGuest, call: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        getattr(guest.faults, call)(**arguments)
    assert "\n" not in str(caught.value)
    assert guest.control.faults == () and guest.disk.faults is None


def test_other_wrong_uses(guest: DiskGuest) -> None:
    with pytest.raises(TypeError, match="no such keyword: sector"):
        guest.faults.fail(sector=3)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="'x' is not an integer"):
        guest.control.reseed("x")  # type: ignore[arg-type]
    guest.control.close()
    with pytest.raises(StateError, match="faults of blk: the machine is closed"):
        guest.faults.fail()


def test_a_fault_that_ends_while_a_request_is_on_its_way_to_wait(guest: DiskGuest) -> None:
    """Between what is decided for a request and its being held, another thread may clear it."""
    fault = guest.faults.gone(silent=True)
    plan = guest.disk.faults.plan  # type: ignore[union-attr]

    def slow(*request: Any) -> Any:
        planned = plan(*request)
        fault.clear()
        return planned

    guest.disk.faults.plan = slow  # type: ignore[method-assign, union-attr]
    assert guest.get(3) == pattern(3)
    assert guest.disk.faults is None
