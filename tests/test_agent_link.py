"""The way to the agent over the socket device, with a driver of the test in place of a guest."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tests.support import tiny
from tests.support.vsock_guest import Guest
from vmm.agent import wire
from vmm.agent.link import HELLO_PORT, PORT, Link
from vmm.errors import AgentError
from vmm.virtio import vsock_packet as vp

HELLO = wire.HELLO.pack(wire.MAGIC, wire.VERSION, 0)


class Console:
    text = b"a kernel's words\n"

    def __call__(self) -> bytes:
        return self.text


@pytest.fixture
def links() -> Iterator[list[Link]]:
    """Closed once the device is."""
    made: list[Link] = []
    yield made
    for link in made:
        link.close()


@pytest.fixture
def guest(links: list[Link]) -> Iterator[Guest]:
    with Guest(None) as made:
        yield made


@pytest.fixture
def console() -> Console:
    return Console()


@pytest.fixture
def link(guest: Guest, console: Console, links: list[Link]) -> Link:
    links.append(Link(guest.device, console))
    return links[-1]


def call(guest: Guest, hello: bytes = HELLO, port: int = HELLO_PORT) -> None:
    """What the agent does first."""
    guest.send(vp.OP_REQUEST, port, PORT)
    guest.expect(vp.OP_RESPONSE)
    guest.send(vp.OP_RW, port, PORT, hello)


def seed(guest: Guest) -> bytes:
    """What the host answers the first call with, before anything else."""
    packet = guest.expect(vp.OP_RW)
    assert (packet.dst_port, len(packet.data)) == (HELLO_PORT, wire.SEED)
    return packet.data


def test_the_agent_calls(guest: Guest, link: Link) -> None:
    assert not link.ready
    told = threading.Event()
    link.when_ready(told.set)
    call(guest)
    link.wait(30)
    assert told.wait(30)
    assert link.ready


def test_nothing_is_left_of_it(console: Console) -> None:
    before = tiny.descriptors()
    with Guest(None) as guest:
        link = Link(guest.device, console)
        call(guest)
        link.wait(30)
    link.close()
    assert tiny.opened_since(before) == []


def test_connections(guest: Guest, link: Link) -> None:
    call(guest)
    link.wait(30)
    with link.connect() as sock:
        seed(guest)
        sock.settimeout(30)
        sock.sendall(b"before it is accepted")
        request = guest.expect(vp.OP_REQUEST)
        assert request.dst_port == PORT
        guest.send(vp.OP_RESPONSE, PORT, request.src_port)
        assert guest.expect(vp.OP_RW).data == b"before it is accepted"
        guest.send(vp.OP_RW, PORT, request.src_port, b"and back")
        assert sock.recv(100) == b"and back"
        guest.send(vp.OP_RST, PORT, request.src_port)
        assert sock.recv(100) == b""
    with link.connect() as sock:  # nobody listens
        sock.settimeout(30)
        guest.send(vp.OP_RST, PORT, guest.expect(vp.OP_REQUEST).src_port)
        assert sock.recv(100) == b""


def test_what_the_console_says_has_no_way_to_the_terminal(console: Console, link: Link) -> None:
    """A traceback prints an exception's text as it is."""
    console.text = b"\x1b]0;evil\x07\x1b[2Jlast words\x9b\r\n" + "\u202e\n".encode()
    with pytest.raises(AgentError) as late:
        link.wait(0.01)
    console.text += b"vmm-agent: cannot \x1b[2J" + b"x" * 10_000 + b"\n"
    with pytest.raises(AgentError, match=r"cannot \\x1b\[2Jxxx") as cannot:
        link.wait(0.01)
    for text in (str(late.value), str(cannot.value)):
        assert text.isprintable() and len(text) < 600


def test_who_may_call(guest: Guest, link: Link) -> None:
    """A program in the guest that is not root has no such port."""
    guest.send(vp.OP_REQUEST, 2000, PORT)
    guest.expect(vp.OP_RESPONSE)
    assert guest.expect(vp.OP_SHUTDOWN).dst_port == 2000
    assert not link.ready


@pytest.mark.parametrize(
    ("hello", "said"),
    [
        (wire.HELLO.pack(wire.MAGIC, 9, 0), "speaks version 9"),
        (wire.HELLO.pack(5, wire.VERSION, 0), "is not vmm's agent"),
        (b"short", "says 5 bytes for a greeting"),
        (HELLO + b"more", "says 12 bytes for a greeting"),
    ],
)
def test_greetings_that_are_none(guest: Guest, link: Link, hello: bytes, said: str) -> None:
    call(guest, hello)
    with pytest.raises(AgentError, match=said):
        link.wait(30)
    guest.expect(vp.OP_SHUTDOWN)
    guest.send(vp.OP_RST, HELLO_PORT, PORT)
    call(guest)  # another agent is another matter
    limit = time.monotonic() + 30
    while True:
        try:
            if link.ready:
                break
        except AgentError:
            pass
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_the_agent_goes_and_comes_back(guest: Guest, link: Link) -> None:
    call(guest)
    seed(guest)
    link.wait(30)
    guest.send(vp.OP_RST, HELLO_PORT, PORT)
    limit = time.monotonic() + 30
    while link.ready:
        assert time.monotonic() < limit
        time.sleep(0.01)
    call(guest)
    link.wait(30)


def test_no_answer(link: Link, console: Console) -> None:
    with pytest.raises(AgentError, match=r"not answered within 0.1 s; .*: a kernel's words"):
        link.wait(0.1)
    console.text = b"[    1.0]\r\nvmm-agent: cannot listen on a vsock; no\r\nmore\r\n"
    with pytest.raises(AgentError, match=r"does not run: vmm-agent: cannot listen on a vsock; no$"):
        link.wait(30)


def test_the_machine_ends(guest: Guest, link: Link) -> None:
    call(guest)
    link.wait(30)
    with link.connect() as sock:
        sock.settimeout(30)
        waiting = threading.Thread(target=lambda: sock.recv(1))
        waiting.start()
        link.end("the guest powered off")
        waiting.join(30)
        assert not waiting.is_alive()
    assert link.why_lost() == "the machine ended: the guest powered off"
    with pytest.raises(AgentError, match="ended before its agent answered: the guest powered off"):
        link.wait(30)
    with pytest.raises(AgentError, match="the machine has ended: the guest powered off"):
        link.connect()
    link.revive()
    assert link.ready


def test_the_end_wakes_who_waits(link: Link) -> None:
    found: list[str] = []

    def wait() -> None:
        try:
            link.wait(60)
        except AgentError as err:
            found.append(str(err))

    waiting = threading.Thread(target=wait)
    waiting.start()
    link.end("pulled")
    waiting.join(30)
    assert found == ["the machine ended before its agent answered: pulled"]


def test_power_off(guest: Guest, link: Link) -> None:
    link.power_off()  # nobody is there: nothing happens
    call(guest)
    link.wait(30)
    link.power_off()
    seed(guest)
    request = guest.expect(vp.OP_REQUEST)
    guest.send(vp.OP_RESPONSE, PORT, request.src_port)
    assert guest.expect(vp.OP_RW).data == wire.request(wire.POWER_OFF, ["/"])
