"""Functions of the program as servers on vsock ports, with a driver of ours for a guest."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import tiny
from tests.support.bare import until
from tests.support.vsock_guest import GuestOf
from vmm import AsyncMachine, Machine, MachineConfig, StateError, UsageError
from vmm.aio import vsock as aio_vsock
from vmm.machine import exits, vsock_binding
from vmm.virtio import vsock_packet as vp

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(120)]

Make = Callable[..., Machine]
PORT = 5000


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Make]:
    """Makes machines with a socket device; nothing may be left of them."""
    before = tiny.descriptors(), threading.active_count()

    def make(**options: object) -> Machine:
        values: dict[str, object] = {"memory": 16 << 20, "vsock": "cid=42", **options}
        return Machine(MachineConfig(tiny.kernel(tmp_path, tiny.HALT), **values))  # type: ignore[arg-type]

    yield make
    assert (tiny.descriptors(), threading.active_count()) == before


def connect(guest: GuestOf, host_port: int, guest_port: int = PORT) -> None:
    guest.send(vp.OP_REQUEST, guest_port, host_port)
    assert guest.expect(vp.OP_RESPONSE).dst_port == guest_port


def upper(sock: socket.socket) -> None:
    while data := sock.recv(100):
        sock.sendall(data.upper())


@pytest.mark.parametrize("when", ["created", "running", "paused"])
def test_a_guest_is_answered(machine: Make, when: str) -> None:
    m = machine()
    if when == "created":
        m.bind_vsock(1024, upper)
    m.start()
    if when == "running":
        m.bind_vsock(1024, upper)
    elif when == "paused":
        m.pause()
        m.bind_vsock(1024, upper)
        m.resume()
    with GuestOf(m) as guest:
        for port in (PORT, PORT + 1):
            connect(guest, 1024, port)
        for port in (PORT, PORT + 1):
            guest.send(vp.OP_RW, port, 1024, b"hello %d" % port)
            answer = guest.expect(vp.OP_RW)
            assert (answer.data, answer.dst_port) == (b"HELLO %d" % port, port)
        guest.send(vp.OP_SHUTDOWN, PORT, 1024, flags=vp.SHUTDOWN_BOTH)
        assert guest.expect(vp.OP_RST).dst_port == PORT
        guest.send(vp.OP_REQUEST, PORT, 1025)  # nobody is there
        assert guest.expect(vp.OP_RST).src_port == 1025


def test_the_connection_ends_when_the_function_returns(machine: Make) -> None:
    m = machine()
    m.bind_vsock(7, lambda sock: sock.sendall(b"the time is late"))
    m.start()
    with GuestOf(m) as guest:
        connect(guest, 7)
        assert guest.expect(vp.OP_RW).data == b"the time is late"
        assert guest.expect(vp.OP_SHUTDOWN).flags == vp.SHUTDOWN_BOTH


def test_what_it_raises_ends_the_machine(machine: Make) -> None:
    def broken(sock: socket.socket) -> None:
        raise LookupError("not this one")

    m = machine()
    m.bind_vsock(7, broken)
    m.start()
    with GuestOf(m) as guest:
        connect(guest, 7)
        ended = m.wait(60)
    assert (ended.kind, ended.message) == (
        exits.MONITOR_ERROR,
        "monitor error: LookupError: not this one",
    )
    assert "in the function bound to vsock port 7" in ended.report
    assert "in broken" in ended.report


def test_a_guest_that_goes_away_ends_its_connection_only(machine: Make) -> None:
    ended = threading.Event()

    def talk(sock: socket.socket) -> None:
        try:
            while True:
                sock.sendall(b"x" * 1000)
        finally:
            ended.set()

    m = machine()
    m.bind_vsock(7, talk)
    m.start()
    with GuestOf(m) as guest:
        connect(guest, 7)
        guest.expect(vp.OP_RW)
        guest.send(vp.OP_RST, PORT, 7)
        assert ended.wait(60)
        assert m.state == "running"


@pytest.mark.parametrize("end", ["stop", "close"])
def test_functions_that_wait_are_told_of_the_end(machine: Make, end: str) -> None:
    got: list[bytes] = []
    done = threading.Event()

    def wait(sock: socket.socket) -> None:
        got.append(sock.recv(1))
        got.append(sock.recv(1))
        done.set()

    m = machine()
    m.bind_vsock(7, wait)
    m.start()
    with GuestOf(m) as guest:
        connect(guest, 7)
        guest.send(vp.OP_RW, PORT, 7, b"1")
        until(lambda: got == [b"1"])
        if end == "stop":
            m.stop()
            assert done.wait(60)
    assert got == [b"1", b""]


def test_unbound_it_takes_no_more(machine: Make) -> None:
    m = machine()
    unbind = m.bind_vsock(7, upper)
    m.start()
    with GuestOf(m) as guest:
        connect(guest, 7)
        unbind()
        unbind()
        guest.send(vp.OP_REQUEST, PORT + 1, 7)
        assert guest.expect(vp.OP_RST).dst_port == PORT + 1
        guest.send(vp.OP_RW, PORT, 7, b"still here")
        assert guest.expect(vp.OP_RW).data == b"STILL HERE"
        m.bind_vsock(7, lambda sock: sock.sendall(b"another"))
        connect(guest, 7, PORT + 2)
        assert guest.expect(vp.OP_RW).data == b"another"


def test_more_connections_than_a_port_takes(machine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock_binding, "CONNECTIONS_MAX", 2)
    m = machine()
    m.bind_vsock(7, upper)
    m.start()
    with GuestOf(m) as guest:
        for port in (PORT, PORT + 1, PORT + 2):
            connect(guest, 7, port)
        assert guest.expect(vp.OP_SHUTDOWN).dst_port == PORT + 2
        guest.send(vp.OP_RW, PORT + 1, 7, b"in time")
        assert guest.expect(vp.OP_RW).data == b"IN TIME"


def test_wrong_use(machine: Make) -> None:
    with machine(vsock=None) as m, pytest.raises(StateError, match="no socket device; make it wi"):
        m.bind_vsock(7, upper)
    with machine() as m:
        m.bind_vsock(7, upper)
        with pytest.raises(UsageError, match="bind_vsock: port 7 is bound already"):
            m.bind_vsock(7, upper)
        for port in (-1, 1 << 32):
            with pytest.raises(UsageError, match=f"bind_vsock: {port} is not a port from 0 to 429"):
                m.bind_vsock(port, upper)
        m.start()
        m.stop()
        with pytest.raises(StateError, match="bind_vsock: the machine is stopped, not created or"):
            m.bind_vsock(8, upper)


# --- asyncio --------------------------------------------------------------------------------------


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(100):
        writer.write(data.upper())


def test_coroutines_answer(machine: Make) -> None:
    async def main() -> None:
        async with AsyncMachine(machine) as m:
            m.bind_vsock(1024, answer)
            await m.start()
            guest = await m.call(GuestOf, m.machine)
            for port in (PORT, PORT + 1):
                await m.call(connect, guest, 1024, port)
            for port in (PORT, PORT + 1):
                guest.send(vp.OP_RW, port, 1024, b"hello")
            got = [(await m.call(guest.expect, vp.OP_RW)).data for _ in range(2)]
            assert got == [b"HELLO"] * 2
            tasks = asyncio.all_tasks()
            assert len(tasks) == 3
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_guest_that_is_quicker_than_the_loop(
    machine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It connects and hangs up, again and again, while the program's loop does something else."""
    monkeypatch.setattr(aio_vsock, "CONNECTIONS_MAX", 4)
    m = machine()

    def storm() -> int:
        with GuestOf(m) as guest:
            for port in range(100):
                guest.send(vp.OP_REQUEST, PORT + port, 1024)
                guest.send(vp.OP_RST, PORT + port, 1024)
                guest.poll()
            guest.settle()
            kept = len(tiny.descriptors())
            busy.set()
        return kept

    async def main() -> None:
        async with AsyncMachine(m) as am:
            am.bind_vsock(1024, answer)
            await am.start()
            kept: list[int] = []
            before = len(tiny.descriptors())
            thread = threading.Thread(target=lambda: kept.append(storm()))
            thread.start()
            assert busy.wait(60)  # the loop waits, too
            await asyncio.sleep(0)
            thread.join()
            assert kept[0] - before < 16

    busy = threading.Event()
    asyncio.run(main())


def test_what_a_coroutine_raises_ends_the_machine(machine: Make) -> None:
    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise LookupError("not this one")

    async def main() -> None:
        async with AsyncMachine(machine) as m:
            unbind = m.bind_vsock(7, broken)
            await m.start()
            guest = await m.call(GuestOf, m.machine)
            await m.call(connect, guest, 7)
            ended = await m.wait(60)
            assert ended.message == "monitor error: LookupError: not this one"
            assert "in the function bound to vsock port 7" in ended.report
            unbind()

    asyncio.run(main())


def test_coroutines_that_wait_are_told_of_the_end_or_cancelled(machine: Make) -> None:
    said: list[object] = []

    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said.append(await reader.read())

    async def sleep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            said.append("cancelled")

    async def main() -> None:
        async with AsyncMachine(machine) as m:
            m.bind_vsock(7, read)
            m.bind_vsock(8, sleep)
            await m.start()
            guest = await m.call(GuestOf, m.machine)
            await m.call(connect, guest, 7)
            await m.call(connect, guest, 8, PORT + 1)
            await m.stop()
            while not said:
                await asyncio.sleep(0.001)
            assert said == [b""]
        assert said == [b"", "cancelled"]

    asyncio.run(main())
