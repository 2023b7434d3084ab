"""vmm.config_file: configurations as plain data and as files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from vmm import MachineConfig, UsageError
from vmm.block.drive import Drive
from vmm.block.vhost_user import VhostUserBlk
from vmm.config_file import configure
from vmm.config_schema import SCHEMA
from vmm.net.config import Net
from vmm.virtio.console_config import PortConfig
from vmm.virtio.fs import Share
from vmm.virtio.vsock_config import VsockConfig

MIB = 1 << 20

TOML = """
kernel = "vmlinuz"
initrds = ["one.img", "/abs/two.img"]
append = "quiet"
memory = "512M"
cpus = 2
timeout = 60
console = "file:log,1"
rng = "rate=64K"
balloon = "64M"
vsock = { cid = 3, path = "v.sock" }
ports = ["name=a,socket=a.sock", { name = "b", file = "b.log" }]
drives = ["root.img,snapshot", "odd,,name.img"]
shares = ["shared,tag=s", { path = "shared", tag = "r", readonly = true }]
vhost_user_blks = ["one.sock,queues=2", { socket = "two.sock", readonly = true }]

[[nets]]
kind = "user"
forward = ["tcp:8080:80"]
pcap = "net.pcap"

[[nets]]
kind = "socket"
name = "switch.sock"

[[nets]]
kind = "lan"
name = "lab"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    return tmp_path


def write(place: Path, text: str, name: str = "machine.toml") -> str:
    (place / name).write_text(text)
    return str(place / name)


def expected(place: Path) -> MachineConfig:
    return MachineConfig(
        f"{place}/vmlinuz",
        initrds=[f"{place}/one.img", "/abs/two.img"],
        append="quiet",
        memory=512 * MIB,
        cpus=2,
        timeout=60,
        console=f"file:{place}/log,1",
        rng="rate=64K",
        balloon=64 * MIB,
        vsock=VsockConfig(3, f"{place}/v.sock"),
        ports=[
            PortConfig("a", socket=f"{place}/a.sock"),
            PortConfig("b", file=f"{place}/b.log"),
        ],
        drives=[Drive(f"{place}/root.img", snapshot=True), Drive(f"{place}/odd,name.img")],
        shares=[
            Share(f"{place}/shared", tag="s"),
            Share(f"{place}/shared", tag="r", readonly=True),
        ],
        vhost_user_blks=[
            VhostUserBlk(f"{place}/one.sock", queues=2),
            VhostUserBlk(f"{place}/two.sock", readonly=True),
        ],
        nets=[
            Net("user", forward=["tcp:8080:80"], pcap=f"{place}/net.pcap"),
            Net("socket", f"{place}/switch.sock"),
            Net("lan", "lab"),
        ],
    )


def test_a_file_with_everything(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(place, TOML)
    assert MachineConfig.load(path) == expected(place)
    # Paths are the file's, wherever one is and however the file is called.
    monkeypatch.chdir(place.parent)
    assert MachineConfig.load(os.path.join(place.name, "machine.toml")) == expected(place)


def test_there_and_back(place: Path) -> None:
    config = MachineConfig.load(write(place, TOML))
    for defaults in (False, True):
        data = config.to_dict(defaults=defaults)
        assert MachineConfig.from_dict(data) == config
        jsonschema.validate(data, SCHEMA)
        again = write(place, json.dumps(data), "again.json")
        assert MachineConfig.load(again) == config
        assert MachineConfig.load(again).to_dict(defaults=defaults) == data


def test_what_is_at_its_default_is_left_out(place: Path) -> None:
    assert MachineConfig("k").to_dict() == {"kernel": "k"}
    data = MachineConfig("k", drives=["a.img"], shares=[f"{place},tag=t"]).to_dict()
    assert data["drives"] == [{"path": "a.img"}]
    assert "backing" not in data  # memfd goes with the share
    assert MachineConfig("k", backing="memfd").to_dict()["backing"] == "memfd"
    whole = MachineConfig("k").to_dict(defaults=True)
    assert (whole["cpus"], whole["memory"], whole["nets"]) == (1, 256 * MIB, [])
    assert "timeout" not in whole


def test_functions_are_not_data() -> None:
    config = MachineConfig("k", devices=[lambda: None])  # type: ignore[list-item,return-value]
    with pytest.raises(UsageError, match="devices: functions"):
        config.to_dict()


def test_plain_data_keeps_relative_paths() -> None:
    config = MachineConfig.from_dict({"kernel": "k", "drives": ["d.img"], "console": "hvc,file:x"})
    assert (config.kernel, config.drives[0].path, config.console) == ("k", "d.img", "hvc,file:x")
    config = MachineConfig.from_dict({"kernel": "k", "console": "hvc,file:x"}, "/base")
    assert (config.kernel, config.console) == ("/base/k", "hvc,file:/base/x")


@pytest.mark.parametrize("console", ["none", "auto", "pty", "hvc", "hvc,pty", "hvc,none"])
def test_consoles_without_a_path_stay_so(console: str) -> None:
    assert MachineConfig.from_dict({"console": console}, "/base").console == console


WRONG = [
    ("cpus = 'two'", "cpus: 'two' is not a whole number"),
    ("cpus = 0", "cpus: 0 is not a number from 1 to 254"),
    ("memory = 4096", "memory: 4096 bytes is too little; at least 1M, say 256M"),
    ("memory = '1..2M'", "memory: '1..2M' is not a size"),
    ("memory = '12Q'", "memory: '12Q' is not a size"),
    ("memory = '300M'\nballoon = '300M'", "balloon: 314572800 bytes is not from 0 to less"),
    ("memroy = '512M'", "memroy: no such key; memory is one"),
    ("boot = 'grub'", "boot: 'grub' is not one of auto, bzimage, elf64, pvh"),
    ("on_panic = 'cry'", "on_panic: 'cry' is not one of exit, pause"),
    ("timeout = nan", "timeout: nan is not a number of seconds"),
    ("timeout = 2020-01-01", "timeout: datetime.date(2020, 1, 1) is not a number"),
    ("kernel = ''", "kernel: is an empty name"),
    ("console = 'file:'", "console: 'file:' is not one of"),
    ("append = \"a\\nb\"", r"append: 'a\nb' has a line break in it"),
    ("rng = 'fast'", "rng: fast is not rate=BYTES"),
    ("drives = ['x,nosuch']", "drives[0]: x,nosuch: 'nosuch' is not one of readonly"),
    ("drives = [{path = 'x', cache = 'y'}]", "drives[0]: "),
    ("nets = ['user', {kind = 'bridge'}]", "nets[1]: bridge: say which"),
    ("ports = ['name=a,file=b', 'name=a,file=c']", "ports: name=a is given twice"),
    ("vsock = {cid = 2, path = 'x'}", "vsock: cid=2 is not from 3"),
    ("vsock = 'cid=3,path='", "vsock: cid=3,path=: nothing after path="),
    ("shares = [{path = 'nosuch', tag = ''}]", "shares[0]: {}/nosuch: no tag"),
    # --- no TOML
    ("cpus = 1\ncpus = 2\n", "line 2, column 9: Cannot overwrite a value"),
    ("\n\nkernel = vmlinuz", "line 3, column 10: Invalid value"),
    ("kernel = 'x", "line 1"),
    ("[drives", "line 1"),
    ("drives = [[[" + "[" * 2000, "nested too deeply"),
    ("cpus = " + "1" * 5000, "Exceeds the limit"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), WRONG, ids=[row[0][:40] for row in WRONG])
def test_wrong_toml(place: Path, text: str, says: str) -> None:
    path = write(place, text)
    with pytest.raises(UsageError) as caught:
        MachineConfig.load(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: {says.replace('{}', str(place))}"), line
    assert "\n" not in line


WRONG_JSON = [
    ('{"cpus": 1,\n "cpus": 2}', "cpus: given twice"),
    ('{\n "kernel": x}', "line 2, column 12: Expecting value"),
    ("", "line 1, column 1: Expecting value"),
    ("[1]", "the whole: [1] is not a table"),
    ("null", "the whole: None is not a table"),
    ('{"timeout": NaN}', "timeout: nan is not a number of seconds"),
    ("[" * 100_000, "nested too deeply"),
    ('{"cpus": ' + "1" * 5000 + "}", "Exceeds the limit"),
    ('{"cpus": ' + "1" * 100 + "}", "cpus: 1111"),
]


@pytest.mark.parametrize("key", ["=", "==", " =", ":", "-", "--", "", " ", "\n", "=\udca6", "é="])
def test_a_key_of_signs(key: str) -> None:
    with pytest.raises(UsageError):
        MachineConfig.from_dict({"kernel": "k", key: 1})


@pytest.mark.parametrize(("text", "says"), WRONG_JSON, ids=[row[0][:40] for row in WRONG_JSON])
def test_wrong_json(place: Path, text: str, says: str) -> None:
    path = write(place, text, "machine.json")
    with pytest.raises(UsageError) as caught:
        MachineConfig.load(path)
    assert str(caught.value).startswith(f"{path}: {says}"), caught.value
    assert "\n" not in str(caught.value)


def test_no_such_file_and_not_a_file(place: Path) -> None:
    for name, says in (
        ("nosuch.toml", "No such file or directory"),
        ("shared.toml", "Is a directory"),
        ("machine.yaml", "a configuration's name ends in .toml or .json"),
        ("latin.json", "line 2: not UTF-8 text"),
        ("huge.toml", "over 1 MiB is no configuration"),
    ):
        path = place / name
        if name.startswith("shared"):
            path.mkdir()
        elif name.startswith("latin"):
            path.write_bytes(b'{\n"append": "\xe4"}')
        elif name.startswith("huge"):
            with open(path, "wb") as file:
                file.truncate(1 << 30)
        with pytest.raises(UsageError) as caught:
            MachineConfig.load(str(path))
        assert str(caught.value) == f"{path}: {says}"


def test_what_is_given_beside_a_file_overrides_or_adds(place: Path) -> None:
    path = write(place, "kernel = 'k'\ncpus = 2\nappend = 'a'\ndrives = ['x.img']\nacpi = false")
    config = configure(path, {"cpus": 3, "append": "b", "drives": ["y.img"], "nets": ["user"]})
    assert (config.cpus, config.append, config.acpi) == (3, "a b", False)
    assert [drive.path for drive in config.drives] == [f"{place}/x.img", "y.img"]
    assert config.nets == (Net("user"),)


def test_a_complaint_names_whose_value_it_was(place: Path) -> None:
    path = write(place, "memory = '64M'\ncpus = 2000")
    given: dict[str, Any] = {"memory": 12}
    with pytest.raises(UsageError, match=r"^--memory 12 bytes is too little"):
        configure(path, given)
    with pytest.raises(UsageError) as caught:
        configure(path, {"memory": 64 * MIB})
    assert str(caught.value) == f"{path}: cpus: 2000 is not a number from 1 to 254"
    assert configure(path, {"cpus": 2}).memory == 64 * MIB


@pytest.mark.parametrize(
    "text",
    [
        ".".join(["a"] * 50_000) + " = 1",
        "[" + ".".join(["a"] * 50_000) + "]",
        "[[" + " . ".join(["'a'"] * 50_000) + "]]",
        'kernel = "k"\nx = {' + ".".join(['"a"'] * 50_000) + " = 1}",
    ],
    ids=["key", "table", "tables", "inline"],
)
@pytest.mark.timeout(60)
def test_keys_of_very_many_parts(place: Path, text: str) -> None:
    """tomllib takes minutes for each; hours for a file of the size that is allowed."""
    with pytest.raises(UsageError, match=r"line \d: a key of more than 200 parts"):
        MachineConfig.load(write(place, text))


def test_dots_in_text_are_no_parts_of_keys(place: Path) -> None:
    append = "a." * 300
    assert MachineConfig.load(write(place, f"append = '{append}'")).append == append
    assert MachineConfig.load(write(place, f'append = "\\"{append}"')).append == f'"{append}'


@pytest.mark.parametrize("name", ["deep.json", "deep.toml"])
@pytest.mark.parametrize("levels", [10, 150, 300, 900, 100_000])
def test_a_value_that_is_nested_deeply(place: Path, name: str, levels: int) -> None:
    value = "[" * levels + "]" * levels
    text = f'{{"cpus": {value}}}' if name.endswith("json") else f"cpus = {value}"
    with pytest.raises(UsageError) as caught:
        MachineConfig.load(write(place, text, name))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_fifo_is_not_waited_for(place: Path) -> None:
    os.mkfifo(place / "fifo.toml")
    with pytest.raises(UsageError, match=r"fifo\.toml: it is a FIFO, not a file"):
        MachineConfig.load(str(place / "fifo.toml"))


@pytest.mark.parametrize(
    "key", ["drives", "nets", "ports", "shares", "initrds", "vhost_user_blks", "rw"]
)
def test_lists_without_end(place: Path, key: str) -> None:
    """Each item has a name of its own, which would be looked for among all others."""
    items = ", ".join(f"'name=a{number}'" for number in range(40_000))
    with pytest.raises(UsageError, match=rf"{key}: a list of 40000; 1000 are the most"):
        MachineConfig.load(write(place, f"{key} = [{items}]"))
