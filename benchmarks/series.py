"""Series of measurements, taken in turns so that a busy moment of the host hits all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Series:
    """What one contender measured in one comparison.

    `comparison` is the name of what is compared (all series with the same one share a unit),
    `reference` marks the one that the others' ratios are to.
    """

    row: str
    comparison: str
    contender: str
    unit: str
    reference: bool = False
    note: str = ""
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    def ratio(self, reference: Series) -> float:
        """The median of each round's ratio: a load of the host that lasts longer than a round
        is in both of its figures."""
        pairs = zip(self.samples, reference.samples, strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)


Progress = Callable[[str], None]
"""Told what is being measured."""


def interleave(
    contenders: Mapping[str, Callable[[], Sequence[float]]],
    repetitions: int,
    progress: Progress,
    title: str,
    warm_up: int = 1,
) -> dict[str, list[Sequence[float]]]:
    """Call each contender in turn, `repetitions` times after `warm_up` rounds that do not count.

    The order is turned round every other time: none always follows the same one.
    """
    results: dict[str, list[Sequence[float]]] = {name: [] for name in contenders}
    for number in range(-warm_up, repetitions):
        progress(f"{title}: {max(number + 1, 0)} of {repetitions}")
        order = list(contenders)
        for name in order if number % 2 else reversed(order):
            sample = contenders[name]()
            if number >= 0:
                results[name].append(sample)
    return results
