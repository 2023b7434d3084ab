"""vmm.devices.pvpanic: events a guest reports."""

import pytest

from vmm.devices.pvpanic import PvPanic


@pytest.mark.parametrize(
    ("value", "events"),
    [
        (0, []),
        (1, ["panicked"]),
        (2, ["crash-loaded"]),
        (3, ["panicked", "crash-loaded"]),
        (0xFC, []),
    ],
)
def test_events(value: int, events: list[str]) -> None:
    got: list[str] = []
    PvPanic(got.append).write(0, 1, value)
    assert got == events


def test_a_read_tells_the_supported_events() -> None:
    assert PvPanic(lambda event: None).read(0, 1) == 3
