"""vmm/units.py"""

from __future__ import annotations

import pytest

from vmm.errors import UsageError
from vmm.layout import GIB, KIB, MIB
from vmm.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256M", 256 * MIB),
        ("256", 256 * MIB),
        ("2g", 2 * GIB),
        ("2GB", 2 * GIB),
        ("2GiB", 2 * GIB),
        ("2gib", 2 * GIB),
        ("1.5G", 3 * GIB // 2),
        (".5G", GIB // 2),
        ("262144K", 256 * MIB),
        ("1T", 1024 * GIB),
        (" 64M ", 64 * MIB),
        ("268435456B", 256 * MIB),
        ("0", 0),
        # Digits a float cannot hold stay exact.
        ("9007199254740993B", 9007199254740993),
    ],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text, "--memory") == size


def test_a_bare_number_is_in_the_unit_asked_for() -> None:
    assert parse_size("4096", "--block-size", "") == 4096
    assert parse_size("4K", "--block-size", "") == 4 * KIB
    assert parse_size("4", "--cache", "G") == 4 * GIB


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "M", "B", "iB", "MiB", "-1M", "+1M", "1e9", "0x100", "1 G", "1,5G", "1.2.3G"),
        *(".", ".M", "12Q", "256MM", "256MiBB", "256iB", "256IM", "nan", "inf", "1_000", "\u0663M"),
        "9" * 21,
    ],
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text, "--memory")
    assert str(caught.value) == f"--memory {text!r} is not a size; write for example 256M or 2G"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (KIB, "1 KiB"),
        (1536, "1.5 KiB"),
        (256 * MIB, "256 MiB"),
        (5 * GIB, "5 GiB"),
        (5 * GIB + 512 * MIB, "5.5 GiB"),
        (1 << 50, "1024 TiB"),
    ],
)
def test_sizes_as_people_read_them(size: int, text: str) -> None:
    assert format_size(size) == text
