"""A network card as a person says it: `--net user|tap[=NAME]|bridge=BR|socket=PATH|lan=NAME|none`.

Then `,mac=..`, `,pcap=FILE`, and what the kind has of its own (see KINDS).
"""

from __future__ import annotations

import os

from vmm import config_types as types
from vmm.errors import HostError, UsageError
from vmm.units import put_once
from vmm.virtio.net_spec import MTU_MAX, MTU_MIN, PAIRS_MAX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.net.port import Backend
    from vmm.virtio.net import Nic
    from vmm.virtio.rate import Rate
    from vmm.virtio.vhost import Vhost

RX = ("rx-bps", "rx-burst", "rx-pps", "rx-pps-burst")
TX = ("tx-bps", "tx-burst", "tx-pps", "tx-pps-burst")
"""Limits of what the guest receives and sends; see `vmm.virtio.rate`."""
ALL = ("mac", "pcap", "mtu")
GUEST = ("ip", "gateway", "dns")
"""What the agent is told of the guest's side; see `Net.ip`."""
KINDS: dict[str, tuple[str, ...]] = {
    "user": (*ALL, *GUEST, "forward", "host-loopback", *RX, *TX),
    "tap": (*ALL, *GUEST, "address", "queues", "vhost", *RX, *TX),
    "bridge": (*ALL, *GUEST, "queues", "vhost", *RX, *TX),
    "socket": (*ALL, *GUEST, *RX, *TX),
    "lan": (*ALL, *GUEST, *RX, *TX),
    "none": (),
}
"""The keys each kind takes."""
VHOSTS = ("auto", "on", "off")
DNS_MAX = 3
"""Name servers, as resolv.conf(5) has it."""
NAMED = ("bridge", "socket", "lan")
"""Kinds that need a name after `=`; `tap` may have one."""
VHOST_NET = "/dev/vhost-net"
IFNAME_MAX = 15
MAC_PREFIX = b"\x52\x54\x00"
"""Of addresses we make up: locally administered, QEMU's and KVM's habit."""


FIELDS = {
    "kind": types.TEXT,
    "name": types.PATH,
    "mac": types.TEXT,
    "pcap": types.PATH,
    "mtu": types.WHOLE,
    "address": types.TEXT,
    "ip": types.TEXT,
    "gateway": types.TEXT,
    "queues": types.WHOLE,
    "vhost": types.TEXT,
    "host_loopback": types.FLAG,
    **{f"{way}_{key}": types.RATE for way in ("rx", "tx") for key in ("bps", "burst", "pps")},
    **{f"{way}_pps_burst": types.RATE for way in ("rx", "tx")},
}


class Net:
    """One network card's configuration, checked before anything is opened.

    Args:
        kind: `user`, `tap`, `bridge`, `socket`, `lan` or `none` (no card at all).
        name: the tap (may be empty), the bridge, the socket's path or the private LAN.
        mac: `aa:bb:cc:dd:ee:ff`; empty: one is made up.
        pcap: a file that what passes is recorded in.
        mtu: bytes of the largest packet; 0: what the kind has.
        address: `A.B.C.D/BITS`, the host's on a tap that is made.
        queues: queue pairs of a tap, 1 to 8.
        vhost: whether the host's kernel serves the queues of a tap (vhost-net): `on`, `off`, or
            `auto`: where it can, and nothing (pcap, limits) needs the frames to come by here.
        ip: the guest's address, set by the agent (docs/exec.md): `A.B.C.D/BITS`, `dhcp` or `off`;
            empty: what suits the kind, and nothing where the guest has an init of its own.
        gateway, dns: with an `ip`, the way to other networks, and up to three name servers.
        forward: ports of the host that reach the guest, each `tcp|udp:[ADDRESS:]HOST:GUEST`.
        host_loopback: with `user`, the guest reaches what listens on the host's loopback, at the
            gateway's address.
        rx_bps, rx_pps: bytes and packets a second to the guest: numbers, or text as `10M`; 0: no
            limit.
        rx_burst, rx_pps_burst: what may come at once after a pause; 0: a tenth of a second's worth.
        tx_bps, tx_burst, tx_pps, tx_pps_burst: the same from the guest.

    Attributes:
        rx, tx: the limits; None where there are none.
    """

    __slots__ = (
        "address",
        "dns",
        "forward",
        "gateway",
        "host_loopback",
        "ip",
        "kind",
        "mac",
        "mtu",
        "name",
        "pcap",
        "queues",
        "rx",
        "rx_bps",
        "rx_burst",
        "rx_pps",
        "rx_pps_burst",
        "tx",
        "tx_bps",
        "tx_burst",
        "tx_pps",
        "tx_pps_burst",
        "vhost",
    )

    @types.known_keywords
    def __init__(
        self,
        kind: str,
        name: str = "",
        *,
        mac: str = "",
        pcap: str = "",
        mtu: int = 0,
        address: str = "",
        queues: int = 1,
        vhost: str = "off",
        ip: str = "",
        gateway: str = "",
        dns: Sequence[str] = (),
        forward: Sequence[str] = (),
        host_loopback: bool = False,
        rx_bps: int | str = 0,
        rx_burst: int | str = 0,
        rx_pps: int | str = 0,
        rx_pps_burst: int | str = 0,
        tx_bps: int | str = 0,
        tx_burst: int | str = 0,
        tx_pps: int | str = 0,
        tx_pps_burst: int | str = 0,
    ) -> None:
        types.check(locals(), FIELDS, f"--net {kind}: ")
        self.kind = kind
        self.name = str(name)
        self.mac = mac
        self.pcap = str(pcap)
        self.mtu = mtu
        self.address = address
        self.queues = queues
        self.vhost = vhost
        self.ip = ip
        self.gateway = gateway
        self.dns = types.listed("dns", dns, types.TEXT)
        self.forward = types.listed("forward", forward, types.TEXT)
        self.host_loopback = host_loopback
        self.rx = self._rate(RX, (rx_bps, rx_burst, rx_pps, rx_pps_burst))
        self.tx = self._rate(TX, (tx_bps, tx_burst, tx_pps, tx_pps_burst))
        self._check()

    def _rate(
        self, names: tuple[str, ...], values: tuple[int | str, int | str, int | str, int | str]
    ) -> Rate | None:
        rate, numbers = None, (0, 0, 0, 0)
        if values != numbers:
            from vmm.virtio.rate import Rate

            rate = Rate(self.what, names, values)
            numbers = rate.numbers
        for name, number in zip(names, numbers, strict=True):
            setattr(self, name.replace("-", "_"), number)
        return rate

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._fields())
        return f"Net({values})"

    @classmethod
    def _fields(cls) -> list[str]:
        return [name for name in cls.__slots__ if name not in ("rx", "tx")]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Net) and all(
            getattr(self, name) == getattr(other, name) for name in self._fields()
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def what(self) -> str:
        """The option, as far as it says which card this is."""
        return f"--net {self.kind}={self.name}" if self.name else f"--net {self.kind}"

    @property
    def _watched(self) -> str:
        """What needs the frames to come by here; empty: nothing."""
        return "pcap" if self.pcap else "limit" if self.rx or self.tx else ""

    def _check(self) -> None:
        what = self.what
        if self.kind not in KINDS:
            raise UsageError(f"--net {self.kind} is not one of {', '.join(KINDS)}")
        if self.kind in NAMED and not self.name:
            raise UsageError(f"--net {self.kind}: say which, {self.kind}=NAME")
        if self.name and self.kind not in (*NAMED, "tap"):
            raise UsageError(f"{what}: {self.kind} takes no name")
        if self.kind in ("tap", "bridge") and self.name:
            _check_ifname(what, self.name)
        for key in ("mac", "pcap", "mtu", "address", "ip", "gateway", "dns", "forward"):
            if getattr(self, key) and key not in KINDS[self.kind]:
                raise UsageError(f"{what}: {key} is not for this; {_takes(self.kind)}")
        if self.host_loopback and "host-loopback" not in KINDS[self.kind]:
            raise UsageError(f"{what}: host-loopback is not for this; {_takes(self.kind)}")
        if self.queues != 1 and "queues" not in KINDS[self.kind]:
            raise UsageError(f"{what}: queues is not for this; {_takes(self.kind)}")
        if self.vhost not in VHOSTS:
            raise UsageError(f"{what}: vhost={self.vhost} is not one of {', '.join(VHOSTS)}")
        if self.vhost != "off" and "vhost" not in KINDS[self.kind]:
            raise UsageError(f"{what}: vhost is not for this; {_takes(self.kind)}")
        if self.vhost == "on" and self._watched:
            raise UsageError(
                f"{what}: vhost=on has the kernel carry frames, and knows no {self._watched}; say "
                "vhost=off"
            )
        if (self.rx or self.tx) and self.kind == "none":
            raise UsageError(f"{what}: no card, no limits; {_takes(self.kind)}")
        if not 1 <= self.queues <= PAIRS_MAX:
            raise UsageError(f"{what}: queues={self.queues} is not from 1 to {PAIRS_MAX}")
        if self.mtu and not MTU_MIN <= self.mtu <= MTU_MAX:
            raise UsageError(f"{what}: mtu={self.mtu} is not from {MTU_MIN} to {MTU_MAX}")
        if self.mac:
            parse_mac(self.mac, what)
        if self.address:
            _check_address(what, self.address)
        self._check_guest()
        for forward in self.forward:
            parse_forward(forward, what)

    @property
    def usual_ip(self) -> tuple[str, str]:
        """The guest's address and gateway where nothing is said and nothing else sees to it: by
        DHCP, where somebody may serve it; on a tap that is made, what is after the host's."""
        if self.kind == "tap" and not self.name:
            host, _, bits = self.address.partition("/")
            if _ip(host) != 4:
                return "", ""
            from _socket import inet_aton, inet_ntoa

            number, size = int.from_bytes(inet_aton(host), "big"), 1 << (32 - int(bits))
            base = number & -size
            first, last = base + 1, base + size - 2
            guest = number + 1 if number < last else first
            if size < 4 or guest == number:
                return "", ""
            return f"{inet_ntoa(guest.to_bytes(4, 'big'))}/{bits}", host
        return ("dhcp" if self.kind in ("user", "tap", "bridge", "socket") else "", "")

    def _check_guest(self) -> None:
        what, fixed = self.what, self.ip not in ("", "dhcp", "off")
        if fixed:
            host, slash, bits = self.ip.partition("/")
            number = int(bits) if bits.isascii() and bits.isdecimal() and len(bits) < 3 else -1
            if _ip(host) != 4 or not slash or not 0 < number <= 32:
                raise UsageError(
                    f"{what}: ip={self.ip} is not dhcp, off or A.B.C.D/BITS, as in 10.0.2.15/24"
                )
        for key, values in (("gateway", [self.gateway] if self.gateway else []), ("dns", self.dns)):
            if values and not fixed:
                raise UsageError(
                    f"{what}: {key}={values[0]} needs the guest's address too: ip=A.B.C.D/BITS"
                )
            for value in values:
                if _ip(value) != 4:
                    raise UsageError(
                        f"{what}: {key}={value} is not an IPv4 address, as in 10.0.2.2"
                    )
        if len(self.dns) > DNS_MAX:
            raise UsageError(f"{what}: {len(self.dns)} times dns=; resolv.conf takes {DNS_MAX}")

    @classmethod
    def parse(cls, text: str) -> Net:
        """From the command line. A comma in a name is written twice."""
        words = [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",")]
        kind, equals, name = words[0].partition("=")
        if kind not in KINDS:
            raise UsageError(f"--net {text}: {kind!r} is not one of {', '.join(KINDS)}")
        if equals and not name:
            raise UsageError(f"--net {text}: nothing after {kind}=")
        values: dict[str, str] = {}
        forward: list[str] = []
        dns: list[str] = []
        for word in words[1:]:
            key, equals, value = word.partition("=")
            if key not in KINDS[kind] or not equals:
                raise UsageError(f"--net {text}: {word!r} is not for this; {_takes(kind)}")
            if key == "forward":
                forward.append(value)
            elif key == "dns" and value:
                dns.append(value)
            elif not value:
                raise UsageError(f"--net {text}: nothing after {key}=")
            else:
                put_once(values, key, value, f"--net {text}")
        loopback = values.get("host-loopback", "off")
        if loopback not in ("on", "off"):
            raise UsageError(f"--net {text}: host-loopback={loopback} is not on or off")
        numbers = {}
        for key in ("mtu", "queues"):
            if key in values:
                value = values.pop(key)
                if not (value.isascii() and value.isdecimal() and 0 < int(value[:9])):
                    raise UsageError(f"--net {text}: {key}={value} is not a number above 0")
                numbers[key] = int(value)
        return cls(
            kind,
            name,
            mac=values.get("mac", ""),
            pcap=values.get("pcap", ""),
            address=values.get("address", ""),
            vhost=values.get("vhost", "off"),
            ip=values.get("ip", ""),
            gateway=values.get("gateway", ""),
            dns=dns,
            forward=forward,
            host_loopback=loopback == "on",
            mtu=numbers.get("mtu", 0),
            queues=numbers.get("queues", 1),
            **{key.replace("-", "_"): values[key] for key in RX + TX if key in values},
        )

    def open(self, number: int) -> Nic | None:
        """The device, connected; None for `none`. Raises UsageError, HostError."""
        if self.kind == "none":
            return None
        from vmm.virtio.net import Nic

        mac = parse_mac(self.mac, self.what) if self.mac else MAC_PREFIX + os.urandom(3)
        capture = None
        if self.pcap:
            from vmm.net.pcap import open_capture

            capture = open_capture(self.pcap)
        try:
            backend = self._backend()
        except BaseException:
            if capture is not None:
                capture.close()
            raise
        name = f"net{number}"
        vhosts = self._vhosts(backend)
        if vhosts:
            from vmm.virtio.vhost_net import VhostNic

            return VhostNic(backend, vhosts, mac=mac, name=name)  # type: ignore[arg-type]
        if capture is None:
            nic = Nic(backend, mac=mac, name=name)
        else:
            from vmm.net.pcap import CapturePort

            recorder = capture
            nic = Nic(
                backend,
                mac=mac,
                name=name,
                wrap=lambda port: CapturePort(port, recorder),
                on_close=recorder.close,
            )
        if self.rx:
            self.rx.apply(nic.rx_limit)
        if self.tx:
            self.tx.apply(nic.tx_limit)
        return nic

    def _vhosts(self, backend: Backend) -> list[Vhost]:
        """A vhost-net a queue pair; none where there is none, or it is not wanted."""
        wanted = "vhost" in KINDS[self.kind] and self.vhost != "off" and not self._watched
        if not wanted or (self.vhost == "auto" and not os.access(VHOST_NET, os.R_OK | os.W_OK)):
            return []
        from vmm.virtio.vhost import Vhost

        made: list[Vhost] = []
        try:
            for _ in backend.ports:
                made.append(Vhost(VHOST_NET, f"{self.what}: vhost={self.vhost}"))
        except BaseException as err:
            for each in made:
                each.close()
            if self.vhost == "auto" and isinstance(err, HostError):
                return []
            backend.close()
            raise
        return made

    def _backend(self) -> Backend:
        what = self.what
        if self.kind in ("tap", "bridge"):
            from vmm.net.tap import TapBackend

            bridge = self.kind == "bridge"
            return TapBackend(
                "" if bridge else self.name,
                bridge=self.name if bridge else "",
                address=self.address,
                mtu=self.mtu,
                queues=self.queues,
                what=what,
            )
        if self.kind == "user":
            from vmm.net.user import PasstBackend

            forward = [parse_forward(text, what) for text in self.forward]
            return PasstBackend(forward, mtu=self.mtu, host_loopback=self.host_loopback)
        if self.kind == "socket":
            from vmm.net.stream import connect

            return connect(self.name, mtu=self.mtu, what=what)
        from vmm.net.lan import Lan

        return Lan.named(self.name).connect(mtu=self.mtu)


def parse_mac(text: str, what: str) -> bytes:
    """Six bytes from `aa:bb:cc:dd:ee:ff`, of one card and not zero. Raises UsageError."""
    parts = text.split(":")
    try:
        if len(parts) != 6 or any(len(part) != 2 for part in parts):
            raise ValueError
        mac = bytes.fromhex("".join(parts))
        if len(mac) != 6:
            raise ValueError
    except ValueError:
        raise UsageError(f"{what}: mac={text} is not an address like 52:54:00:12:34:56") from None
    if mac[0] & 1 or not any(mac):
        raise UsageError(
            f"{what}: mac={text} is not one card's address; the first byte must be even, "
            "as in 52:54:00:12:34:56"
        )
    return mac


def parse_forward(text: str, what: str) -> tuple[str, str, int, int]:
    """(protocol, address, host port, guest port) of `tcp:[ADDRESS:]HOST:GUEST`."""
    protocol, _, rest = text.partition(":")
    rest, _, guest = rest.rpartition(":")
    address, _, host = rest.rpartition(":")
    ports = [
        int(port) if port.isascii() and port.isdecimal() and len(port) < 6 else 0
        for port in (host, guest)
    ]
    if protocol not in ("tcp", "udp") or not all(0 < port < 65536 for port in ports):
        raise UsageError(
            f"{what}: forward={text} is not tcp:HOST:GUEST or udp:HOST:GUEST, as in tcp:8080:80 "
            "(or tcp:ADDRESS:HOST:GUEST)"
        )
    if address:
        address = address.removeprefix("[").removesuffix("]")
        if not _ip(address):
            raise UsageError(f"{what}: forward={text}: {address} is not an IP address")
    return protocol, address or "127.0.0.1", ports[0], ports[1]


def _ip(text: str) -> int:
    """4 or 6, of an address; 0 if it is none."""
    from _socket import AF_INET, AF_INET6, inet_pton

    for version, family in ((4, AF_INET), (6, AF_INET6)):
        try:
            inet_pton(family, text)
            return version
        except (OSError, ValueError):  # ValueError: characters that no address has
            pass
    return 0


def _check_address(what: str, text: str) -> None:
    host, slash, bits = text.partition("/")
    version = _ip(host)
    limit = 32 if version == 4 else 128
    number = int(bits) if bits.isascii() and bits.isdecimal() and len(bits) < 4 else -1
    if not version or not slash or not 0 <= number <= limit:
        raise UsageError(f"{what}: address={text} is not ADDRESS/BITS, as in 192.168.77.1/24")


def _check_ifname(what: str, name: str) -> None:
    bad = any(char.isspace() or char in "/:%" or not char.isprintable() for char in name)
    if bad or len(os.fsencode(name)) > IFNAME_MAX or name in (".", ".."):
        raise UsageError(
            f"{what}: {name!r} is no interface's name (up to {IFNAME_MAX} bytes, no space, /, :, %)"
        )


def _takes(kind: str) -> str:
    keys = KINDS[kind]
    return f"{kind} takes {'= '.join(keys)}=" if keys else f"{kind} stands alone"
