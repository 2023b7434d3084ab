"""The control socket of a machine (`--control PATH`), by which `vmm snapshot` reaches it.

A client sends one JSON object on a line and gets one back. `{"snapshot": {"path": DIR, ...}}` has
the arguments of `Machine.snapshot` and `stop` (end the machine when it is made), the answer is `{}`
or `{"error": text, "status": exit status}`. Only the user who started it may connect.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from contextlib import suppress

from vmm.errors import HostError, UsageError, VmmError
from vmm.machine import exits
from vmm.machine.exits import MachineExit
from vmm.virtio import unix

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

    from vmm.machine import Machine

LINE_MAX = 1 << 20
OPTION = "--control"
KEYS = {"path": str, "base": str, "disks": str, "track": bool}


class Control:
    """Answers on the socket `path` for `machine` until it is closed; a context manager.

    Attributes:
        busy: the machine is paused because of a request.

    Raises:
        UsageError: there can be no socket there.
    """

    def __init__(self, path: str, machine: Machine) -> None:
        option = f"{OPTION} {path}"
        unix.check_path(option, path)
        self.busy = False
        self._path = path
        self._machine = machine
        before = os.umask(0o077)
        try:
            self._listener, self._identity = unix.listen(path, option)
        finally:
            os.umask(before)
        self._listener.setblocking(True)
        self._client: socket.socket | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._main, name="control", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the socket; a request under way is answered first."""
        self._closed = True
        unix.remove(self._path, self._identity)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(2)
        client = self._client
        if client is not None:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RD)
        self._thread.join()
        self._listener.close()

    def _main(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, suppress(OSError):
                self._client = client
                self._serve(client)
            self._client = None

    def _serve(self, client: socket.socket) -> None:
        with client.makefile("rwb") as stream:
            while line := stream.readline(LINE_MAX):
                stream.write(json.dumps(self._answer(line)).encode() + b"\n")
                stream.flush()

    def _answer(self, line: bytes) -> dict[str, object]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict) or list(request) != ["snapshot"]:
                raise UsageError("a request is {'snapshot': {...}}")
            self._snapshot(request["snapshot"])
        except VmmError as err:
            return {"error": str(err), "status": err.exit_status}
        except ValueError:
            return {"error": "a request is one line of JSON", "status": UsageError.exit_status}
        return {}

    def _snapshot(self, request: Any) -> None:
        if not isinstance(request, dict) or "path" not in request:
            raise UsageError("snapshot: path is missing")
        stop = request.pop("stop", False)
        for key, value in request.items():
            if key not in KEYS or not isinstance(value, KEYS[key]):
                raise UsageError(f"snapshot: {key}={value!r} cannot be")
        machine = self._machine
        self.busy = True
        try:
            if stop and machine.state == "running":
                machine.pause()
            machine.snapshot(**request)
            if stop:
                text = f"its snapshot {request['path']} was made"
                machine.end(MachineExit(exits.STOPPED, text, status=0))
        finally:
            if stop and machine.state == "paused":
                machine.resume()
            self.busy = False


def ask(path: str, request: dict[str, object]) -> None:
    """Send `request` to the machine at `path`, and wait until it is done.

    Raises:
        HostError: nobody is there, or it ends meanwhile.
        VmmError: it says why not.
    """
    unix.check_path(f"{OPTION} {path}", path)
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(path)
        except OSError as err:
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
    answer = json.loads(line)
    if "error" in answer:
        error = VmmError(answer["error"])
        error.exit_status = answer["status"]
        raise error
