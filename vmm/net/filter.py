"""Which frames a network card takes: its address, receive modes, address tables and VLANs."""

from __future__ import annotations

from vmm.errors import ShapeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vmm.shapes import Shape

BROADCAST = b"\xff" * 6
TPID_VLAN = b"\x81\x00"
TABLE_MAX = 256
"""Addresses of a kind; with more the card takes all of that kind (5.1.6.5.1 lets it)."""
VLANS = 4096
STATE_ADDRESSES_MAX = 1 << 16
"""Addresses of a kind in a state."""


class Filter:
    """A card's receive filter; takes everything until the driver says otherwise.

    Attributes:
        promiscuous, allmulti, alluni, nomulti, nouni, nobcast: modes, as in 5.1.6.5.1.
        mac: the card's address.
    """

    MODES = ("promiscuous", "allmulti", "alluni", "nomulti", "nouni", "nobcast")

    def __init__(self, mac: bytes) -> None:
        self.reset(mac, vlans=False)

    def reset(self, mac: bytes, *, vlans: bool) -> None:
        """As after a reset; with `vlans`, no VLAN is taken that is not added."""
        self.mac = mac
        self.promiscuous = True
        self.allmulti = self.alluni = self.nomulti = self.nouni = self.nobcast = False
        self.unicast: frozenset[bytes] = frozenset()
        self.multicast: frozenset[bytes] = frozenset()
        self._too_many_unicast = self._too_many_multicast = False
        self.vlans: set[int] | None = set() if vlans else None

    def set_mode(self, mode: int, on: bool) -> None:
        """CTRL_RX command `mode`."""
        setattr(self, self.MODES[mode], on)

    def set_tables(self, unicast: Iterable[bytes], multicast: Iterable[bytes]) -> None:
        """The addresses taken besides the card's own."""
        self.unicast, self.multicast = frozenset(unicast), frozenset(multicast)
        self._too_many_unicast = len(self.unicast) > TABLE_MAX
        self._too_many_multicast = len(self.multicast) > TABLE_MAX

    def set_vlan(self, vlan: int, on: bool) -> None:
        """Take VLAN `vlan`, or no longer."""
        if self.vlans is not None:
            (self.vlans.add if on else self.vlans.discard)(vlan)

    def takes(self, start: bytes | memoryview) -> bool:
        """Whether a frame is for this card, by its first 18 bytes (14 where it has no tag)."""
        if self.promiscuous:  # of every VLAN, too: a card under a plain bridge, or tcpdump
            return True
        if self.vlans is not None and start[12:14] == TPID_VLAN:
            vlan = int.from_bytes(start[14:16], "big") & (VLANS - 1)
            if vlan and vlan not in self.vlans:  # 0 is a priority alone
                return False
        to = bytes(start[:6])
        if to == BROADCAST:
            return not self.nobcast
        if to[0] & 1:
            if self.nomulti:
                return False
            return self.allmulti or self._too_many_multicast or to in self.multicast
        if self.nouni:
            return False
        return to == self.mac or self.alluni or self._too_many_unicast or to in self.unicast

    def save(self) -> dict[str, object]:
        """As plain data."""
        state: dict[str, object] = {mode: getattr(self, mode) for mode in self.MODES}
        state["mac"] = self.mac
        state["unicast"] = b"".join(sorted(self.unicast))
        state["multicast"] = b"".join(sorted(self.multicast))
        state["vlans"] = None if self.vlans is None else sorted(self.vlans)
        return state

    def shape(self) -> Shape:
        """Of what `save` gives."""
        from vmm.shapes import Data, Flag, Items, Maybe, Table, Whole

        table = Data(0, STATE_ADDRESSES_MAX * 6)
        return Table(
            {
                **dict.fromkeys(self.MODES, Flag()),
                "mac": Data(6),
                "unicast": table,
                "multicast": table,
                "vlans": Maybe(Items(Whole(0, VLANS - 1), 0, VLANS)),
            }
        )

    def restore(self, state: dict[str, object]) -> None:
        """Take over what `save` gave. Raises ShapeError."""
        mac, vlans = state["mac"], state["vlans"]
        if not isinstance(mac, bytes) or len(mac) != 6:
            raise ShapeError(f"state of a network filter: mac is {mac!r}")
        if vlans is not None and not isinstance(vlans, list):
            raise ShapeError("state of a network filter: vlans is no list")
        self.mac = mac
        for mode in self.MODES:
            setattr(self, mode, bool(state[mode]))
        self.set_tables(_split(state["unicast"]), _split(state["multicast"]))
        self.vlans = None if vlans is None else {int(vlan) % VLANS for vlan in vlans}


def _split(table: object) -> Sequence[bytes]:
    if not isinstance(table, bytes) or len(table) % 6:
        raise ShapeError("state of a network filter: a table is not 6-byte addresses")
    return [table[at : at + 6] for at in range(0, len(table), 6)]
