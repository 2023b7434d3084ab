"""`machine.faults.net(n)`: what can happen to the frames of a network card."""

from __future__ import annotations

from vmm.errors import UsageError
from vmm.faults import net_kinds as kinds
from vmm.faults.net_layer import RX, TX, NetFault, NetLayer
from vmm.faults.rules import Chance, seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, TypedDict, TypeVar, Unpack

    from vmm.faults.rules import Control, Fault
    from vmm.virtio.net import Nic

    Kind = TypeVar("Kind", bound=NetFault)

    class Which(TypedDict, total=False):
        """Which frames a fault strikes, see `NetFaults`."""

        direction: str
        match: Callable[[bytes], object]
        nth: int | Iterable[int]
        after: int
        times: int

    class WhichOf(Which, total=False):
        """The same, where the probability is one more."""

        probability: float


DIRECTIONS = {"both": (RX, TX), RX: (RX,), TX: (TX,)}
KEYWORDS = {"direction", "match", "nth", "after", "times", "probability"}


class NetFaults:
    """The faults of one network card, whatever it is connected to. All methods from any thread.

    What a fault strikes is said by the same words everywhere:

    - `direction`: `rx` (to the guest), `tx` (from it) or `both`. Frames of each are counted, and
      left to chance, by themselves.
    - `match`: called with a frame's bytes (Ethernet header first): whether it may be struck.
    - `nth`: the n-th such frame from now on, counted from 1, or several of them.
    - `after`, `times`: not the first so many; so many at most.
    - `probability`: of each that is left, from 0 to 1.

    A frame is what crosses the device: with offloads, up to 64 KiB of TCP at once. A fault is in
    force until `clear()` of what is returned, or the end of a `with` block. Each raises UsageError
    for a value that cannot work.
    """

    def __init__(self, device: Nic, control: Control, name: str) -> None:
        self._device = device
        self._control = control
        self._name = name
        self._layer = NetLayer(device, control)

    def loss(self, probability: float = 1.0, **which: Unpack[Which]) -> Fault:
        """Have frames not arrive."""
        return self._make(kinds.Loss, "loss", {**which, "probability": probability}).set()

    def delay(self, delay: float, jitter: float = 0.0, **which: Unpack[WhichOf]) -> Fault:
        """Have frames arrive `delay` seconds later, and up to `jitter` more: with jitter they
        overtake each other."""
        where = f"{self._name}.delay"
        delay, jitter = seconds(where, "delay", delay), seconds(where, "jitter", jitter)
        fault = self._make(kinds.Delay, "delay", {**which}, delay=delay, jitter=jitter)
        fault.delay, fault.jitter = delay, jitter
        return fault.set()

    def reorder(self, probability: float = 1.0, by: float = 0.01, **which: Unpack[Which]) -> Fault:
        """Have frames wait for `by` seconds, so that those after them come first."""
        by = seconds(f"{self._name}.reorder", "by", by)
        fault = self._make(kinds.Delay, "reorder", {**which, "probability": probability}, by=by)
        fault.delay = by
        return fault.set()

    def duplicate(self, probability: float = 1.0, **which: Unpack[Which]) -> Fault:
        """Have frames arrive twice."""
        return self._make(kinds.Duplicate, "duplicate", {**which, "probability": probability}).set()

    def corrupt(self, probability: float = 1.0, **which: Unpack[Which]) -> Fault:
        """Have one bit of a frame flipped, anywhere in it, after its checksums were made. (passt
        does not check those: what the guest sends through it is damaged unseen.)"""
        return self._make(kinds.Corrupt, "corrupt", {**which, "probability": probability}).set()

    def partition(
        self, direction: str = "both", match: Callable[[bytes], object] | None = None
    ) -> Fault:
        """Have nothing pass (that matches), while the guest believes the link to be up."""
        which: dict[str, Any] = {"direction": direction}
        if match is not None:
            which["match"] = match
        return self._make(kinds.Loss, "partition", which).set()

    def unplug(self) -> Fault:
        """Pull the cable: the guest sees the link go down and, when it is cleared, come back."""
        return self._make(kinds.Unplugged, "unplug", {}).set()

    def clear(self) -> None:
        """Clear every fault of this card."""
        for fault in reversed(self._control.faults):
            if isinstance(fault, NetFault) and fault.layer is self._layer:
                fault.clear()

    def _make(
        self, kind: Callable[..., Kind], name: str, which: dict[str, Any], **details: object
    ) -> Kind:
        where = f"{self._name}.{name}"
        unknown = which.keys() - KEYWORDS
        if unknown:
            raise TypeError(f"{where}: no such keyword: {', '.join(sorted(unknown))}")
        conditions = dict(which)
        direction, match = conditions.pop("direction", "both"), conditions.pop("match", None)
        if not isinstance(direction, str) or direction not in DIRECTIONS:
            raise UsageError(f"{where}: direction={direction!r} is not one of rx, tx, both")
        if match is not None and not callable(match):
            raise UsageError(f"{where}: match={match!r} is not a function of a frame's bytes")
        if "nth" in conditions and not isinstance(conditions["nth"], int):
            conditions["nth"] = list(conditions["nth"])  # for each direction
        chances = {
            way: Chance(
                where, self._control.stream(self._device.name, f"{name} {way}"), **conditions
            )
            for way in DIRECTIONS[direction]
        }
        return kind(self._layer, name, {**details, **which}, chances, match)
