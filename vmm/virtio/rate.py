"""Rate limits as a person says them: `bps=10M,iops=1000,burst=1M` of a disk, `rx-bps=` of a card.

Bytes and operations (requests, packets) a second; a burst is what may be taken at once after a
pause, and is a tenth of a second's worth where it is not given.
"""

from __future__ import annotations

from vmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.virtio.limit import Limit

    Number = int | str

RATE_MAX = 1 << 50


class Rate:
    """Limits of one direction.

    Args:
        option: for messages.
        names: what bytes, their burst, operations and their burst are called.
        values: they: numbers (0: none), or text as `10M`.

    Attributes:
        bps, burst: bytes a second, and bytes.
        ops, ops_burst: requests or packets.

    Raises:
        UsageError: a number that cannot be, or a burst of what is not limited.
    """

    __slots__ = ("bps", "burst", "ops", "ops_burst")

    def __init__(
        self, option: str, names: tuple[str, ...], values: tuple[Number, Number, Number, Number]
    ) -> None:
        numbers = [_number(option, *pair) for pair in zip(names, values, strict=True)]
        self.bps, self.burst, self.ops, self.ops_burst = numbers
        for rate, burst in ((0, 1), (2, 3)):
            if numbers[burst] and not numbers[rate]:
                raise UsageError(
                    f"{option}: {names[burst]}= goes with {names[rate]}=, which is not given"
                )

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """bps, burst, ops and ops_burst."""
        return self.bps, self.burst, self.ops, self.ops_burst

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rate) and self.numbers == other.numbers

    __hash__ = None  # type: ignore[assignment]

    def apply(self, limit: Limit) -> None:
        """Have `limit` keep it."""
        limit.change(bytes=self.bps, ops=self.ops, burst_bytes=self.burst, burst_ops=self.ops_burst)


def _number(option: str, name: str, value: Number) -> int:
    number = value
    if isinstance(value, str):
        from vmm.units import parse_size

        try:
            number = parse_size(value, name, "") or -1
        except UsageError:
            number = -1
    if not isinstance(number, int) or not 0 <= number <= RATE_MAX:
        raise UsageError(f"{option}: {name}={value} is no number above 0; say for example 10M")
    return number
