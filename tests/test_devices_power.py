"""vmm.devices.power: sleep, reset and the power button."""

from __future__ import annotations

import pytest

from vmm.devices.power import AcpiPower


class Board:
    def __init__(self) -> None:
        self.events: list[str] = []
        self.levels: list[int] = []
        self.power = AcpiPower(
            lambda: self.events.append("off"),
            lambda: self.events.append("reset"),
            self.levels.append,
        )


@pytest.fixture
def board() -> Board:
    return Board()


def test_only_slp_en_with_s5_turns_off(board: Board) -> None:
    for value in range(256):
        board.events.clear()
        board.power.write(0, 1, value)
        wanted = ["off"] if value & 0x20 and (value >> 2) & 7 == 5 else []
        assert board.events == wanted, hex(value)


def test_sleep_registers_read_back_without_slp_en(board: Board) -> None:
    board.power.write(0, 1, 0x34)
    assert board.power.read(0, 1) == 0x14
    board.power.write(1, 1, 0x80)
    assert board.power.read(1, 1) == 0, "WAK_STS: it never wakes"


def test_only_the_reset_value_resets(board: Board) -> None:
    for value in range(256):
        board.power.write(2, 1, value)
    assert board.events == ["reset"]


def test_power_button_pulses_and_is_read_once(board: Board) -> None:
    board.power.press_power_button()
    assert board.levels == [1, 0]
    assert board.power.read(4, 4) == 1
    assert board.power.read(4, 4) == 0
    board.power.press_power_button()
    board.power.press_power_button()
    assert [board.power.read(4, 1), board.power.read(4, 1)] == [1, 0]


def test_a_pending_press_survives_save_and_restore(board: Board) -> None:
    board.power.write(0, 1, 0x14)
    board.power.press_power_button()
    other = Board()
    other.power.restore(board.power.save())
    assert other.power.read(4, 4) == 1
    assert other.power.read(0, 1) == 0x14
    board.power.reset()
    assert (board.power.read(4, 4), board.power.read(0, 1)) == (0, 0)
