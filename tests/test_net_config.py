"""vmm/net/config.py: what a person may say of a network card."""

from __future__ import annotations

import re

import pytest

from vmm import MachineConfig
from vmm.errors import UsageError
from vmm.net.config import Net, parse_forward, parse_mac

GOOD = [
    ("user", Net("user")),
    ("none", Net("none")),
    ("tap", Net("tap")),
    ("tap=tap0,queues=4", Net("tap", "tap0", queues=4)),
    ("tap,address=10.0.0.1/24,mtu=9000", Net("tap", address="10.0.0.1/24", mtu=9000)),
    ("tap,address=fd00::1/64", Net("tap", address="fd00::1/64")),
    ("bridge=br0,mac=52:54:00:0a:0B:0c", Net("bridge", "br0", mac="52:54:00:0a:0B:0c")),
    ("socket=/tmp/a,,b,pcap=c,,d=e", Net("socket", "/tmp/a,b", pcap="c,d=e")),
    ("lan=blue", Net("lan", "blue")),
    (
        "user,rx-bps=10M,tx-pps=1000,tx-pps-burst=5",
        Net("user", rx_bps=10 << 20, tx_pps="1000", tx_pps_burst=5),
    ),
    ("tap,vhost=off", Net("tap", vhost="off")),
    ("bridge=br0,vhost=on", Net("bridge", "br0", vhost="on")),
    ("tap,tx-bps=1G,tx-burst=1M", Net("tap", tx_bps=1 << 30, tx_burst="1M")),
    ("user,host-loopback=on", Net("user", host_loopback=True)),
    ("user,host-loopback=off", Net("user")),
    (
        "user,forward=tcp:8080:80,forward=udp:127.0.0.1:53:5353,forward=tcp:[::1]:1:2",
        Net("user", forward=["tcp:8080:80", "udp:127.0.0.1:53:5353", "tcp:[::1]:1:2"]),
    ),
]


@pytest.mark.parametrize(("text", "net"), GOOD)
def test_good(text: str, net: Net) -> None:
    assert Net.parse(text) == net
    assert MachineConfig(nets=[text, net]).nets == (net, net)


BAD = [
    ("", "--net : '' is not one of user, tap, bridge, socket, lan, none"),
    ("usr", "'usr' is not one of user, tap, bridge"),
    ("user=x", "--net user=x: user takes no name"),
    ("none,mac=52:54:00:00:00:01", "'mac=52:54:00:00:00:01' is not for this; none stands alone"),
    ("bridge", "--net bridge: say which, bridge=NAME"),
    ("bridge=", "nothing after bridge="),
    ("socket", "--net socket: say which, socket=NAME"),
    ("tap=", "nothing after tap="),
    ("tap=abcdefghijklmnop", "'abcdefghijklmnop' is no interface's name (up to 15 bytes"),
    ("tap=a/b", "'a/b' is no interface's name"),
    ("tap=vmm%d", "'vmm%d' is no interface's name"),
    ("tap,forward=tcp:1:2", "'forward=tcp:1:2' is not for this; tap takes mac= pcap= mtu="),
    ("user,queues=2", "'queues=2' is not for this"),
    ("user,mac", "'mac' is not for this"),
    ("user,mac=", "nothing after mac="),
    ("user,mac=52:54:00:00:00", "mac=52:54:00:00:00 is not an address like"),
    ("user,mac=52:54:00:00:00:0g", "mac=52:54:00:00:00:0g is not an address like"),
    ("user,mac=53:54:00:00:00:00", "is not one card's address; the first byte must be even"),
    ("user,mac=00:00:00:00:00:00", "is not one card's address"),
    ("user,mtu=67", "mtu=67 is not from 68 to 65521"),
    ("user,mtu=1e3", "mtu=1e3 is not a number above 0"),
    ("user,rx-bps=0", "--net user: rx-bps=0 is no number above 0; say for example 10M"),
    ("tap,vhost=yes", "--net tap: vhost=yes is not one of auto, on, off"),
    ("user,vhost=on", "'vhost=on' is not for this; user takes mac="),
    ("tap,vhost=on,pcap=x", "vhost=on has the kernel carry frames, and knows no pcap; say"),
    ("tap,vhost=on,rx-pps=5", "vhost=on has the kernel carry frames, and knows no limit"),
    ("user,bps=1M", "'bps=1M' is not for this; user takes mac= pcap= mtu= ip= gateway= dns= for"),
    ("user,tx-burst=1M", "tx-burst= goes with tx-bps=, which is not given"),
    ("none,tx-bps=1M", "'tx-bps=1M' is not for this; none stands alone"),
    ("tap,queues=9", "queues=9 is not from 1 to 8"),
    ("tap,queues=0", "queues=0 is not a number above 0"),
    ("tap,address=10.0.0.1", "address=10.0.0.1 is not ADDRESS/BITS, as in 192.168.77.1/24"),
    ("tap,address=10.0.0.1/33", "is not ADDRESS/BITS"),
    ("tap,address=10.0.0/24", "is not ADDRESS/BITS"),
    ("user,host-loopback=yes", "--net user,host-loopback=yes: host-loopback=yes is not on or off"),
    ("tap,host-loopback=on", "'host-loopback=on' is not for this; tap takes mac="),
    ("user,forward=8080:80", "forward=8080:80 is not tcp:HOST:GUEST"),
    ("user,forward=tcp:0:80", "forward=tcp:0:80 is not tcp:HOST:GUEST"),
    ("user,forward=tcp:80:65536", "forward=tcp:80:65536 is not"),
    ("user,forward=icmp:1:2", "forward=icmp:1:2 is not"),
    ("user,forward=tcp:host:80:80", "forward=tcp:host:80:80: host is not an IP address"),
]


@pytest.mark.parametrize(("text", "says"), BAD)
def test_bad(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)) as raised:
        MachineConfig(nets=[text])
    assert str(raised.value).startswith("--net") and "\n" not in str(raised.value)


def test_parts() -> None:
    assert parse_mac("52:54:00:0a:0B:0c", "x") == b"\x52\x54\x00\x0a\x0b\x0c"
    assert parse_forward("tcp:8080:80", "x") == ("tcp", "127.0.0.1", 8080, 80)
    assert parse_forward("udp:0.0.0.0:53:5353", "x") == ("udp", "0.0.0.0", 53, 5353)
    assert parse_forward("tcp:[::1]:1:2", "x") == ("tcp", "::1", 1, 2)


def test_no_card() -> None:
    assert Net("none").open(0) is None


def test_a_made_up_address_is_local_and_new() -> None:
    seen = set()
    for _ in range(2):
        nic = Net("lan", "addresses").open(0)
        assert nic is not None
        mac = bytes(nic.config[:6])
        nic.close()
        assert mac[0] & 3 == 2
        seen.add(mac)
    assert len(seen) == 2
