"""The control socket of a machine (`--control PATH`), by which `vmm snapshot` reaches it.

A client sends one JSON object on a line and gets one back. `{"snapshot": {"path": DIR, ...}}` has
the arguments of `Machine.snapshot` and `stop` (end the machine when it is made), the answer is `{}`
or `{"error": text, "status": exit status}`. `{"resize": {"disk": "blk0", "size": BYTES}}` has a
disk grow (without size: to what its image has become), the answer is `{"size": BYTES}`. Only the
user who started it may connect.
"""

from __future__ import annotations

import json
import os
import select
import socket
import stat
import threading
import time
from contextlib import contextmanager, nullcontext, suppress

from vmm.errors import HostError, UsageError, VmmError
from vmm.forked import drop_in_child
from vmm.snapshot import trust
from vmm.virtio import unix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from typing import Any, Self, TypeAlias

    from vmm.cli.control_requests import Requests
    from vmm.machine import Machine
    from vmm.sandbox.broker import Broker, Policy

    Perform: TypeAlias = Callable[[str, dict[str, Any]], dict[str, object]]
    """Does the request of that name; its answer. Raises VmmError."""

LINE_MAX = 1 << 20
CLIENTS_MAX = 16
"""Connections at once. For one more, the one that has been idle longest is closed."""
PATIENCE = 10.0
"""Seconds from a request's first byte to its last, and for a client to take an answer."""
LOOK = 0.2
"""Seconds between looks whether a client that waits for its turn is still there."""
SHOWN_MAX = 200
"""Characters of a client's words in an answer."""
OPTION = "--control"
KEYS = {"path": str, "base": str, "disks": str, "track": bool}


class Gone(Exception):
    """The client has gone, and wants nothing any more; or the machine is closed."""


class Client:
    """One connection.

    Attributes:
        busy: a request of its is under way.
        since: when it became idle.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.busy = False
        self.since = time.monotonic()
        self._rest = b""

    def request(self) -> bytes:
        """The next line, without its end; empty where there will be none. Raises OSError."""
        deadline = None
        while b"\n" not in self._rest and len(self._rest) <= LINE_MAX:
            if self._rest:
                deadline = deadline or time.monotonic() + PATIENCE
                self.sock.settimeout(max(deadline - time.monotonic(), 0.001))
            else:
                self.sock.settimeout(None)  # a client may be silent; others do not wait for it
            data = self.sock.recv(65536)
            if not data:
                return b""
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line or b" "

    def answer(self, answer: dict[str, object]) -> None:
        """Send `answer`. Raises OSError."""
        self.sock.settimeout(PATIENCE)
        self.sock.sendall(json.dumps(answer).encode() + b"\n")

    def check(self) -> None:
        """Raises Gone where nobody waits for an answer. One that has only ended its own direction
        (`nc -N`) is there."""
        poll = select.poll()
        poll.register(self.sock, 0)
        if poll.poll(0):
            raise Gone


class Control:
    """The control socket at `path`, from construction to `close`; a context manager.

    Clients of `machine` are answered from now on, or, without `at_once`, from `begin` on.

    Attributes:
        path: where it is.

    Raises:
        UsageError: there can be no socket there.
    """

    def __init__(self, path: str, machine: Machine, *, at_once: bool = True) -> None:
        option = f"{OPTION} {path}"
        unix.check_path(option, path)
        trust.prepare(machine.config, machine.directory)
        self.path = path
        self._requests: Requests | None = None
        self._server: Server | None = None
        self._far: socket.socket | None = None
        self._near: socket.socket | None = None
        self._thread: threading.Thread | None = None
        before = os.umask(0o077)
        try:
            self._listener, self._identity = unix.listen(path, option)
        finally:
            os.umask(before)
        if at_once:
            from vmm.cli.control_requests import Requests

            self.begin(Requests(machine))

    @property
    def busy(self) -> bool:
        """Whether the machine is paused because of a request."""
        return self._requests is not None and self._requests.busy

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def hand_over(self, broker: Broker) -> None:
        """Have clients be served in the process of `broker`, by `serve_in_broker`."""
        self._near, self._far = socket.socketpair()
        broker.hand_over(self._listener.fileno())
        broker.hand_over(self._far.fileno())

    def begin(self, requests: Requests) -> None:
        """Answer clients from now on, by `requests`."""
        self._requests = requests
        if self._near is None:
            self._server = Server(self._listener, requests.perform)
            return
        assert self._far is not None
        self._far.close()
        self._listener.close()
        self._thread = threading.Thread(target=self._relay, name="control", daemon=True)
        self._thread.start()

    def _relay(self) -> None:
        """Do what the broker's clients ask for."""
        assert self._near is not None and self._requests is not None
        with self._near.makefile("rwb") as stream, suppress(OSError, ValueError):
            while line := stream.readline(LINE_MAX + 1):
                (name, request), *_ = json.loads(line).items()
                try:
                    answer = self._requests.perform(name, request)
                except VmmError as err:
                    answer = {"error": str(err), "status": err.exit_status}
                stream.write(json.dumps(answer).encode() + b"\n")
                stream.flush()
        self._requests.abandoned()

    def close(self) -> None:
        """Remove the socket; a request under way is answered first."""
        unix.remove(self.path, self._identity)
        if self._server is not None:
            self._server.close()
        if self._near is not None and self._thread is not None:
            with suppress(OSError):
                self._near.shutdown(socket.SHUT_RD)
            self._thread.join()
            self._near.close()
        self._listener.close()


def serve_in_broker(policy: Policy, fds: list[int]) -> Callable[[], object]:
    """In the broker: serve clients, and have the monitor do what they ask for; what ends that.

    A snapshot's directory may be made for as long as a client waits for it.
    """
    listener = socket.socket(fileno=fds[0])
    stream = socket.socket(fileno=fds[1]).makefile("rwb")

    def perform(name: str, request: dict[str, Any]) -> dict[str, object]:
        try:
            stream.write(json.dumps({name: request}).encode() + b"\n")
            stream.flush()
            answer = json.loads(stream.readline(LINE_MAX))
        except (OSError, ValueError, RecursionError):
            raise HostError("the machine ended before it was done") from None
        if not isinstance(answer, dict):
            raise HostError("the machine's answer is none")
        if "error" in answer:
            error = VmmError(str(answer["error"]))
            status = answer.get("status")
            error.exit_status = status if isinstance(status, int) else HostError.exit_status
            raise error
        return answer

    def allow(request: dict[str, Any]) -> AbstractContextManager[None]:
        from vmm.snapshot.chain import chain

        base = request.get("base")
        return policy.making(request["path"], chain(base) if base is not None else [])

    return Server(listener, perform, allow).close


class Server:
    """Answers on a listening socket by `perform` until it is closed.

    Each client has a thread: one that is silent holds nobody up. Requests are carried out one at a
    time, and only for a client that is still there when its turn comes. `allow` is entered for as
    long as a snapshot is made.
    """

    def __init__(
        self,
        listener: socket.socket,
        perform: Perform,
        allow: Callable[[dict[str, Any]], AbstractContextManager[None]] = lambda _: nullcontext(),
    ) -> None:
        self._listener = listener
        self._perform = perform
        self._allow = allow
        listener.setblocking(True)
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._clients: dict[threading.Thread, Client] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._main, name="control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; a request under way is answered first."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(2)
        self._thread.join()
        with self._lock:
            clients = dict(self._clients)
        for client in clients.values():
            with suppress(OSError):
                client.sock.shutdown(socket.SHUT_RD)
        for thread in clients:
            thread.join()
        self._listener.close()

    def _main(self) -> None:
        while not self._closed:
            try:
                sock = self._listener.accept()[0]
            except OSError:
                time.sleep(LOOK)  # closed; or no descriptors for now
                continue
            drop_in_child(sock)
            client = Client(sock)
            thread = threading.Thread(
                target=self._serve, args=(client,), name="control-client", daemon=True
            )
            with self._lock:
                if not self._make_room():
                    sock.close()
                    continue
                self._clients[thread] = client
            try:
                thread.start()
            except RuntimeError:  # the host has no more threads for now
                with self._lock:
                    self._clients.pop(thread, None)
                sock.close()
                time.sleep(LOOK)

    def _make_room(self) -> bool:
        """Close an idle connection where there are too many; whether there is room now."""
        if len(self._clients) < CLIENTS_MAX:
            return True
        idle = [item for item in self._clients.items() if not item[1].busy]
        if not idle:
            return False
        thread, client = min(idle, key=lambda item: item[1].since)
        del self._clients[thread]
        with suppress(OSError):
            client.sock.shutdown(socket.SHUT_RDWR)  # wakes its thread, which closes it
        return True

    def _serve(self, client: Client) -> None:
        try:
            with client.sock, suppress(OSError, Gone):
                while line := client.request():
                    client.busy = True
                    client.answer(self._answer(line, client))
                    client.busy, client.since = False, time.monotonic()
                    if len(line) > LINE_MAX:
                        return
        finally:
            with self._lock:
                self._clients.pop(threading.current_thread(), None)

    @contextmanager
    def _turn_of(self, client: Client) -> Iterator[None]:
        """Wait for the requests before. Raises Gone."""
        while not self._turn.acquire(timeout=LOOK):
            self._check(client)
        try:
            self._check(client)
            yield
        finally:
            self._turn.release()

    def _check(self, client: Client) -> None:
        if self._closed:
            raise Gone
        client.check()

    def _answer(self, line: bytes, client: Client) -> dict[str, object]:
        try:
            request = _parse(line)
            if isinstance(request, dict) and list(request) == ["resize"]:
                with self._turn_of(client):
                    return self._perform("resize", _resize(request["resize"]))
            if not isinstance(request, dict) or list(request) != ["snapshot"]:
                raise UsageError("a request is {'snapshot': {...}} or {'resize': {...}}")
            with self._turn_of(client):
                self._snapshot(_snapshot(request["snapshot"]), client)
        except VmmError as err:
            return {"error": str(err), "status": err.exit_status}
        return {}

    def _snapshot(self, request: dict[str, Any], client: Client) -> None:
        with self._allow(request):
            self._perform("snapshot", request)
        if not request["stop"]:
            return
        end = False
        try:
            client.check()  # one that has given up gets no machine ended
            end = True
        finally:
            self._perform("finish", {"path": request["path"], "end": end})


def _resize(request: Any) -> dict[str, Any]:
    if not isinstance(request, dict) or not {"disk"} <= set(request) <= {"disk", "size"}:
        raise UsageError("resize: it takes disk, and maybe size")
    name, size = request["disk"], request.get("size")
    if not isinstance(name, str) or not (size is None or type(size) is int):
        shown = str(name)[:SHOWN_MAX], str(size)[:SHOWN_MAX]
        raise UsageError(f"resize: disk={shown[0]!r}, size={shown[1]} cannot be")
    return request


def _snapshot(request: Any) -> dict[str, Any]:
    if not isinstance(request, dict) or "path" not in request:
        raise UsageError("snapshot: path is missing")
    stop = bool(request.pop("stop", False))
    for key, value in request.items():
        if key not in KEYS or type(value) is not KEYS[key] or not _is_name(value):
            raise UsageError(f"snapshot: {key}={repr(value)[:SHOWN_MAX]} cannot be")
    return {**request, "stop": stop}


def _parse(line: bytes) -> object:
    """What a client asks for. Raises UsageError."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError("a request is one line of JSON") from None


def _is_name(value: object) -> bool:
    """Whether a text can be a file's name: JSON can say what none has."""
    try:
        return not isinstance(value, str) or b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def ask(path: str, request: dict[str, object]) -> dict[str, object]:
    """Send `request` to the machine at `path`, and wait until it is done; its answer.

    Raises:
        HostError: nobody is there, or it ends meanwhile.
        VmmError: it says why not.
    """
    unix.check_path(f"{OPTION} {path}", path)
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            unix.connect(sock, path)
        except OSError as err:
            if os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
                raise UsageError(
                    f"{OPTION} {path} is no socket; give the path that the machine was started with"
                ) from None
            raise HostError(
                f"{OPTION} {path}: {err.strerror}; start the machine with {OPTION} {path}"
            ) from None
        with sock.makefile("rwb") as stream:
            try:
                stream.write(json.dumps(request).encode() + b"\n")
                stream.flush()
                line = stream.readline(LINE_MAX)
            except OSError:
                line = b""
    if not line:
        raise HostError(f"{OPTION} {path}: the machine ended before it was done")
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise HostError(f"{OPTION} {path}: no machine's answer comes from there")
    if "error" in answer:
        status = answer.get("status")
        error = VmmError(" ".join(str(answer["error"]).split()))
        error.exit_status = status if type(status) is int and 0 < status < 128 else 1
        raise error
    return answer
