"""vmm/config_types.py: a value of the wrong kind is told at once, by the keyword's name."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny
from vmm import MachineConfig, UsageError
from vmm.block.drive import Drive
from vmm.block.vhost_user import VhostUserBlk
from vmm.config_file import schema_text
from vmm.net.config import Net
from vmm.virtio.console_config import PortConfig
from vmm.virtio.fs import Share
from vmm.virtio.vsock_config import VsockConfig

PARTS: dict[type, dict[str, Any]] = {
    MachineConfig: {"kernel": "k"},
    Drive: {"path": "disk.img"},
    Net: {"kind": "user"},
    VsockConfig: {"cid": 3},
    PortConfig: {"name": "a", "file": "f"},
    Share: {"path": "d", "tag": "t"},
    VhostUserBlk: {"socket": "s"},
}
KEYWORDS = [
    (part, name) for part in PARTS for name in list(inspect.signature(part).parameters)
]  # fmt: skip
LISTS = (
    "drives", "initrds", "nets", "ports", "shares", "vhost_user_blks", "devices", "forward", "rw",
    "overlay", "dns",
)  # fmt: skip


def make(part: Callable[..., object], **more: object) -> object:
    return part(**{**PARTS[part], **more})  # type: ignore[index]


@pytest.mark.parametrize(("part", "name"), KEYWORDS, ids=str)
@pytest.mark.parametrize(
    "value", [b"x", 1.5, object(), {"a": 1}, {1, 2.5}, [None], [b"x"], (), ["x", 3]], ids=repr
)
def test_no_keyword_takes_just_anything(part: type, name: str, value: object) -> None:
    allowed = (name in LISTS or (name == "backing" and part is Drive)) and value == ()
    if allowed or (name == "timeout" and value == 1.5):
        make(part, **{name: value})
        return
    with pytest.raises(UsageError) as caught:
        make(part, **{name: value})
    line = str(caught.value)
    assert f"{name}=" in line or f"{name}[" in line, line
    assert "\n" not in line


@pytest.mark.parametrize(("part", "name"), KEYWORDS, ids=str)
def test_truth_is_no_number_and_a_number_no_truth(part: type, name: str) -> None:
    default = inspect.signature(part).parameters[name].default
    if isinstance(default, bool):
        wrong: list[object] = [0, 1, None, "yes" if name != "rng" else 2]
    else:
        wrong = [True, False]
    for value in wrong:
        with pytest.raises(UsageError, match=name):
            make(part, **{name: value})


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("value", ["user", Path("x.img"), b"x", {"path": "x"}, 3, None], ids=repr)
def test_a_list_is_a_list(name: str, value: object) -> None:
    """Text is a sequence too: drives="disk.img" made eight disks."""
    part = Net if name in ("forward", "dns") else MachineConfig
    with pytest.raises(UsageError, match=f"^[-a-z :]*{name}=.* is not a list"):
        make(part, **{name: value})


def test_the_hint_works() -> None:
    with pytest.raises(UsageError, match=r"write drives=\['a.img'\]"):
        MachineConfig(drives="a.img")
    assert MachineConfig(drives=["a.img"]).drives == (Drive("a.img"),)
    assert MachineConfig(drives=[Path("a,b.img")]).drives == (Drive("a,b.img"),)
    assert MachineConfig(drives=iter(["a.img"])).drives == (Drive("a.img"),)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a table is for"):
        MachineConfig(drives=[{"path": "a.img"}])  # type: ignore[list-item]
    assert MachineConfig.from_dict({"drives": [{"path": "a.img"}]}).drives == (Drive("a.img"),)
    assert MachineConfig(device=Path("/dev/kvm")).device == "/dev/kvm"  # type: ignore[arg-type]


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_a_keyword_that_there_is_not(part: type) -> None:
    name = next(iter(PARTS[part]))
    with pytest.raises(UsageError, match=f"^{name}_: no such keyword; did you mean {name}"):
        make(part, **{f"{name}_": 1})
    with pytest.raises(UsageError, match=r"^xyzzy: no such keyword; there are "):
        make(part, xyzzy=1)
    made = make(part)
    assert "self" not in inspect.signature(part).parameters
    if part is not MachineConfig:
        assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made


def test_backings_are_those_there_are() -> None:
    with pytest.raises(UsageError, match="backing='huge' is not one of anonymous, memfd"):
        MachineConfig(backing="huge")


def configured(path: Path, text: str) -> subprocess.CompletedProcess[str]:
    path.write_text(text)
    return tiny.run("config", str(path))


@pytest.mark.parametrize(
    "text",
    ["memory = '900G'", "root = 'no.img'", "shares = ['nodir,tag=x']", "modules = 'none'",
     "device = '/no/kvm'", "initrds = ['none']", "drives = ['none']", "nets = ['tap=none']"],
)  # fmt: skip
def test_a_file_is_checked_without_a_look_at_this_host(text: str, tmp_path: Path) -> None:
    """It may be for another one; `vmm run` looks."""
    done = configured(tmp_path / "machine.toml", f"kernel = 'none'\n{text}\n")
    assert (done.returncode, done.stderr) == (0, "")
    path = tmp_path / "again.json"
    assert json.loads(configured(path, done.stdout).stdout) == json.loads(done.stdout)


def test_editors_may_say_where_the_schema_is(tmp_path: Path) -> None:
    import jsonschema

    data = {"$schema": "./machine.schema.json", "kernel": "k"}
    jsonschema.validate(data, json.loads(schema_text()))
    done = configured(tmp_path / "machine.json", json.dumps(data))
    assert json.loads(done.stdout) == {"kernel": str(tmp_path / "k")}
    wrong = configured(tmp_path / "machine.json", json.dumps({"$schema": 3}))
    assert (wrong.returncode, wrong.stderr.split(": ")[2]) == (2, "$schema")


class Odd:
    def __repr__(self) -> str:
        return "two\nlines"


@pytest.mark.parametrize(("part", "name"), KEYWORDS)
def test_every_complaint_is_one_line(part: type, name: str) -> None:
    huge = 10**5000 if part is MachineConfig else 10**400  # more digits than Python prints
    for value in ("a\nb", "\0", "\udcff", Odd(), huge, float("nan"), float("inf")):
        try:
            part(**{**PARTS[part], name: value})
        except UsageError as err:
            assert str(err).isprintable() or "\udcff" in str(err)


def test_limits_are_compared_by_their_numbers() -> None:
    data: dict[str, Any] = {
        "kernel": "k",
        "drives": [{"path": "disk.img", "bps": "10M", "iops": 5}],
        "nets": [{"kind": "user", "rx_bps": 1000}],
    }
    config = MachineConfig.from_dict(data)
    assert MachineConfig.from_dict(config.to_dict()) == config
    data["drives"][0]["iops"] = 6
    assert MachineConfig.from_dict(data) != config


def test_plain_data_is_a_table() -> None:
    odd: Any
    for odd in (None, 5, "kernel", ["kernel"], [("kernel", "k")]):
        with pytest.raises(UsageError, match="is not a table of keywords"):
            MachineConfig.from_dict(odd)
