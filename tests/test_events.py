"""vmm.events: events as values."""

from __future__ import annotations

import time

import pytest

from vmm import events
from vmm.machine import exits
from vmm.machine.event_hub import KINDS, make
from vmm.machine.exits import MachineExit

END = MachineExit(exits.EXIT_PORT, "the guest wrote 3 to the exit port", status=3)


class Lost(events.Event):
    """A kind of a program's own."""

    __slots__ = ("disk", "sectors")
    name = "sectors lost"

    def __init__(self, disk: str, sectors: int) -> None:
        super().__init__()
        self.disk = disk
        self.sectors = sectors


@pytest.mark.parametrize(
    ("event", "plain", "text"),
    [
        (events.Started(), {"event": "started"}, "started"),
        (events.Paused(), {"event": "paused", "why": ""}, "paused"),
        (events.Paused("no space"), {"event": "paused", "why": "no space"}, "paused: no space"),
        (events.Resumed(), {"event": "resumed"}, "resumed"),
        (events.Snapshotted("/x"), {"event": "snapshot", "path": "/x"}, "snapshot: /x"),
        (events.RolledBack(), {"event": "rolled back"}, "rolled back"),
        (events.ConsoleLine("x"), {"event": "console", "line": "x"}, "console: x"),
        (events.Panicked(), {"event": "panicked", "how": "panicked"}, "panicked: panicked"),
        (
            events.DeviceError("a: b"),
            {"event": "device error", "line": "a: b"},
            "device error: a: b",
        ),
        (
            events.Stopped(END),
            {"event": "stopped", "kind": "exit-port", "message": END.message, "status": 3},
            "stopped: the guest wrote 3 to the exit port (status 3)",
        ),
        (
            Lost("disk0", 0),
            {"event": "sectors lost", "disk": "disk0", "sectors": 0},
            "sectors lost: disk0, 0",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, events.Event) else "",
)
def test_as_data_and_as_text(event: events.Event, plain: dict[str, object], text: str) -> None:
    assert event.to_dict() == {**plain, "time": event.time}
    assert str(event) == text


def test_the_time_is_when_it_was_made() -> None:
    before = time.monotonic()
    event = events.Resumed()
    assert before <= event.time <= time.monotonic()


def test_printed_with_its_values() -> None:
    assert repr(Lost("disk0", 8)) == "Lost(disk='disk0', sectors=8)"
    assert repr(events.Started()) == "Started()"


def test_a_machine_can_make_each_but_console_lines() -> None:
    needs: dict[str, tuple[object, ...]] = {
        "stopped": (END,),
        "device error": ("x",),
        "snapshot": ("/x",),
    }
    made = {type(make(name, needs.get(name, ()))) for name in KINDS}
    all_kinds = {
        kind
        for kind in vars(events).values()
        if isinstance(kind, type) and issubclass(kind, events.Event)
    }
    assert all_kinds - made == {events.Event, events.ConsoleLine}
