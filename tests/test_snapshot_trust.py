"""vmm/snapshot/trust.py: a snapshot that somebody else made has nothing of the host opened."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny
from tests.support.bare import MIB, bare_machine, until
from tests.support.snapshots import (
    descriptors,
    forge,
    read_manifest,
    reseal,
    write_manifest,
)
from vmm import Machine
from vmm.config_schema import PROPERTIES
from vmm.errors import SnapshotError, UsageError
from vmm.snapshot import trust

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(120)]

HALTED = "1: hlt; jmp 1b"
FOREIGN = "was made by another user or elsewhere, or was changed since, and names"


@pytest.fixture(scope="module")
def plain_snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a machine that has nothing of the host."""
    path = tmp_path_factory.mktemp("plain") / "snap"
    with bare_machine(HALTED, console="none") as m:
        m.snapshot(path)
    return path


@pytest.fixture
def snap(plain_snapshot: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(plain_snapshot, tmp_path / "snap")
    return tmp_path / "snap"


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A directory of the host with what is worth having."""
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "victim").write_bytes(b"precious".ljust(1024, b"\n"))
    return tmp_path / "host"


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_every_key_of_a_configuration_is_the_guests_or_the_hosts() -> None:
    """A new one has to be put into one of the two lists."""
    assert sorted(trust.GUEST + trust.HOST) == sorted(PROPERTIES)


NAMING: list[tuple[str, Any]] = [
    ("console", "file:HOST/victim"),
    ("console", "hvc,file:HOST/victim"),
    ("console", "pty"),
    ("drives", ["HOST/victim"]),
    ("drives", [{"path": "HOST/victim"}]),
    ("drives", [{"path": "HOST/victim", "readonly": True}]),
    ("drives", [{"path": "HOST/victim", "format": "qcow2", "backing": ["HOST/victim"]}]),
    ("drives", [{"path": "HOST/victim", "format": "qcow2", "data_file": "HOST/victim"}]),
    ("nets", ["user"]),
    ("nets", [{"kind": "user", "forward": ["tcp:18099:22"]}]),
    ("nets", [{"kind": "user", "pcap": "HOST/pcap"}]),
    ("nets", [{"kind": "none", "pcap": "HOST/pcap"}]),
    ("nets", [{"kind": "tap"}]),
    ("nets", [{"kind": "tap", "name": "vmmtrust0"}]),
    ("nets", [{"kind": "bridge", "name": "br0"}]),
    ("nets", [{"kind": "socket", "name": "HOST/socket"}]),
    ("nets", [{"kind": "lan", "name": "mine"}]),
    ("ports", ["name=p,file=HOST/victim"]),
    ("ports", [{"name": "p", "file": "HOST/victim"}]),
    ("ports", [{"name": "p", "socket": "HOST/socket"}]),
    ("vsock", "cid=7,path=HOST/socket"),
    ("vsock", {"cid": 7, "path": "HOST/socket"}),
    ("vsock", {"cid": 7, "vhost": True}),
    ("shares", ["HOST,tag=t"]),
    ("shares", [{"path": "HOST", "tag": "t"}]),
    ("vhost_user_blks", ["HOST/socket"]),
    ("vhost_user_blks", [{"socket": "HOST/socket"}]),
    ("root", "HOST"),
    ("root", "HOST/victim"),
    ("rw", ["HOST"]),
    ("overlay", ["HOST"]),
    ("modules", "HOST"),
    ("device", "HOST/victim"),
]


def within(value: Any, host: Path) -> Any:
    """`value` with the path of `host` in it."""
    if isinstance(value, dict):
        return {key: within(item, host) for key, item in value.items()}
    if isinstance(value, list):
        return [within(item, host) for item in value]
    return value.replace("HOST", str(host)) if isinstance(value, str) else value


@pytest.mark.parametrize(
    ("key", "value"), NAMING, ids=[f"{key}-{n}" for n, (key, _) in enumerate(NAMING)]
)
@pytest.mark.parametrize("way", ["as it is", "trusted=False"])
def test_what_a_forged_manifest_names_is_not_opened(
    snap: Path, host: Path, key: str, value: Any, way: str
) -> None:
    """Each kind of thing a configuration can name."""
    forge(snap, config={key: within(value, host)})
    before, open_before = files(host), descriptors()
    options = {} if way == "as it is" else {"trusted": False}
    refusal = pytest.raises(SnapshotError, match=rf"{FOREIGN} .*\({key}: ")
    with refusal as caught, Machine.restore(snap, **options) as m:
        m.start()
    assert "\n" not in str(caught.value) and f"({key}=)" in str(caught.value)
    assert (files(host), descriptors()) == (before, open_before)


def test_all_host_keys_are_tried_above() -> None:
    assert {key for key, _ in NAMING} == set(trust.HOST)


def test_names_given_by_the_caller_are_the_callers(snap: Path, host: Path) -> None:
    """What the manifest has there is not even looked at."""
    forge(
        snap,
        config={
            "console": f"file:{host}/victim",
            "vsock": {"cid": 7, "path": f"{host}/socket"},
            "shares": [{"path": f"{host}/nowhere", "tag": "t"}],
        },
    )
    before = files(host)
    with pytest.raises(SnapshotError, match=rf"{FOREIGN} .*\(vsock: [^;]*\); say"):
        Machine.restore(snap, console="none", shares=[])
    with Machine.restore(snap, console="none", vsock=None, shares=[]) as m:
        m.start()
    assert files(host) == before


def test_the_guests_own_keys_name_nothing(snap: Path, host: Path) -> None:
    """A kernel and initrds are in the guest's memory: their files are not opened."""
    os.mkfifo(host / "fifo")  # to open it would wait for ever
    forge(snap, config={"kernel": f"{host}/fifo", "initrds": [f"{host}/fifo"], "append": "x"})
    with Machine.restore(snap) as m:
        m.start()
        m.pause()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A snapshot of this user's, whose manifest names things of the host."""
    log, image = tmp_path / "log", tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    options: dict[str, Any] = {
        "console": f"file:{log}",
        "drives": [f"{image},readonly"],
        "vsock": f"cid=7,path={tmp_path / 'v'}",
        "ports": [f"name=p,file={tmp_path / 'p'}"],
    }
    with bare_machine(HALTED, **options) as m:
        m.start()
        m.snapshot(tmp_path / "own")
    log.unlink()
    return tmp_path / "own"


def test_the_names_in_a_snapshot_of_ones_own_are_opened(own: Path, tmp_path: Path) -> None:
    with Machine.restore(own) as m:
        m.start()
        assert (tmp_path / "log").exists() and (tmp_path / "v").is_socket()
    os.rename(own, tmp_path / "moved")
    with Machine.restore(tmp_path / "moved"):
        pass
    with pytest.raises(SnapshotError, match=rf"{FOREIGN} .*console: .*drives: .*ports: .*vsock: "):
        Machine.restore(tmp_path / "moved", trusted=False)
    with pytest.raises(UsageError, match="trusted='no' is not True, False or None"):
        Machine.restore(tmp_path / "moved", trusted="no")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"console": "file:HOST/victim"},
        {"ports": [{"name": "p", "file": "HOST/victim"}]},
        {"drives": [{"path": "HOST/victim", "readonly": True}]},
        {"nets": [{"kind": "lan", "name": "x"}]},
        {"vsock": {"cid": 8, "path": "HOST/v"}},
        {"modules": "HOST"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_seal_is_of_each_name(own: Path, host: Path, change: dict[str, Any]) -> None:
    forge(own, config=within(change, host))
    before = files(host)
    with pytest.raises(SnapshotError, match=FOREIGN):
        Machine.restore(own)
    assert files(host) == before


def test_the_seal_is_of_the_directory_too(own: Path, host: Path) -> None:
    """Relative names are taken from it."""
    told = read_manifest(own)
    assert len(told[trust.SEAL]) == 64
    told["directory"] = str(host)
    write_manifest(own, told)
    with pytest.raises(SnapshotError, match=FOREIGN):
        Machine.restore(own)


@pytest.mark.parametrize("seal", ["", "0" * 64, "é" * 64, None], ids=range(4))
def test_a_seal_that_is_none(own: Path, seal: str | None) -> None:
    told = read_manifest(own)
    told[trust.SEAL] = seal
    if seal is None:
        del told[trust.SEAL]
    write_manifest(own, told)
    with pytest.raises(SnapshotError, match=FOREIGN):
        Machine.restore(own)
    with Machine.restore(own, trusted=True):
        pass


def test_another_disk_than_the_drive_that_has_the_seal(own: Path, host: Path) -> None:
    """The list of disks is not what the seal is on."""
    told = read_manifest(own)
    victim = host / "victim"
    info = victim.stat()
    told["disks"][0].update(
        path=str(victim), size=info.st_size, stored=info.st_size, mtime=info.st_mtime_ns
    )
    write_manifest(own, told)
    with pytest.raises(SnapshotError, match=r"its disk .*victim is another than its machine's"):
        Machine.restore(own)
    write_manifest(own, {**told, "disks": []})
    with pytest.raises(SnapshotError, match="has 1 drives, and 0 disks are in its manifest"):
        Machine.restore(own)


def test_disks_in_the_snapshot_are_the_snapshots(tmp_path: Path, host: Path) -> None:
    """Where a copy is in it, the name of the image that was copied leads to nothing."""
    image = tmp_path / "disk.img"
    image.write_bytes(b"disk".ljust(MIB, b"\0"))
    with bare_machine(HALTED, drives=[str(image)]) as m:
        m.snapshot(tmp_path / "snap")
    image.unlink()
    forge(tmp_path / "snap", config={"drives": [{"path": f"{host}/victim"}]})
    with Machine.restore(tmp_path / "snap", trusted=False) as m:
        found = bytearray(4)
        device: Any = m.virtio_device("blk0")
        device.image.read([memoryview(found)], 0)
        assert found == b"disk"


def test_bases_are_beside_a_snapshot_or_have_the_seal(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with bare_machine(HALTED) as m:
        m.snapshot(tmp_path / "a" / "full")
        m.snapshot(tmp_path / "a" / "diff", base=tmp_path / "a" / "full")
        m.snapshot(tmp_path / "b" / "far", base=tmp_path / "a" / "full")
    told = read_manifest(tmp_path / "a" / "diff")
    assert trust.SEAL not in told
    for path in ("a/diff", "b/far"):
        with Machine.restore(tmp_path / path):
            pass
    with Machine.restore(tmp_path / "a" / "diff", trusted=False):
        pass
    with pytest.raises(SnapshotError, match="its base is elsewhere"):
        Machine.restore(tmp_path / "b" / "far", trusted=False)
    (tmp_path / "b" / "diff").mkdir()
    for name in ("memory", "memory.index", "state.json"):
        shutil.copy(tmp_path / "a" / "diff" / name, tmp_path / "b" / "diff" / name)
    for path in ("../../a/full", str(tmp_path / "a" / "full"), "../x/../../a/full", "..", "."):
        write_manifest(tmp_path / "b" / "diff", {**told, "base": {**told["base"], "path": path}})
        with pytest.raises(SnapshotError, match="its base is elsewhere"):
            Machine.restore(tmp_path / "b" / "diff")
    (tmp_path / "b" / "full").symlink_to(tmp_path / "a" / "full")
    write_manifest(tmp_path / "b" / "diff", told)
    with pytest.raises(SnapshotError, match=r"its base: .*full is no directory of a snapshot"):
        Machine.restore(tmp_path / "b" / "diff")
    with Machine.restore(tmp_path / "b" / "diff", trusted=True):
        pass


def test_a_ring_of_bases(tmp_path: Path) -> None:
    """Each the other's, or its own: the checksum of one cannot be in both."""
    with bare_machine(HALTED) as m:
        for name in ("x", "y"):
            m.snapshot(tmp_path / name)
    for name, base in (("x", "../y"), ("y", "../x"), ("x", "../x")):
        forge(tmp_path / name, base={"path": base, "checksum": "0" * 64})
        with pytest.raises(SnapshotError, match="is another snapshot than its base was"):
            Machine.restore(tmp_path / name)


def test_a_long_chain_takes_no_stack(tmp_path: Path) -> None:
    """More snapshots than a Python has frames would be too many for descriptors; some hundred
    are enough to see that opening one opens the next in turn, not within itself."""
    with bare_machine(HALTED, memory=MIB * 2) as m:
        m.snapshot(tmp_path / "0")
    checksum = read_manifest(tmp_path / "0")["checksum"]
    empty = bytearray((tmp_path / "0" / "memory.index").read_bytes()[:24])
    empty[12:24] = bytes(12)
    for number in range(1, 300):
        path = tmp_path / str(number)
        path.mkdir()
        shutil.copy(tmp_path / "0" / "state.json", path / "state.json")
        shutil.copy(tmp_path / "0" / "manifest.json", path / "manifest.json")
        with open(path / "memory", "wb") as file:
            file.truncate(2 * MIB)
        (path / "memory.index").write_bytes(empty)
        reseal(path, "memory.index")
        forge(path, base={"path": f"../{number - 1}", "checksum": checksum})
        checksum = read_manifest(path)["checksum"]
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(200)
    try:
        with Machine.restore(tmp_path / "299", verify=True):
            pass
    finally:
        sys.setrecursionlimit(limit)


# --- the key --------------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home for the key, which this process does not have yet."""
    (tmp_path / "state").mkdir()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(trust, "_key", b"")
    monkeypatch.setattr(trust, "_stamps", {})
    return tmp_path / "state"


def test_the_key_is_made_once_and_is_this_users_alone(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trust.key()
    path = state / "vmm" / trust.NAME
    assert path.read_bytes() == first and len(first) == trust.KEY_SIZE
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o077 == 0
    assert os.listdir(path.parent) == [trust.NAME]
    monkeypatch.setattr(trust, "_key", b"")
    assert trust.key() == first


@pytest.mark.parametrize("how", ["readable", "link", "fifo", "short", "another's"])
def test_a_key_that_others_may_know_is_not_used(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    known = b"k" * trust.KEY_SIZE
    place = state / "vmm"
    place.mkdir(mode=0o700)
    path = place / trust.NAME
    monkeypatch.setattr(trust, "_places", lambda: iter([str(place)]))
    if how == "link":
        (tmp_path / "known").write_bytes(known)
        (tmp_path / "known").chmod(0o600)
        path.symlink_to(tmp_path / "known")
    elif how == "fifo":
        os.mkfifo(path, 0o600)
    else:
        path.write_bytes(known[: 5 if how == "short" else None])
        path.chmod(0o644 if how == "readable" else 0o600)
        if how == "another's":
            if os.geteuid():
                pytest.skip("only root can give a file away")
            os.chown(path, 12345, -1)
    assert trust.key() != known and len(trust.key()) == trust.KEY_SIZE


def test_the_key_is_in_no_place_of_anothers(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root with an ordinary user's home (sudo)."""
    if os.geteuid():
        pytest.skip("only root can give a directory away")
    os.chown(state, 12345, -1)
    monkeypatch.setattr(trust, "_places", lambda: iter([str(state / "vmm")]))
    assert len(trust.key()) == trust.KEY_SIZE
    assert os.listdir(state) == []


def test_a_bare_restore_needs_no_key(snap: Path, state: Path) -> None:
    with Machine.restore(snap):
        pass
    assert os.listdir(state) == []


def test_a_process_without_the_key_seals_what_its_machine_had_before(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `vmm run` does, which reads the key before it gives up reading files."""
    options: dict[str, Any] = {"console": f"file:{tmp_path}/log", "nets": ["lan=sealed"]}
    with bare_machine(HALTED, **options) as m:
        m.start()
        trust.prepare(m.config, m.directory)
        key = trust.key()
        with monkeypatch.context() as patch:
            patch.setattr(trust, "key", lambda: pytest.fail("it reads the key"))
            m.snapshot(tmp_path / "snap")
    monkeypatch.setattr(trust, "_stamps", {})
    with Machine.restore(tmp_path / "snap"):
        assert trust.key() == key


def test_another_users_key_does_not_fit(own: Path, state: Path) -> None:
    with pytest.raises(SnapshotError, match=FOREIGN):
        Machine.restore(own)


def test_a_machine_of_the_commands_goes_on_with_all_it_had(tmp_path: Path) -> None:
    """`vmm run`, `vmm snapshot`, `vmm restore`: no option again."""
    kernel, control = tiny.kernel(tmp_path, tiny.COUNTING), tmp_path / "control"
    (tmp_path / "ro.img").write_bytes(bytes(MIB))
    given = [
        *("--drive", f"{tmp_path}/ro.img,readonly", "--vsock", f"cid=5,path={tmp_path}/v"),
        *("--port", f"name=p,file={tmp_path}/p", "--console", f"file:{tmp_path}/log"),
    ]
    command = tiny.command("run", kernel, "--control", str(control), *given)
    with subprocess.Popen(command, env=tiny.environment(), stderr=subprocess.PIPE) as process:
        try:
            until(control.exists)
            done = tiny.run("snapshot", str(tmp_path / "snap"), "--control", str(control), "--stop")
            assert done.returncode == 0, done.stderr
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert set(read_manifest(tmp_path / "snap")) > {trust.SEAL}
    done = tiny.run("restore", str(tmp_path / "snap"), "--timeout", "0.2")
    assert done.returncode == 124, done.stderr


def test_from_the_command_line(own: Path, snap: Path, host: Path, tmp_path: Path) -> None:
    """Another process of the same user has the same key; --trusted says that it does not matter."""
    words = ["--timeout", "0.2", "--console", "none"]
    done = tiny.run("restore", str(own), *words)
    assert done.returncode == 124, done.stderr
    forge(snap, config={"vsock": {"cid": 7, "path": f"{host}/v"}})
    done = tiny.run("restore", str(snap), *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "(vsock=), or, if you trust whoever made it" in done.stderr
    assert sorted(os.listdir(host)) == ["victim"]
    told = read_manifest(snap)
    del told["config"]["vsock"]
    told["config"]["console"] = f"file:{host}/log"
    write_manifest(snap, told)
    code = (
        "import sys; from vmm import Machine\n"
        "with Machine.restore(sys.argv[1], trusted=True) as m: m.start()"
    )
    subprocess.run([sys.executable, "-c", code, str(snap)], check=True, env=tiny.environment())
    assert sorted(os.listdir(host)) == ["log", "victim"]
    done = tiny.run("restore", str(snap), "--timeout", "0.2", "--trusted", "--console", "none")
    assert done.returncode == 124, done.stderr
