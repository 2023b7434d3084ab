"""Wrong usage of the command: the status, one line that helps, and nothing left behind."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import boot_files, tiny
from vmm.cli import COMMANDS as NAMES
from vmm.errors import EXIT_HOST, EXIT_USAGE

COMMANDS = ", ".join(NAMES)

NOBODY = 65534
MIB = 1 << 20


@pytest.fixture(scope="module")
def files() -> Iterator[Path]:
    """A directory of files, good and bad, for the command lines below; open to all users."""
    with tempfile.TemporaryDirectory(prefix="vmm-usage-") as name:
        yield make_files(Path(name))


def make_files(base: Path) -> Path:
    base.chmod(0o755)
    good = boot_files.elf(notes=boot_files.pvh_note(MIB))
    bzimage = boot_files.bzimage(b"payload" * 1000)
    pe = bytearray(4096)
    pe[:2] = b"MZ"
    arm64 = bytearray(4096)
    arm64[0x38:0x3C] = b"ARM\x64"
    contents = {
        "good": good,
        "plain-elf": boot_files.elf(),
        "unreadable": good,
        "empty": b"",
        "pe": bytes(pe),
        "arm64": bytes(arm64),
        "bzimage": bzimage,
        "short-bzimage": bzimage[:3000],
        "shorter-bzimage": bzimage[:0x100],
        "short-elf": good[:-3],
        "shorter-elf": good[:40],
        "elf32": boot_files.elf(bits=32),
        "big-elf": boot_files.elf(((MIB, boot_files.CODE, 100 * MIB),)),
        "module": boot_files.elf(kind=1),
        "initrd": b"070701" + bytes(506),
        "text": b"hello\n",
        "zeroes": bytes(4096),
        "old\nname\x1b[31m": b"hello\n",
    }
    for name, content in contents.items():
        (base / name).write_bytes(content)
    (base / "unreadable").chmod(0)
    (base / "directory").mkdir()
    os.mkfifo(base / "fifo")
    with open(base / "big-initrd", "wb") as file:
        file.truncate(300 * MIB)
    return base


@pytest.fixture
def place() -> Iterator[Path]:
    """The working directory and TMPDIR of a command, which must stay empty."""
    with tempfile.TemporaryDirectory(prefix="vmm-empty-") as name:
        path = Path(name)
        path.chmod(0o777)
        yield path
        assert list(path.iterdir()) == []


def call(place: Path, words: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """The command in a session of its own, which must be empty when it has ended."""
    with subprocess.Popen(  # type: ignore[call-overload]
        tiny.command(*words),
        cwd=place,
        env=tiny.environment(TMPDIR=str(place)),
        start_new_session=True,
        text=True,
        **{
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            **options,
        },
    ) as process:
        stdout, stderr = process.communicate(timeout=120)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert "Traceback" not in stderr, stderr
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def complaint(done: subprocess.CompletedProcess[str], status: int = EXIT_USAGE) -> str:
    """The one line on standard error."""
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert done.stderr.startswith("vmm: ") and done.stderr.endswith("\n"), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr[5:-1]


# Words of the command line ({} is the directory of files), and what the line must say: the option
# or file, the value, what would work.
RUN = [
    # --- the kernel
    ("{}/nosuch", r"kernel {}/nosuch: no such file"),
    ("{}/good/x", r"kernel {}/good/x: a part of the path is not a directory"),
    ("", r"KERNEL is an empty name; give the path of a bzImage or vmlinux"),
    ("{}/directory", r"kernel {}/directory is a directory; give it a file"),
    ("{}/fifo", r"kernel {}/fifo is not a regular file; copy what it gives into one"),
    ("/dev/zero", r"kernel /dev/zero is not a regular file"),
    ("{}/empty", r"kernel {}/empty is empty"),
    ("{}/pe", r"kernel {}/pe is a program for UEFI or Windows \(PE\) without a Linux kernel"),
    ("{}/arm64", r"kernel {}/arm64 is a kernel Image for arm64; this boots x86-64 kernels"),
    ("{}/short-bzimage", r"kernel {}/short-bzimage is truncated"),
    ("{}/shorter-bzimage", r"kernel {}/shorter-bzimage is truncated"),
    ("{}/short-elf", r"kernel {}/short-elf is truncated: \d+ bytes, a segment ends at \d+"),
    ("{}/shorter-elf", r"kernel {}/shorter-elf is truncated: its ELF header is not whole"),
    ("{}/elf32", r"kernel {}/elf32 is a 32-bit ELF file without a PVH note"),
    ("{}/module", r"kernel {}/module is an ELF object \(a kernel module\?\); give it a vmlinux"),
    ("{}/initrd", r"kernel {}/initrd is an initrd \(a cpio archive\); give it with --initrd"),
    ("{}/text", r"kernel {}/text is a text file; give it a bzImage or vmlinux"),
    ("{}/zeroes", r"kernel {}/zeroes is all zeroes where a kernel begins"),
    ("{}/old\nname\x1b[31m", r"kernel {}/old\\nname\\x1b\[31m is a text file"),
    ("{}/good {}/bzimage", r"only one KERNEL can be given, not '{}/good' and '{}/bzimage'"),
    ("-- {}/good --initrd", r"only one KERNEL can be given, not '{}/good' and '--initrd'"),
    (None, r"no KERNEL given \(see vmm run --help\)"),
    ("--memory 64M", r"no KERNEL given"),
    # --- the initrd
    ("{}/good --initrd {}/nosuch", r"--initrd {}/nosuch: no such file"),
    ("{}/good --initrd {}/initrd --initrd {}/nosuch", r"--initrd {}/nosuch: no such file"),
    ("{}/good --initrd {}/directory", r"--initrd {}/directory is a directory; give it a file"),
    ("{}/good --initrd {}/empty", r"--initrd {}/empty is empty"),
    ("{}/good --initrd {}/big-initrd", r"--memory 256M is too little for .* --memory 302M"),
    # --- drives (tests/test_block_{drive,raw}.py have every line)
    ("{}/good --drive", r"--drive needs a value"),
    ("{}/good --drive=", r"--drive: no path; say --drive disk.img"),
    ("{}/good --drive {}/nosuch", r"--drive {}/nosuch: no such file; make one: truncate -s 1G"),
    ("{}/good --drive {}/nosuch,snapshot", r"--drive {}/nosuch: no such file; make one"),
    ("{}/good --drive {}/directory", r"--drive {}/directory is a directory, not a disk image"),
    ("{}/good --drive {}/fifo,readonly", r"--drive {}/fifo is neither a file nor a block device"),
    ("{}/good --drive {}/empty", r"--drive {}/empty is empty; a disk has at least one sector"),
    ("{}/good --drive {}/text", r"--drive {}/text: 6 bytes is not whole sectors of 512; is it"),
    ("{}/good --drive {}/zeroes,ro", r"--drive {}/zeroes,ro: say --drive {}/zeroes,readonly"),
    ("{}/good --drive {}/zeroes,cache=all", r"--drive {}/zeroes: cache=all is not one of writeb"),
    ("{}/good --drive {}/zeroes,queues=99", r"--drive {}/zeroes: queues=99 is not from 1 to 16"),
    ("{}/good --drive {}/zeroes,format=iso", r"--drive {}/zeroes: format=iso is not one of raw, "),
    ("{}/good --drive {}/zeroes,readonly=2", r"--drive {}/zeroes,readonly=2: readonly=2 is not on"),
    # --- memory
    ("{}/good --memory 0", r"--memory 0 bytes is too little; at least 1M, say 256M"),
    ("{}/good --memory -1", r"--memory '-1' is not a size; write for example 256M or 2G"),
    ("{}/good --memory abc", r"--memory 'abc' is not a size; write for example 256M or 2G"),
    ("{}/good --memory 256X", r"--memory '256X' is not a size"),
    ("{}/good --memory=", r"--memory '' is not a size"),
    ("{}/good --memory 1e3", r"--memory '1e3' is not a size"),
    ("{}/good --memory 1000T", r"--memory 1048576000M is more than this host .* is accepted"),
    ("{}/good --memory 9999999999999999999G", r"--memory \d+M is more than this host can back"),
    ("{}/good --memory 1M", r"--memory 1M is too little for the kernel: at least --memory 2M"),
    ("{}/big-elf --memory 64M", r"--memory 64M is too little for the kernel: .* --memory 101M"),
    ("{}/good --memory 4097K", r"--memory 4195328 bytes is not a multiple of 4096; .* 4100K is"),
    # --- processors
    ("{}/good --cpus 0", r"--cpus 0 is not a number from 1 to 254"),
    ("{}/good --cpus -1", r"--cpus -1 is not a number from 1 to 254"),
    ("{}/good --cpus abc", r"--cpus 'abc' is not a number; say for example 2"),
    ("{}/good --cpus 1.5", r"--cpus '1.5' is not a number"),
    ("{}/good --cpus ٣", r"--cpus '٣' is not a number"),
    ("{}/good --cpus 255", r"--cpus 255 is not a number from 1 to 254"),
    ("{}/good --cpus 100000", r"--cpus 100000 is not a number from 1 to 254"),
    ("{}/good --cpus " + "9" * 5000, r"--cpus '9+ \.\.\. 9+' is not a number"),
    ("{}/good --cpu nosuch", r"--cpu nosuch: .*host.*max"),
    ("{}/good --cpu host,+nosuch", r"--cpu host,\+nosuch: .*nosuch"),
    ("{}/good --cpu host,+avx51", r"--cpu host,\+avx51: .*did you mean avx512f"),
    ("{}/good --cpu host,-", r"--cpu host,-: "),
    ("{}/good --cpu host,sse", r"--cpu host,sse: 'sse' is neither \+feature nor -feature"),
    ("{}/good --cpu=", r"--cpu : "),
    # --- console, boot, ends
    ("{}/good --console nosuch", r"--console 'nosuch' is not one of auto, none, file:PATH, pty"),
    ("{}/good --console file:", r"--console 'file:' is not one of auto, none, file:PATH, pty"),
    ("{}/good --console file:PATH/x", r"--console file:PATH/x: No such file .* give a file"),
    ("{}/good --console file:{}", r"--console file:{}: Is a directory; give a file"),
    ("{}/good --boot nosuch", r"--boot 'nosuch' is not one of auto, bzimage, elf64, pvh"),
    ("{}/good --boot bzimage", r"--boot bzimage: kernel {}/good is an ELF file; use elf64 or pvh"),
    ("{}/plain-elf --boot pvh", r"--boot pvh: kernel {}/plain-elf has no PVH note .*try elf64"),
    ("{}/elf32 --boot elf64", r"--boot elf64: kernel {}/elf32 has no 64-bit entry"),
    ("{}/good --timeout 0", r"--timeout 0 is not a number of seconds above 0"),
    ("{}/good --timeout -1", r"--timeout -1 is not a number of seconds above 0"),
    ("{}/good --timeout abc", r"--timeout 'abc' is not a number of seconds; say for example 30"),
    ("{}/good --timeout nan", r"--timeout nan is not a number of seconds above 0"),
    ("{}/good --timeout inf", r"--timeout inf is not a number .* below 1e9"),
    ("{}/good --transport isa", r"--transport 'isa' is not one of mmio, pci"),
    ("{}/good --timeout 1_0", r"--timeout '1_0' is not a number of seconds; say for example 30"),
    ("{}/good --timeout ٣", r"--timeout '٣' is not a number of seconds"),
    ("{}/good --grace=", r"--grace '' is not a number of seconds; say for example 10"),
    ("{}/good --grace 1_0", r"--grace '1_0' is not a number of seconds"),
    ("{}/good --control=", r"--control: no path; give one"),
    ("{}/good --initrd=", r"--initrd is an empty name; give a file, or leave it out"),
    ("{}/good --fs=", r"--fs: no directory; say --fs DIR,tag=NAME"),
    ("{}/good --fs tag=a", r"--fs tag=a: no directory; say --fs DIR,tag=a"),
    ("{}/good --drive {}/zeroes,queues=٣", r"--drive {}/zeroes,queues=٣: queues=٣ is not from"),
    ("{}/good --on-panic nosuch", r"--on-panic 'nosuch' is not one of exit, pause"),
    ("{}/good --append a\nb", r"--append 'a\\nb' has a line break in it; words are .* spaces"),
    ("{}/good --append " + "x" * 3000, r"--append: the command line has \d+ bytes, .* takes 2047"),
    ("{}/good --console hvc,nosuch", r"--console 'hvc,nosuch' is not one of auto, none, file:PATH"),
    ("{}/good --console hvc:pty", r"--console 'hvc:pty' is not one of auto, none, file:PATH, pty"),
    ("{}/good --port name=a", r"--port name=a: give it either socket= or file="),
    ("{}/good --port name=a,file=x --port name=a,file=y", r"--port name=a is given twice"),
    # --- entropy
    ("{}/good --rng=10", r"--rng=10 is not rate=BYTES, bytes a second; say --rng=rate=64K"),
    ("{}/good --rng=rate=x", r"--rng rate= 'x' is not a size"),
    ("{}/good --rng=rate=0", r"--rng=rate=0 is not rate=BYTES"),
    # --- balloon
    ("{}/good --balloon=x", r"--balloon 'x' is not a size; write for example 256M"),
    (
        "{}/good --balloon=256M",
        r"--balloon=268435456 bytes is not from 0 to less than --memory 256M",
    ),
    # --- net (tests/test_net_{config,tap,user}.py have every line)
    ("{}/good --net", r"--net needs a value"),
    ("{}/good --net usr", r"--net usr: 'usr' is not one of user, tap, bridge, socket, lan, none"),
    ("{}/good --net user,mac=1", r"--net user: mac=1 is not an address like 52:54:00:12:34:56"),
    ("{}/good --net user,forward=80:80", r"--net user: forward=80:80 is not tcp:HOST:GUEST or udp"),
    ("{}/good --net tap,address=1.2.3.4", r"--net tap: address=1.2.3.4 is not ADDRESS/BITS, as in"),
    ("{}/good --net bridge=nosuch", r"--net bridge=nosuch: no such bridge; make it: ip link add"),
    ("{}/good --net socket={}/nosuch", r"--net socket={}/nosuch: No such file or directory; give"),
    ("{}/good --net lan=x", r"--net lan=x: joins machines of one program, and this"),
    ("{}/good --net user,pcap={}/no/x", r"--net pcap={}/no/x: No such file or directory; give a"),
    # --- vsock
    ("{}/good --vsock=", r"--vsock : '' is not cid=, path= or vhost"),
    ("{}/good --vsock cid=3", r"--vsock: no path; say for example --vsock cid=3,path="),
    ("{}/good --vsock cid=3,vhost=2", r"--vsock cid=3,vhost=2: 'vhost=2' is not cid=, path= or"),
    ("{}/good --vsock cid=3,path=v,vhost", r"--vsock cid=3: path=v is not for vhost: programs"),
    ("{}/good --vsock path=v", r"--vsock path=v: cid= is not a number; say for example cid=3"),
    ("{}/good --vsock cid=x,path=v", r"--vsock cid=x,path=v: cid=x is not a number"),
    ("{}/good --vsock cid=2,path=v", r"--vsock cid=2 is not from 3 to 4294967294"),
    ("{}/good --vsock cid=4294967295,path=v", r"--vsock cid=4294967295 is not from 3 to"),
    ("{}/good --vsock cid=3,port=v", r"--vsock cid=3,port=v: 'port=v' is not cid=, path= or vhost"),
    ("{}/good --vsock cid=3,path=" + "x" * 97, r"--vsock path=x+: 97 bytes are too long .* 96,"),
    ("{}/good --vsock cid=3,path={}/text", r"--vsock path={}/text is there and is not a socket"),
    ("{}/good --vsock cid=3,path={}/nosuch/v", r"--vsock path={}/nosuch/v: No such file .* exists"),
    # --- the options themselves
    ("{}/good --nosuch", r"'--nosuch' is no option \(see vmm run --help\)"),
    ("{}/good --memroy 64M", r"'--memroy' is no option; --memory is one"),
    ("{}/good --mem 64M", r"'--mem' is no option"),
    ("{}/good -x", r"'-x' is no option"),
    ("{}/good -vv", r"'-vv': write short options one by one"),
    ("{}/good --verbose=yes", r"--verbose takes no value, not even 'yes'"),
    ("{}/good --memory", r"--memory needs a value, --memory SIZE"),
    ("{}/good --append --memory 64M", r"--append needs a value, --append CMDLINE"),
]
# What only a machine that is half made can find out.
NEED_KVM = re.compile(
    "kernel |PVH|initrd|too little for|--cpu |takes 2047|64-bit entry|--vsock path={}|"
    "no such bridge|--net socket=|--net pcap="
)


def case(words: str | None, says: str) -> object:
    marks = [pytest.mark.needs_kvm, pytest.mark.one_lane] if NEED_KVM.search(says) else []
    name = "none" if words is None else words.replace("{}/", "")[:40] or "empty"
    return pytest.param(words, says, marks=marks, id=name)


@pytest.mark.parametrize(("words", "says"), [case(*row) for row in RUN])
def test_run(words: str | None, says: str, files: Path, place: Path) -> None:
    arguments = [] if words is None else [word.format(files) for word in words.split(" ")]
    line = complaint(call(place, ["run", *arguments]))
    assert re.match(says.replace("{}", re.escape(str(files))), line), line
    assert len(line) < 1100


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], f"no command given; use one of: {COMMANDS} (see vmm --help)"),
        ([""], f"'' is not a command; use one of: {COMMANDS} (see vmm --help)"),
        (["nosuch"], f"'nosuch' is not a command; use one of: {COMMANDS} (see vmm --help)"),
        (["--nosuch"], f"'--nosuch' is not a command; use one of: {COMMANDS} (see vmm --help)"),
        (["doctor", "--jsn"], "'--jsn' is no option; --json is one (see vmm doctor --help)"),
        (["doctor", "x"], "'x' is one argument too many (see vmm doctor --help)"),
        (["doctor", "--json=1"], "--json takes no value, not even '1' (see vmm doctor --help)"),
        (["doctor", "--device"], "--device needs a value, --device PATH (see vmm doctor --help)"),
    ],
)
def test_other_commands(words: list[str], says: str, place: Path) -> None:
    assert complaint(call(place, words)) == says


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.parametrize(
    ("words", "least"),
    [
        ("{}/good --memory 1M", "2M"),
        ("{}/big-elf --memory 64M", "101M"),
        ("{}/good --initrd {}/big-initrd", "302M"),
    ],
)
def test_the_least_memory_named_is_enough(words: str, least: str, files: Path, place: Path) -> None:
    arguments = [word.format(files) for word in words.split()]
    assert complaint(call(place, ["run", *arguments])).endswith(f"--memory {least}")
    assert call(place, ["run", *arguments, "--memory", least]).returncode == 42


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.parametrize(
    "words", ["{}/nosuch", "{}/good --memory 1M", "{}/good --cpu nosuch", "{}/good --cpus 0"]
)
def test_a_failed_start_leaves_the_console_file_alone(
    words: str, files: Path, place: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old.log"
    old.write_text("of the run before\n")
    arguments = [word.format(files) for word in words.split()]
    for console in (f"file:{old}", "file:new.log"):
        complaint(call(place, ["run", *arguments, "--console", console]))
    assert old.read_text() == "of the run before\n"


def test_what_argv_cannot_carry_is_refused_in_python_too() -> None:
    from vmm import MachineConfig, UsageError

    with pytest.raises(UsageError, match=r"--append 'a\\x00b' has a NUL character in it"):
        MachineConfig("kernel", append="a\0b")


# --- other users, other hosts ---------------------------------------------------------------------


def as_nobody(mode: str, *paths: Path) -> str:
    """A script for `in_mount_namespace`: /dev/kvm has `mode`, and nobody runs the command.

    Where this Python, the project or `paths` lie in a directory that is closed to others (/root),
    the namespace has an open one in its place.
    """
    lines = [
        "mount -t tmpfs none /mnt",
        f"mknod -m {mode} /mnt/kvm c $(stat -c '0x%t 0x%T' /dev/kvm)",
        "mount --bind /mnt/kvm /dev/kvm",
    ]
    roots = (sys.base_prefix, sys.prefix, tiny.ROOT, *paths)
    needed = sorted({str(Path(path).resolve()) for path in roots})
    closed = {}
    for path in needed:
        for parent in reversed(Path(path, "x").parents):
            if not parent.stat().st_mode & 0o001:
                closed[path] = parent
                break
    for number, path in enumerate(closed):
        lines += [f"mkdir /mnt/{number}", f"mount --bind {path} /mnt/{number}"]
    lines += [f"mount -t tmpfs -o mode=755 none {top}" for top in sorted({*closed.values()})]
    for number, path in enumerate(closed):
        lines += [f"mkdir -p {path}", f"mount --bind /mnt/{number} {path}"]
    lines.append(f'exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups "$@"')
    return " && ".join(lines)


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_no_permission_on_the_device(files: Path, place: Path) -> None:
    done = in_mount_namespace(place, as_nobody("600", files), ["run", str(files / "good")])
    line = complaint(done, EXIT_HOST)
    assert line.startswith("no permission on /dev/kvm for nobody (it is root:")
    doctor = in_mount_namespace(place, as_nobody("600", files), ["doctor"])
    said = " ".join(doctor.stdout.split())
    mend = line.partition("); ")[2].removesuffix(" (`vmm doctor` tells more)")
    assert mend and f"mend: {mend}" in said  # the same words


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("{}/unreadable", "kernel {}/unreadable: no permission to read it"),
        ("{}/good --initrd {}/unreadable", "--initrd {}/unreadable: no permission to read it"),
        (
            "{}/good --console file:{}/log",
            "--console file:{}/log: Permission denied; give a file that can be written, "
            "in a directory that exists",
        ),
        (
            "{}/good --console file:{}/text",
            "--console file:{}/text: Permission denied; give a file that can be written, "
            "in a directory that exists",
        ),
    ],
)
def test_no_permission_on_a_file(words: str, says: str, files: Path, place: Path) -> None:
    arguments = [word.format(files) for word in words.split()]
    done = in_mount_namespace(place, as_nobody("666", files), ["run", *arguments])
    assert complaint(done) == says.replace("{}", str(files))


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_the_device_is_all_that_is_needed(files: Path, place: Path) -> None:
    done = in_mount_namespace(place, as_nobody("666", files), ["run", str(files / "good")])
    assert (done.returncode, done.stdout) == (42, "")


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_no_device(files: Path, place: Path) -> None:
    done = in_mount_namespace(
        place, 'mount -t tmpfs none /dev && exec "$@"', ["run", str(files / "good")]
    )
    line = complaint(done, EXIT_HOST)
    assert line.startswith("/dev/kvm does not exist")
    assert any(word in line for word in ("--device /dev/kvm", "mknod /dev/kvm", "modprobe"))
    assert line.endswith("(`vmm doctor` tells more)")


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_a_device_of_another_kind(files: Path, place: Path) -> None:
    done = in_mount_namespace(
        place, 'mount --bind /dev/null /dev/kvm && exec "$@"', ["run", str(files / "good")]
    )
    assert complaint(done, EXIT_HOST) == "/dev/kvm is not a KVM device"


def in_mount_namespace(
    place: Path, script: str, words: list[str]
) -> subprocess.CompletedProcess[str]:
    """The command with mounts of its own, made by `script`, which ends in `exec "$@"`."""
    if os.geteuid() != 0 or not (shutil.which("unshare") and shutil.which("setpriv")):
        pytest.skip("needs root and util-linux, for a mount namespace")
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"no mount namespaces here: {probe.stderr.decode().strip()}")
    return subprocess.run(
        ["unshare", "-m", "sh", "-ec", script, "sh", *tiny.command(*words)],
        cwd=place,
        env=tiny.environment(TMPDIR=str(place)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_out_of_descriptors(files: Path, place: Path) -> None:
    import resource

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (6, 6))

    done = tiny.run("run", str(files / "good"), cwd=place, preexec_fn=few)
    line = complaint(done, EXIT_HOST)
    assert "Too many open files" in line and "ulimit" in line


@pytest.mark.needs_kvm
@pytest.mark.one_lane
def test_standard_output_closed_needs_another_console(files: Path, place: Path) -> None:
    done = call(place, ["run", str(files / "good")], stdout=None, preexec_fn=lambda: os.close(1))
    assert done.returncode == EXIT_USAGE
    assert done.stderr == ("vmm: --console auto: standard output is closed; try --console none\n")
