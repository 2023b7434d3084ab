"""vmm.cli.foreign, .foreign_table, .foreign_values: the words of other programs, and ours for them.

Every answer of the form "say WORDS" is followed: the words are given to the command's own parser
and make a configuration.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from tests.support import boot_files
from vmm import UsageError
from vmm.block.drive import Drive
from vmm.cli import _command, exec, run
from vmm.cli.foreign import COMMANDS, NO_COMMANDS
from vmm.cli.foreign_table import TABLE
from vmm.cli.foreign_values import VALUES

PAGE = Path(__file__).parents[1] / "docs/other-tools.md"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the command lines name."""
    kernel = boot_files.elf(notes=boot_files.pvh_note(1 << 20))
    for name in ("vmlinuz", "vmlinux", "K"):
        (tmp_path / name).write_bytes(kernel)
    for name in ("disk.img", "image.iso", "d.img"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    (tmp_path / "d.qcow2").write_bytes(b"QFI\xfb" + bytes(1020))
    (tmp_path / "initrd.img").write_bytes(b"070701" + bytes(506))
    (tmp_path / "DIR").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complaint(*words: str) -> str:
    with pytest.raises(UsageError) as caught:
        _command(list(words))
    return str(caught.value).removesuffix(f" (see vmm {words[0]} --help)")


def follow(hint: str, command: str = "vmm run") -> list[str]:
    """The words after "say", which the command takes."""
    words = shlex.split(hint.partition("say ")[2])
    if words[:2] in (["vmm", "run"], ["vmm", "exec"]):
        command, words = " ".join(words[:2]), words[2:]
    else:
        words = ["K", *words]
    parser = run.PARSER if command == "vmm run" else exec.PARSER
    args = parser.parse(words)
    run.configure(args)
    return words


RUN = [
    ("-m 512", "'-m' is no option; say --memory 512"),
    ("-m", "'-m' is no option; say --memory 512M"),
    ("-m 2G,slots=2,maxmem=4G", "'-m' is no option; say --memory 2G"),
    ("-memory 64M", "'-memory' is no option; say --memory 64M"),
    ("-smp 4", "'-smp' is no option; say --cpus 4"),
    ("-smp cpus=2,cores=2", "'-smp' is no option; say --cpus 2"),
    ("--vcpus=3", "'--vcpus' is no option; say --cpus 3"),
    ("--kernel vmlinuz", "'--kernel' is no option; say vmm run vmlinuz"),
    ("-append 'a b'", "'-append' is no option; say --append 'a b'"),
    ("-hda disk.img", "'-hda' is no option; say --drive disk.img"),
    ("--disk path=disk.img", "'--disk' is no option; say --drive disk.img"),
    ("-p 8080:80", "'-p' is no option; say --net user,forward=tcp:8080:80"),
    ("-p 127.0.0.1:53:53/udp", "'-p' is no option; say --net user,forward=udp:127.0.0.1:53:53"),
    ("-p quiet", "'-p' is no option; say --append quiet"),
    ("-v DIR:/mnt", "-v DIR:/mnt: -v is --verbose; say --fs DIR,tag=mnt"),
    ("-v ./DIR:/a/b:ro", "-v ./DIR:/a/b:ro: -v is --verbose; say --fs ./DIR,tag=b,readonly"),
    ("-d disk.img", "'-d' is no option; say --drive disk.img"),
    ("-i initrd.img", "'-i' is no option; say --initrd initrd.img"),
    ("-nographic", "'-nographic' is no option; leave it out: there is no screen; "
     "the serial console is on this terminal"),
    ("--rm", "'--rm' is no option; leave it out: nothing of a machine stays behind"),
    ("--name x", "'--name' is no option; leave it out: machines have no names here"),
    ("--quiet", "'--quiet' is no option; leave it out: nothing but the guest is heard without "
     "--verbose"),
    ("--api-sock x", "'--api-sock' is no option; --control PATH makes a socket for vmm snapshot; "
     "a program uses the Python API"),
    ("-it", "'-it' is no option; vmm exec has one: --tty"),
    ("--root /", "'--root' is no option of vmm run; it is one of vmm exec"),
    ("--verify", "'--verify' is no option of vmm run; it is one of vmm restore"),
    ("--balloon 64M", "--balloon 64M: its value follows a '='; say --balloon=64M"),
    ("--rng rate=64K", "--rng rate=64K: its value follows a '='; say --rng=rate=64K"),
    ("--drvie d.img", "'--drvie' is no option; --drive is one"),
    ("--xyzzy", "'--xyzzy' is no option"),
    ("-b path=d.img,ro=true", "'-b' is no option; say --drive d.img,readonly"),
    ("--block path=d.img,root=true", "'--block' is no option; say --drive d.img"),
    ("--disk x=d.img", "'--disk' is no option; say --drive d.img"),
    ("-blockdev driver=file,node-name=f,filename=d.img", "'-blockdev' is no option; say "
     "--drive d.img"),
    ("--shared-dir DIR:t:type=fs:cache=always", "'--shared-dir' is no option; say --fs DIR,tag=t"),
    ("--filesystem DIR,t,driver.type=virtiofs", "'--filesystem' is no option; say --fs DIR,tag=t"),
    ("-smp sockets=1,cores=2,threads=2", "'-smp' is no option; say --cpus 4"),
    ("-cpu host,avx2=off", "'-cpu' is no option; say --cpu host,-avx2"),
    ("-cpu help", "'-cpu' is no option; --cpu is, as in --cpu host"),
    ("-netdev vhost-user,id=n,chardev=c", "'-netdev' is no option; --net is, as in --net user"),
    ("-device isa-debug-exit,iobase=0xf4", "'-device' is no option; leave out -device "
     "isa-debug-exit,iobase=0xf4: the machine has it, or another option makes it"),
    ("-device help", "'-device' is no option; --drive, --net, --fs, --rng, --balloon, --vsock and "
     "--port make devices"),
    ("-net nic", "'-net' is no option; leave it out: a card and its other end are one --net user"),
    ("-serial tcp::4444,server", "'-serial' is no option; --console auto, none, pty and file:PATH "
     "are the places of a console; --port name=N,socket=PATH is a socket for a program"),
    ("-k en-us", "'-k' is no option; leave it out: there is no keyboard"),
    ("-d --xyzzy", "'-d' is no option; a machine stays in the foreground; a shell's & puts it "
     "behind"),
    ("--version", "'--version' is no option; vmm version says it"),
    ("--qemu-opts=-s", "'--qemu-opts' is no option; leave it out: there is no QEMU beneath; vmm "
     "has options of its own for what it can"),
    ("--json", "'--json' is no option of vmm run; it is one of vmm doctor, vmm version"),
    ("--rng on", "--rng on: say --rng"),
    ("initrd.img", "'initrd.img' is one KERNEL too many; say --initrd initrd.img"),
    ("disk.img", "'disk.img' is one KERNEL too many; say --drive disk.img"),
    ("DIR", "'DIR' is one KERNEL too many; say --fs DIR,tag=share"),
    ("512M", "'512M' is one KERNEL too many; say --memory 512M"),
    ("root=/dev/vda rw quiet", "'root=/dev/vda' is one KERNEL too many; say --append "
     "'root=/dev/vda rw quiet'"),
    ("--append console=ttyS0 root=/dev/vda", "'root=/dev/vda' is one KERNEL too many; say "
     "--append root=/dev/vda"),
    ("--balloon 100%", "only one KERNEL can be given, not 'K' and '100%'; a command is run by vmm "
     "exec KERNEL -- CMD, words for the kernel's command line follow --append"),
    ("ls", "only one KERNEL can be given, not 'K' and 'ls'; a command is run by vmm exec KERNEL "
     "-- CMD, words for the kernel's command line follow --append"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "says"), RUN)
def test_an_option_of_another_program(line: str, says: str) -> None:
    hint = complaint("run", "K", *shlex.split(line))
    assert hint == says
    if "say " in hint:
        follow(hint)


VALUE = [
    ("--drive path=disk.img", "--drive disk.img"),
    ("--drive file=disk.img,if=virtio,id=d,aio=native", "--drive disk.img"),
    ("--drive file=d.qcow2,format=qcow2,read-only=on", "--drive d.qcow2,format=qcow2,readonly"),
    ("--drive disk.img:ro", "--drive disk.img,readonly"),
    ("--drive disk.img,ro", "--drive disk.img,readonly"),
    ("--drive disk.img,cache=directsync", "--drive disk.img,cache=none"),
    ("--drive disk.img,media=cdrom", "--drive disk.img,readonly"),
    ("--fs DIR:/mnt", "--fs DIR,tag=mnt"),
    ("--fs type=bind,source=DIR,target=/a/b,ro", "--fs DIR,tag=b,readonly"),
    ("--fs DIR,t", "--fs DIR,tag=t"),
    ("--net user,hostfwd=tcp::2222-:22", "--net user,forward=tcp:2222:22"),
    ("--net user,id=n,hostfwd=udp:127.0.0.1:53-10.0.2.15:53",
     "--net user,forward=udp:127.0.0.1:53:53"),
    ("--net nat", "--net user"),
    ("--net default", "--net user"),
    ("--net tap:foo", "--net tap=foo"),
    ("--net tap,ifname=foo,script=no", "--net tap=foo"),
    ("--net bridge:br1", "--net bridge=br1"),
    ("--net mode=user", "--net user"),
    ("--memory size=64M", "--memory 64M"),
    ("--cpus boot=2,max=4", "--cpus 2"),
    ("--cpus 2,maxcpus=4", "--cpus 2"),
    ("--console stdio", "--console auto"),
    ("--console ttyS0", "--console auto"),
    ("--console off", "--console none"),
    ("--console file=log", "--console file:log"),
    ("--console virtio", "--console hvc"),
    ("--cpu qemu64", "--cpu host"),
    ("--cpu Haswell-noTSX,+avx2", "--cpu host"),
    ("--cpu host-passthrough", "--cpu host"),
    ("--vsock 3", "--vsock cid=3,path=/tmp/vm.vsock"),
    ("--vsock guest-cid=3,path=x", "--vsock cid=3,path=x"),
    ("--timeout 5m", "--timeout 300"),
    ("--timeout 1h30m", "--timeout 5400"),
    ("--timeout 1.5s", "--timeout 1.5"),
    ("--on-panic reboot", "--on-panic exit"),
    ("--on-panic preserve", "--on-panic pause"),
    ("--transport virtio-pci", "--transport pci"),
    ("--rng=/dev/urandom", "--rng"),
    ("--balloon=size=64M", "--balloon=64M"),
    ("--rng=on", "--rng"),
    ("--drive raw:disk.img", "--drive disk.img"),
    ("--drive d.img:/dev/vda", "--drive d.img"),
    ("--cpu host,avx2=off,sse=on", "--cpu host,-avx2,+sse"),
    ("--cpus cores=2,threads=2", "--cpus 4"),
    ("--console log.txt", "--console file:log.txt"),
    ("--console ./log", "--console file:./log"),
    ("--console /dev/null", "--console none"),
    ("--console pty,target_type=serial", "--console pty"),
    ("--console type=file,path=log", "--console file:log"),
    ("--net tap-name=foo", "--net tap=foo"),
    ("--net tap=foo,mac=,ip=,mask=,num_queues=2", "--net tap=foo"),
    ("--fs DIR:t:type=fs", "--fs DIR,tag=t"),
    ("--fs DIR,tag=t,cache=always", "--fs DIR,tag=t"),
    ("--port 8080:80", "--net user,forward=tcp:8080:80"),
    ("--grace 5s", "--grace 5"),
    ("--vhost-user-blk vhost_user=on,socket=S,num_queues=2", "--vhost-user-blk S,queues=2"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "ours"), VALUE)
def test_a_value_of_another_program(line: str, ours: str) -> None:
    option, _, value = line.replace("=", " ", 1).partition(" ")
    if not line.startswith(("--rng", "--balloon")):
        option, _, value = line.partition(" ")
    hint = complaint("run", "K", *line.split())
    assert hint == f"{option} {value}: say {ours}"
    follow(hint)


@pytest.mark.parametrize(("option", "value"), [
    ("--drive", "disk.img,format=raw,cache=none"), ("--drive", "disk.img"), ("--net", "user"),
    ("--net", "tap=foo,mac=52:54:00:00:00:01"), ("--memory", "64M"), ("--cpus", "2"),
    ("--fs", "DIR,tag=t,readonly"), ("--console", "none"), ("--console", "hvc"),
    ("--console", "auto"), ("--cpu", "host"), ("--cpu", "host,+avx2"), ("--cpu", "x86-64-v2"),
    ("--timeout", "5"), ("--vsock", "cid=3,path=x"), ("--transport", "pci"),
    ("--on-panic", "exit"),
])  # fmt: skip
def test_our_own_words_stay(option: str, value: str) -> None:
    assert VALUES[option](value) in (None, [option, value])


def test_an_error_of_another_kind_keeps_its_words() -> None:
    hint = complaint("run", "K", "--initrd", "nosuch", "--drive", "disk.img", "--cpu", "host")
    assert hint.startswith("--initrd nosuch")


@pytest.mark.parametrize("value", [
    "", ",", "=", ",,", ":", "a=b", ":ro", "type=bind", "tcp", "file=", "size=", "cid=x", "s", ".m",
    "1..2s", "user,hostfwd=", "local,mount_tag=t", "\0", "é,\n",
])  # fmt: skip
def test_no_value_is_an_internal_error(value: str) -> None:
    for option, function in VALUES.items():
        words = function(value) if value else None
        assert words is None or words[0].startswith(option)
    for row in TABLE:
        row.words(value)


def test_a_whole_command_line() -> None:
    hint = complaint("run", *shlex.split(
        "-m 2G -smp 4 -kernel vmlinuz -initrd initrd.img -append 'console=ttyS0 root=/dev/vda' "
        "-nographic -enable-kvm -drive file=d.qcow2,format=qcow2,if=none,id=d -cpu host "
        "-device virtio-blk-pci,drive=d -netdev user,id=n0,hostfwd=tcp::2222-:22 "
        "-device virtio-net-pci,netdev=n0 -serial mon:stdio -no-reboot"
    ))  # fmt: skip
    assert follow(hint) == [
        "vmlinuz", "--memory", "2G", "--cpus", "4", "--initrd", "initrd.img", "--append",
        "console=ttyS0 root=/dev/vda", "--drive", "d.qcow2,format=qcow2", "--cpu", "host",
        "--net", "user,forward=tcp:2222:22",
    ]  # fmt: skip
    hint = complaint("run", *shlex.split(
        "--kernel vmlinux --cmdline quiet --disk path=disk.img --cpus boot=4 --memory size=64M "
        "--serial tty --console off"
    ))  # fmt: skip
    assert shlex.join(follow(hint)) == (
        "vmlinux --append quiet --drive disk.img --cpus 4 --memory 64M --console none"
    )


def test_what_is_left_out_makes_no_other_machine() -> None:
    """-snapshot protects all disks, and -loadvm is not a start."""
    hint = complaint("run", *shlex.split("-snapshot -hda disk.img -drive file=d.img,readonly=on K"))
    assert hint == "'-snapshot' is no option; say " + (
        "vmm run K --drive disk.img,snapshot --drive d.img,readonly"
    )
    follow(hint)
    hint = complaint("run", *shlex.split("-m 64 -smp 2 -loadvm x K"))
    assert hint == "'-m' is no option; say --memory 64"


def test_a_kernels_option_alone_brings_the_rest_of_the_line() -> None:
    hint = complaint("run", "--kernel", "vmlinuz", "--memory", "size=64M", "--drive", "d.img:ro")
    assert hint == (
        "'--kernel' is no option; say vmm run vmlinuz --memory 64M --drive d.img,readonly"
    )
    follow(hint)
    assert complaint("run", "-r") == "'-r' is no option; the file follows without one: vmm run FILE"


@pytest.mark.parametrize(("line", "says"), [
    ("-r K --root DIR -- uname -r", "'-r' is no option; say vmm exec K --root DIR -- uname -r"),
    ("--rm -it K --root DIR sh -c id",
     "'--rm' is no option; say vmm exec K --tty --root DIR -- sh -c id"),
    ("K --exec 'uname -r'", "'--exec' is no option; vmm exec KERNEL -- CMD runs a command"),
    ("K --root DIR --rwdir /mnt/a=DIR -- ls", "'--rwdir' is no option; say --fs DIR,tag=a"),
    ("K --root DIR --rwdir DIR -- ls", "'--rwdir' is no option; say --rw DIR"),
    ("K --root DIR --rwdir DIR --pwd -- ls", "'--rwdir' is no option; say vmm exec K --root DIR "
     "--rw DIR -- ls"),
    ("K --rodir /x=DIR -- ls", "'--rodir' is no option; say --fs DIR,tag=x,readonly"),
    ("uname -r", "'uname': the command comes after --: vmm exec KERNEL -- uname -r"),
    ("ls", "'ls': the command comes after --: vmm exec KERNEL -- ls"),
    ("K --root DIR --memory size=64M -- ls", "--memory size=64M: say --memory 64M"),
    ("K --root DIR --grace 5m -- ls", "--grace 5m: say --grace 300"),
    ("K --root DIR --drive d.img,if=virtio -- ls", "--drive d.img,if=virtio: say --drive d.img"),
])  # fmt: skip
def test_words_of_exec(line: str, says: str) -> None:
    assert complaint("exec", *shlex.split(line)) == says


def test_words_of_other_commands(place: Path) -> None:
    assert complaint("restore", "DIR", "--timeout", "5m") == "--timeout 5m: say --timeout 300"
    assert complaint("restore", "DIR", "--drive", "d.img,if=virtio").endswith("say --drive d.img")
    assert complaint("resize", "blk0", "20G") == (
        "only one DISK can be given; its size is told by --size 20G"
    )
    assert complaint("doctor", "-v").startswith("'-v' is no option of vmm doctor; it is one of vmm")
    assert complaint("snapshot", "new", "--control", "d.img") == (
        "--control d.img is no socket; give the path that the machine was started with"
    )


@pytest.mark.parametrize("name", ["M.TOML", "vm.xml", "docker-compose.yml"])
def test_a_description_of_another_kind(place: Path, name: str) -> None:
    (place / name).write_text("kernel: K\n")
    for command in ("run", "config"):
        assert complaint(command, name) == (
            f"{name}: the name of a file that describes a machine ends in .toml or .json"
        )


def test_a_tilde_and_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for value in ("~/d.img", "path=~/d.img"):
        hint = complaint("run", "K", "--drive", value)
        assert hint.startswith(f"--drive {value}: the shell expands ~ only where a word begins")
        assert hint.endswith(f"say --drive {value.replace('~', '/home/me')}")
    for words, option in ((["https://x/K"], ""), (["K", "--drive", "http://x/d.img"], "--drive ")):
        assert complaint("run", *words) == (
            f"{option}{words[-1]}: vmm opens files; fetch it first: curl -LO {words[-1]}"
        )
    assert complaint("run", "K", "--drive", "nbd://localhost").endswith("copy it into a file first")
    # The guest's words are nobody's file.
    args = run.PARSER.parse(["K", "--append", "ds=nocloud;s=http://x/ init=~/x"])
    run.configure(args)


def test_firecrackers_configuration(place: Path) -> None:
    (place / "vm.json").write_text(json.dumps({
        "boot-source": {"kernel_image_path": "K", "boot_args": "a b", "initrd_path": "initrd.img"},
        "drives": [
            {"drive_id": "r", "path_on_host": "d.img", "is_root_device": True,
             "is_read_only": False},
            {"drive_id": "s", "path_on_host": "disk.img", "is_read_only": True},
        ],
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 64},
        "network-interfaces": [{"iface_id": "e", "host_dev_name": "t0"}],
        "vsock": {"guest_cid": 3, "uds_path": "v.sock"}, "entropy": {},
        "balloon": {"amount_mib": 8},
    }))  # fmt: skip
    for command in ("run", "config"):
        hint = complaint(command, "vm.json")
        assert hint == (
            "vm.json is Firecracker's; in place of it, say K --initrd initrd.img --memory 64M "
            "--cpus 2 --drive d.img --drive disk.img,readonly --net tap=t0 --vsock "
            "cid=3,path=v.sock --rng --balloon=8M --append 'a b root=/dev/vda rw'"
        )
    run.configure(run.PARSER.parse(shlex.split(hint.partition("say ")[2])))
    hint = complaint("run", "--config-file", "vm.json", "--id", "x")
    assert hint == "'--config-file' is no option; say vmm run vm.json"
    for text in ("", "[]", "{}", '{"boot-source": 1}', '{"boot-source": {}, "drives": 3}'):
        (place / "vm.json").write_text(text)
        assert "Firecracker" not in complaint("run", "vm.json")


@pytest.mark.parametrize("value", [
    "--drive d.img,cache=none,cache=unsafe", "--fs DIR,tag=a,tag=b,readonly",
    "--net user,mtu=1500,mtu=1400", "--vsock cid=3,path=a,path=b", "--port name=a,file=x,file=y",
])  # fmt: skip
def test_a_key_with_two_values(value: str) -> None:
    hint = complaint("run", "K", *value.split())
    assert hint.startswith(f"{value}: ")
    assert hint.endswith("= is given twice; leave one of the two out")


def test_a_missing_disk_is_made_in_its_format() -> None:
    """What is made is what the name says; nothing is made in /dev."""
    for name, made in (
        ("x.img", "truncate -s 1G x.img"),
        ("x.qcow2", "qemu-img create -f qcow2 x.qcow2 1G"),
        ("x.VMDK", "qemu-img create -f vmdk x.VMDK 1G"),
        ("x.vhd", "qemu-img create -f vpc x.vhd 1G"),
    ):
        with pytest.raises(UsageError, match=re.escape(f"no such file; make one: {made}") + "$"):
            Drive(name).open(0)
    with pytest.raises(UsageError, match=r"no such device; lsblk lists those there are$"):
        Drive("/dev/nosuch").open(0)


def test_a_line_that_is_not_wholly_understood_is_answered_by_option() -> None:
    assert complaint("run", "K", "-m", "64", "--xyzzy").startswith("'-m' is no option; say --mem")


def test_each_spelling_stands_once_and_is_not_ours() -> None:
    names = Counter(name for row in TABLE for name in row.names)
    assert [name for name, count in names.items() if count > 1] == []
    ours = {name for option in run.PARSER.options for name in option.names} - {"-v"}
    assert ours & names.keys() == set()


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.names[0])
def test_each_row_says_what_some_command_takes(row: object) -> None:
    words = row.words(row.takes)  # type: ignore[attr-defined]
    if not words:
        assert row.why or row.instead  # type: ignore[attr-defined]
        return
    command = exec.PARSER if words[0] in ("--rw", "--overlay", "--tty", "--workdir") else run.PARSER
    args = command.parse(words if words[0][0] != "-" else ["K", *words])
    if not args.operands[0].endswith(".toml"):
        run.configure(args)


@pytest.mark.parametrize("name", [n for names in COMMANDS.values() for n in names.split()])
def test_a_subcommand_of_another_program(name: str) -> None:
    assert re.match(
        r".*; (vmm (run|exec|snapshot|restore|config|doctor) does that|options follow "
        r"a command, as in vmm run KERNEL) \(see vmm --help\)$",
        complaint(name),
    )


@pytest.mark.parametrize("name", [n for names in NO_COMMANDS for n in names.split()])
def test_a_subcommand_that_nothing_is_like(name: str) -> None:
    assert not re.search(r"use one of: run", complaint(name))


def test_options_in_place_of_a_command() -> None:
    assert complaint("-kernel", "vmlinuz", "-m", "64") == (
        "'-kernel' is not a command; say vmm run vmlinuz --memory 64 (see vmm --help)"
    )
    assert complaint("-version") == (
        "'-version' is not a command; vmm version says it (see vmm --help)"
    )
    assert complaint("-m", "64") == (
        "'-m' is not a command; options follow a command, as in vmm run KERNEL (see vmm --help)"
    )
    for name, near in (("RUN", "run"), ("runn", "run"), ("restor", "restore")):
        assert complaint(name) == f"{name!r} is not a command; {near} is one (see vmm --help)"


def test_a_kernel_in_place_of_a_command() -> None:
    assert complaint("vmlinuz", "--cpus", "2") == (
        "'vmlinuz' is not a command; to boot it, say vmm run vmlinuz --cpus 2 (see vmm --help)"
    )


def page_rows() -> list[tuple[str, str]]:
    """The page's rows with an option and our words for it, each as (theirs, ours)."""
    found = []
    for line in PAGE.read_text().splitlines():
        theirs, _, ours = line.strip("| ").partition(" | ")
        left, right = re.findall(r"`([^`]+)`", theirs), re.findall(r"`([^`]+)`", ours)
        if line.startswith("| `-") and right and ours.startswith("`") and left[0][0] == "-":
            found.append((left[0], right[0]))
    return found


def test_the_page_has_rows() -> None:
    assert len(page_rows()) > 40


@pytest.mark.parametrize(("theirs", "ours"), page_rows())
def test_the_page_says_what_the_command_says(theirs: str, ours: str) -> None:
    """Where the command takes the words of the page's left column as they are, they are the
    right column's; else its answer names that."""
    command, parser = "run", run.PARSER
    if any(ours.startswith(f"--{name} ") for name in ("rw", "overlay", "user", "workdir", "tty")):
        command, parser = "exec", exec.PARSER
    words = theirs.split()
    line = ["K", *words]
    if command == "exec":
        line += ["--", "true"]
    if words[0].partition("=")[0] in {n for o in parser.options for n in o.names} - {"-v"}:
        if theirs != ours:
            assert complaint(command, *line).endswith(f"say {ours}")
        return
    said = complaint(command, *line)
    name = "--tty" if ours == "--tty" else ours
    assert name.partition(" PATH")[0] in said.replace("vmm run K ", "")
