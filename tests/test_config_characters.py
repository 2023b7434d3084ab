"""Text that is no possible path, from a file or a program, and bytes of a command line that are not
UTF-8: a line, and no traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vmm import Initramfs, MachineConfig
from vmm.cli import exec as execute
from vmm.cli import run
from vmm.errors import VmmError

PARTS: list[dict[str, object]] = [
    {"root": "X"},
    {"root": "dir", "rw": ["X"]},
    {"root": "dir", "overlay": ["X"]},
    {"root": "dir", "modules": "X"},
    {"shares": [{"path": "X", "tag": "x"}]},
    {"shares": [{"path": "dir", "tag": "X"}]},
    {"drives": [{"path": "X"}]},
    {"drives": [{"path": "a", "serial": "X"}]},
    {"drives": [{"path": "a", "format": "qcow2", "backing": ["X"]}]},
    {"console": "file:X"},
    {"append": "X"},
    {"nets": [{"kind": "tap", "name": "X"}]},
    {"nets": [{"kind": "socket", "name": "X"}]},
    {"nets": [{"kind": "user", "ip": "X"}]},
    {"nets": [{"kind": "user", "pcap": "X"}]},
    {"ports": [{"name": "x", "socket": "X"}]},
    {"ports": [{"name": "x", "file": "X"}]},
    {"vsock": {"cid": 5, "path": "X"}},
    {"vhost_user_blks": [{"socket": "X"}]},
]


@pytest.mark.parametrize("bad", ["a\0b", "a\ud800b"])
@pytest.mark.parametrize("part", PARTS, ids=[json.dumps(part) for part in PARTS])
def test_text_that_cannot_be(tmp_path: Path, part: dict[str, object], bad: str) -> None:
    data = json.dumps({"kernel": "k", **part}).replace('"X"', json.dumps(bad))
    file = tmp_path / "machine.json"
    file.write_text(data.replace("file:X", "file:" + json.dumps(bad)[1:-1]))
    (tmp_path / "dir").mkdir()
    try:
        MachineConfig.load(file).check_host()
    except VmmError as err:
        assert "\n" not in str(err)
    else:  # said at the start, when the disk or the kernel is opened
        assert "drives" in part or "append" in part


FORMS = {
    "--drive": ("a,serial=X", "a,format=X", "a,cache=X", "a,format=qcow2,backing=X"),
    "--net": ("user,ip=X", "user,mac=X", "user,forward=X", "tap=X", "socket=X", "user,pcap=X"),
    "--fs": ("dir,tag=X", "X,tag=x"),
    "--port": ("name=X", "name=x,socket=X", "name=x,file=X", "name=X,file=x"),
    "--vsock": ("cid=X", "cid=5,path=X"),
    "--console": ("file:X", "hvc,file:X"),
}


@pytest.mark.parametrize("module", [run, execute])
def test_bytes_that_are_not_utf8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir").mkdir()
    assert module in (run, execute)
    parser, configure = (
        (run.PARSER, run.configure) if module is run else (execute.PARSER, execute.configure)
    )
    tried = 0
    for option in parser.options:
        if not option.metavar:
            continue
        for form in ("X", *FORMS.get(option.name, ())):
            words = ["kernel", f"{option.name}={form}".replace("X", os.fsdecode(b"\xff"))]
            tried += 1
            try:
                configure(parser.parse(words)).check_host()  # type: ignore[operator]
            except VmmError as err:
                assert "\n" not in str(err)
    assert tried >= 40


def test_names_in_an_archive() -> None:
    name = os.fsdecode(b"n\xff")
    data = Initramfs().file(name, data=b"text").symlink("link", name).bytes()
    assert data.count(b"n\xff") == 2
