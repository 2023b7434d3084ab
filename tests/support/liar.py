"""A zygote whose machines' processes lie to the program, as a guest that has taken one over may.

Each makes a real machine and serves it, until a frame that the lie is about. The lie is named in
the machine's `append`: `lie=KIND@WHERE`, WHERE being `facts` (the first answer), `answer` or
`event`.
"""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import time
from pathlib import Path
from typing import Any

from vmm.isolated import server, wire, zygote

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    f"sys.path.insert(0, {str(ROOT)!r}); "
    "from tests.support.liar import main; main(int(sys.argv[1]))"
)
"""What the program starts in place of the zygote (`nursery._PROGRAM`)."""

original = wire.Channel.send
make = server._make
kind = where = ""
chance = random.Random(0)


def raw(channel: wire.Channel, data: bytes) -> None:
    channel.sock.sendall(data)


def garbage(channel: wire.Channel) -> None:
    raw(channel, random.Random(1).randbytes(4096))


def huge(channel: wire.Channel) -> None:
    raw(channel, wire.HEADER.pack(0xFFFFFFFF, 0, 0))


def huge_data(channel: wire.Channel) -> None:
    raw(channel, wire.HEADER.pack(2, 0xFFFFFFFF, 0) + b"{}")


def text(channel: wire.Channel, data: bytes) -> None:
    raw(channel, wire.HEADER.pack(len(data), 0, 0) + data)


def half(channel: wire.Channel) -> None:
    raw(channel, wire.HEADER.pack(100, 0, 0) + b"{" * 50)
    time.sleep(1000)


def drip(channel: wire.Channel) -> None:
    raw(channel, wire.HEADER.pack(1000, 0, 0))
    for _ in range(1000):
        raw(channel, b" ")
        time.sleep(0.1)


def silent(channel: wire.Channel) -> None:
    time.sleep(1000)


def many_fds(channel: wire.Channel) -> None:
    data = wire.HEADER.pack(2, 0, wire.FDS_MAX) + b"{}"
    socket.send_fds(channel.sock, [data], [2] * 200)


def false_fds(channel: wire.Channel) -> None:
    data = wire.HEADER.pack(2, 0, 0) + b"{}"
    socket.send_fds(channel.sock, [data], [2] * 3)


def flood(channel: wire.Channel) -> None:
    for number in range(1 << 30):
        event = {"event": ["device error", "x" * 1000], "time": 0.0, "n": number}
        original(channel, event)


LIES: dict[str, Any] = {
    "garbage": garbage,
    "huge": huge,
    "huge-data": huge_data,
    "no-json": lambda channel: text(channel, b"\xff\xfe{"),
    "deep": lambda channel: text(channel, b"[" * 200_000),
    "long-number": lambda channel: text(channel, b"9" * 200_000),
    "nan": lambda channel: text(channel, b'{"ok":NaN}'),
    "list": lambda channel: text(channel, b"[]"),
    "null": lambda channel: text(channel, b"null"),
    "empty": lambda channel: text(channel, b"{}"),
    "half": half,
    "drip": drip,
    "silent": silent,
    "many-fds": many_fds,
    "false-fds": false_fds,
    "closes": lambda channel: channel.close(),
    "exits": lambda channel: os._exit(7),
    "crashes": lambda channel: os.abort(),
    "flood": flood,
}


def mutated(value: Any) -> Any:
    """`value` with something in it that is another, now and then."""
    if chance.random() < 0.15:
        return chance.choice(
            [None, -1, 1 << 70, 0.5, True, "x", "x" * 200_000, [], {}, [[]], {"$bytes": "zz"}]
        )
    if isinstance(value, dict):
        return {key: mutated(each) for key, each in value.items() if chance.random() > 0.03}
    if isinstance(value, list):
        return [mutated(each) for each in value] + [0] * (chance.random() < 0.05)
    return value


def send(
    channel: wire.Channel, message: Any, data: Any = b"", fds: Any = (), patience: Any = None
) -> None:
    at = (
        "event" if {"n", "console", "agent"} & message.keys()
        else "answer" if "stamp" in message else "facts"
    )  # fmt: skip
    if at != where:
        original(channel, message, data, fds, patience)
    elif kind == "mutate":
        told = json.loads(json.dumps(message))
        original(channel, mutated(told), data, fds, patience)
    else:
        LIES[kind](channel)


def lying_make(message: Any) -> Any:
    global kind, where
    machine = make(message)
    told = message["machine"]["append"]
    if told.startswith("lie="):
        name, _, where = told[4:].partition("@")
        kind, _, seed = name.partition(":")
        chance.seed(seed)
        wire.Channel.send = send  # type: ignore[method-assign]
    return machine


def main(fd: int) -> None:
    server._make = lying_make
    sys.setswitchinterval(0.001)
    zygote.main(fd)
