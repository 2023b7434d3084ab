"""vhost=on and --vsock ...,vhost where the host has no vhost: a line each, and nothing is left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import netns
from vmm.errors import HostError
from vmm.net import config
from vmm.net.config import Net
from vmm.virtio import vhost_vsock
from vmm.virtio.vhost_net import VhostNic
from vmm.virtio.vsock_config import VsockConfig


@pytest.fixture(autouse=True)
def namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /dev/vhost-*, whatever this host has."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("no /dev/net/tun here")
    monkeypatch.setattr(config, "VHOST_NET", "/dev/vhost-no-net")
    monkeypatch.setattr(vhost_vsock, "DEVICE", "/dev/vhost-no-vsock")


def test_a_tap_without_vhost_net() -> None:
    with netns.network_namespace():
        with pytest.raises(HostError) as caught:
            Net.parse("tap,vhost=on").open(0)
        said = str(caught.value)
        assert said.startswith(
            "--net tap: vhost=on: /dev/vhost-no-net: No such file or directory; "
            "modprobe vhost_no_net"
        )
        assert said.endswith(", or leave vhost out")
        assert netns.interfaces() == []
        nic = Net.parse("tap,vhost=auto").open(0)
        assert nic is not None and not isinstance(nic, VhostNic)
        nic.close()


def test_what_is_there_is_no_vhost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "VHOST_NET", os.devnull)
    with netns.network_namespace():
        with pytest.raises(HostError, match="--net tap: vhost=on: /dev/null: Inappropriate ioctl"):
            Net.parse("tap,vhost=on").open(0)
        nic = Net.parse("tap,vhost=auto").open(0)  # auto: then without
        assert nic is not None and not isinstance(nic, VhostNic)
        nic.close()
        assert netns.interfaces() == []


def test_sockets_without_vhost_vsock() -> None:
    with pytest.raises(HostError, match=r"^--vsock cid=5,vhost: /dev/vhost-no-vsock: No such file"):
        VsockConfig.parse("cid=5,vhost").open()
