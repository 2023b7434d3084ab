"""vmm/virtio/vhost_user*.py: a back end that stops answering holds up nobody but its guest."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import tiny
from vmm import Machine, MachineConfig
from vmm.errors import HostError
from vmm.virtio import mmio, spec
from vmm.virtio import vhost_user_wire as wire
from vmm.virtio.vhost_user_wire import BackEndGone, Connection

pytestmark = [pytest.mark.timeout(180)]

BASE = 0xD0000000
"""The first virtio device's registers."""
WITHIN = 15.0
"""Seconds that a call has here: it takes a second, or ten minutes."""
HEADER = struct.Struct("<III")


class MutePeer:
    """A back end of a disk, for any number of connections, that does not answer request `mute`."""

    def __init__(self, path: Path, mute: int) -> None:
        self.path, self.mute = str(path), mute
        self.silent = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(8)
        self._over = threading.Event()
        self._serving: list[tuple[threading.Thread, socket.socket]] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Hang up everywhere. The descriptors are closed then: the next test may count its own."""
        self._over.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(WITHIN)
        for thread, sock in self._serving:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join(WITHIN)
            assert not thread.is_alive()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock = self._listener.accept()[0]
                thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
                self._serving.append((thread, sock))
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, suppress(OSError, struct.error):
            while True:
                data, fds, _, _ = socket.recv_fds(sock, HEADER.size, 16)
                for fd in fds:
                    os.close(fd)
                request, flags, size = HEADER.unpack(data)
                payload = b""
                while len(payload) < size:
                    payload += sock.recv(size - len(payload))
                if request == self.mute:
                    self.silent.set()
                    self._over.wait()
                    return
                answer = {
                    wire.GET_FEATURES: struct.pack("<Q", spec.bits(28, 30, 32)),
                    wire.GET_PROTOCOL_FEATURES: struct.pack("<Q", spec.bits(3, 9)),
                    wire.GET_CONFIG: payload[:12] + (128).to_bytes(8, "little") + bytes(52),
                    wire.GET_VRING_BASE: payload,
                }.get(request, bytes(8) if flags & wire.NEED_REPLY else None)
                if answer is not None:
                    sock.sendall(HEADER.pack(request, 5, len(answer)) + answer)


def stores() -> bytes:
    """A guest that sets its disk up and resets it, for ever."""
    code = b""

    def write(register: int, value: int) -> None:
        nonlocal code
        code += b"\xc7\x05" + struct.pack("<II", BASE + register, value)  # mov dword [at], value

    for status in (0, 1, 3):
        write(mmio.STATUS, status)
    write(mmio.DRIVER_FEATURES_SEL, 0)
    write(mmio.DRIVER_FEATURES, 0)
    write(mmio.DRIVER_FEATURES_SEL, 1)
    write(mmio.DRIVER_FEATURES, 1)
    write(mmio.STATUS, 11)
    write(mmio.QUEUE_SEL, 0)
    write(mmio.QUEUE_NUM, 16)
    for register, address in (
        (mmio.QUEUE_DESC, 0x400000), (mmio.QUEUE_DRIVER, 0x401000),
        (mmio.QUEUE_DEVICE, 0x402000),
    ):  # fmt: skip
        write(register, address)
        write(register + 4, 0)
    write(mmio.QUEUE_READY, 1)
    write(mmio.STATUS, 15)
    return code + b"\xe9" + struct.pack("<i", -len(code) - 5)  # jmp to the beginning


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back ends have ten minutes."""
    monkeypatch.setattr(wire, "TIMEOUT", 600.0)


@pytest.fixture(params=["GET_VRING_BASE", "SET_MEM_TABLE", "SET_VRING_ENABLE"])
def peer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MutePeer]:
    peer = MutePeer(tmp_path / "peer", getattr(wire, request.param))
    yield peer
    peer.close()


def timed(function: Callable[[], object]) -> None:
    begun = time.monotonic()
    function()
    assert time.monotonic() - begun < WITHIN


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("what", ["pause", "stop", "close"])
def test_a_vcpu_that_waits_for_it_is_had_all_the_same(
    peer: MutePeer, what: str, tmp_path: Path
) -> None:
    kernel = tiny.kernel(tmp_path, stores())
    config = MachineConfig(kernel, memory="64M", console="none", vhost_user_blks=[peer.path])
    machine = Machine(config)
    try:
        machine.start()
        assert peer.silent.wait(60)
        timed(getattr(machine, what))
        if what == "pause":
            assert machine.state == "paused"
            machine.resume()
            timed(machine.pause)  # the guest, which goes on, has met it again or not
    finally:
        timed(machine.close)


def with_peer(peer: Callable[[socket.socket], object], ask: Callable[[Connection], object]) -> None:
    """`ask` finds the back end gone."""
    ours, theirs = socket.socketpair()

    def main() -> None:
        with theirs, suppress(OSError):
            peer(theirs)

    thread = threading.Thread(target=main)
    thread.start()
    connection = Connection(ours, "the back end")
    try:
        with pytest.raises(BackEndGone, match="does not answer in time"):
            timed(lambda: ask(connection))
    finally:
        connection.close()
        thread.join()


def test_a_byte_now_and_then_does_not_prolong_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "TIMEOUT", 0.4)

    def drip(sock: socket.socket) -> None:
        while True:
            sock.sendall(b"\1")
            time.sleep(0.1)

    with_peer(drip, lambda one: one.get_u64(wire.GET_FEATURES))


def test_one_that_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages without an answer fill its socket."""
    monkeypatch.setattr(wire, "TIMEOUT", 0.4)
    over = threading.Event()

    def write(connection: Connection) -> None:
        try:
            for _ in range(1_000_000):
                connection.set_config(0, bytes(256))
        finally:
            over.set()

    with_peer(lambda _: over.wait(60), write)


def test_who_no_longer_wants_an_answer_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "TIMEOUT", 600.0)
    over = threading.Event()

    def ask(connection: Connection) -> None:
        connection.hurry(0.0)  # nothing is under way: the next one has its time
        timer = threading.Timer(0.3, connection.hurry, [0.1])
        timer.start()
        try:
            connection.get_u64(wire.GET_FEATURES)
        finally:
            over.set()

    with_peer(lambda _: over.wait(60), ask)
    over.clear()

    def ended(connection: Connection) -> None:
        connection.over = lambda: True
        try:
            connection.get_u64(wire.GET_FEATURES)
        except HostError:
            over.set()
            raise

    with_peer(lambda _: over.wait(60), ended)
