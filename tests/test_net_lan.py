"""vmm/net/lan.py: a switch that learns, between cards of one process."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

import pytest

from tests.support.net_guest import NetGuest
from vmm.net import lan as lan_module
from vmm.net.config import Net
from vmm.net.lan import Lan
from vmm.virtio import net_spec as n
from vmm.virtio.net import Nic

HEADER = bytes(n.HEADER_SIZE)
MACS = [bytes((2, 0, 0, 0, 0, at)) for at in range(1, 6)]
ALL = b"\xff" * 6


def frame(to: bytes, source: bytes, size: int = 60) -> bytes:
    return to + source + b"\x88\xb5" + os.urandom(size - 14)


@pytest.fixture
def join() -> Iterator[Callable[..., NetGuest]]:
    lan = Lan()
    guests: list[NetGuest] = []

    def card(**how: bool) -> NetGuest:
        nic = Nic(lan.connect(), mac=MACS[len(guests)], name=f"net{len(guests)}")
        guests.append(NetGuest(nic, buffers=40, **how))
        return guests[-1]

    yield card
    for guest in guests:
        guest.__exit__()
    assert lan._ports == [] and lan._where == {}


def test_it_learns_who_is_where(join: Callable[..., NetGuest]) -> None:
    a, b, c = join(), join(packed=True), join(event_idx=True)
    first = frame(MACS[1], MACS[0])  # nobody knows where that is: all get it
    a.send(first)
    assert b.frame() == c.frame() == first
    back = frame(MACS[0], MACS[1])
    b.send(back)
    assert a.frame() == back
    again = frame(MACS[1], MACS[0], 65534)
    a.send(again)
    assert b.frame() == again
    assert c.silent() and a.silent()


def test_broadcast_and_groups_go_to_all_others(join: Callable[..., NetGuest]) -> None:
    a, b, c = join(), join(), join()
    for to in (ALL, bytes.fromhex("01005e000001")):
        sent = frame(to, MACS[0])
        a.send(sent)
        assert b.frame() == c.frame() == sent
        assert a.silent(0.02)


def test_an_address_moves(join: Callable[..., NetGuest]) -> None:
    a, b, c = join(), join(), join()
    a.send(frame(ALL, MACS[3]))
    b.send(frame(ALL, MACS[3]))
    for guest, count in ((a, 1), (b, 1), (c, 2)):
        for _ in range(count):
            guest.frame()
    sent = frame(MACS[3], MACS[2])
    c.send(sent)
    assert b.frame() == sent
    assert a.silent()


def test_what_a_sender_puts_into_the_header_stays_with_it(join: Callable[..., NetGuest]) -> None:
    a, b = join(), join()
    sent = frame(ALL, MACS[0])
    a.send(sent, b"\xff" * n.HEADER_SIZE)
    assert b.receive() == HEADER[:10] + b"\1\0" + sent


def test_a_group_address_is_not_learnt(join: Callable[..., NetGuest]) -> None:
    a, b, c = join(), join(), join()
    a.send(frame(ALL, ALL))
    b.frame(), c.frame()
    sent = frame(ALL, MACS[1])
    b.send(sent)
    assert a.frame() == c.frame() == sent


def test_a_guest_that_does_not_read_loses_frames(
    join: Callable[..., NetGuest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lan_module, "QUEUE_FRAMES", 50)
    a, b = join(), join()
    sent = [frame(ALL, MACS[0]) for _ in range(200)]
    for each in sent:
        a.send(each)
    got = []
    while not b.silent(0.05):
        got += [packet[n.HEADER_SIZE :] for packet in b.packets]
        b.packets = []
    rest = iter(sent)
    assert all(each in rest for each in got)  # in order
    assert 50 <= len(got) < 200 and got[:50] == sent[:50]
    assert b.nic.ports[0].dropped == 200 - len(got)


def test_many_addresses(join: Callable[..., NetGuest]) -> None:
    a, b = join(), join()
    for at in range(lan_module.ADDRESSES_MAX + 10):
        a.send(frame(MACS[1], b"\x02\x01" + at.to_bytes(4, "big")))
        b.poll()
    lan = a.nic.backend.lan  # type: ignore[attr-defined]
    assert len(lan._where) <= lan_module.ADDRESSES_MAX


def test_a_name_is_one_lan_while_it_is_used() -> None:
    one, two, other = (Net.parse(f"lan={name}").open(0) for name in ("red", "red", "blue"))
    assert one and two and other
    assert one.backend.lan is two.backend.lan  # type: ignore[attr-defined]
    assert one.backend.lan is not other.backend.lan  # type: ignore[attr-defined]
    assert one.config[10:12] == lan_module.MTU.to_bytes(2, "little")
    for nic in (one, two, other):
        nic.close()
    del one, two, other, nic
    gc.collect()
    assert not Lan._named
