"""vmm.config: values checked before anything is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm import Machine, MachineConfig, UsageError
from vmm.config import MAX_CPUS, OVERCOMMIT, host_memory

MIB = 1 << 20


def test_defaults_are_the_commands() -> None:
    config = MachineConfig("vmlinuz")
    assert (config.memory, config.cpus, config.cpu) == (256 * MIB, 1, "host")
    assert (config.boot, config.acpi, config.on_panic) == ("auto", True, "exit")
    assert (config.console, config.timeout, config.device) == ("none", None, "/dev/kvm")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"memory": 0}, "--memory 0 bytes is too little; at least 1M"),
        ({"memory": -4096}, "--memory -4096 bytes is too little"),
        ({"memory": MIB - 4096}, "too little"),
        ({"memory": MIB + 1}, r"not a multiple of 4096; --memory 1028K is"),
        ({"cpus": 0}, "--cpus 0 is not a number from 1 to 254"),
        ({"cpus": MAX_CPUS + 1}, "--cpus 255 is not"),
        ({"boot": "grub"}, "--boot 'grub' is not one of auto, bzimage, elf64, pvh"),
        ({"on_panic": "cry"}, "--on-panic 'cry' is not one of exit, pause"),
        ({"timeout": 0}, "--timeout 0 is not"),
        ({"timeout": -1.5}, "--timeout -1.5 is not"),
        ({"timeout": float("nan")}, "--timeout nan is not"),
        ({"timeout": float("inf")}, "--timeout inf is not"),
        ({"kernel": ""}, "KERNEL is an empty name"),
        ({"kernel": None, "initrds": ["x"]}, "--initrd needs a kernel"),
        ({"append": "a\0b"}, r"--append 'a\\x00b' has a NUL character in it"),
        ({"append": "a\nb"}, r"--append 'a\\nb' has a line break in it"),
        ({"append": "a\r"}, r"--append 'a\\r' has a line break in it"),
        ({"console": ""}, "--console '' is not one of auto, none, file:PATH, pty"),
        ({"console": "file:"}, "--console 'file:' is not one of"),
        ({"console": "file:PATH"}, None),
        ({"console": "file:x"}, None),
        ({"memory": MIB, "cpus": MAX_CPUS, "timeout": 0.001}, None),
    ],
    ids=str,
)
def test_values(options: dict[str, object], says: str | None) -> None:
    values = {"kernel": "vmlinuz", **options}
    if says is None:
        MachineConfig(**values)  # type: ignore[arg-type]
        return
    with pytest.raises(UsageError, match=says) as caught:
        MachineConfig(**values)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_more_memory_than_the_host_has_is_a_slip_only_at_four_times() -> None:
    most = OVERCOMMIT * host_memory() // 4096 * 4096
    assert MachineConfig(memory=most).memory == most
    MachineConfig(memory=most).check_host()
    more = MachineConfig(memory=most + 4096)  # for another host, maybe
    with pytest.raises(UsageError, match=r"--memory \d+M is more than this host .* is accepted"):
        more.check_host()
    with pytest.raises(UsageError, match="is accepted"):
        Machine(more)


def test_host_memory_is_what_proc_says() -> None:
    with open("/proc/meminfo") as meminfo:
        words = meminfo.readline().split()
    assert words[0] == "MemTotal:"
    assert host_memory() >= int(words[1]) << 10


def test_sizes_may_be_text_and_files_paths() -> None:
    config = MachineConfig(Path("vmlinuz"), initrds=[Path("i")], memory="1.5G", balloon="64M")
    assert config == MachineConfig("vmlinuz", initrds=["i"], memory=3 << 29, balloon=64 * MIB)
    with pytest.raises(UsageError, match="--memory 'much' is not a size"):
        MachineConfig("vmlinuz", memory="much")


def test_command_line() -> None:
    config = MachineConfig("vmlinuz", append="quiet")
    assert config.cmdline == f"{config.default_cmdline} quiet"
    assert "console=ttyS0" in config.default_cmdline.split()
    assert MachineConfig("vmlinuz").cmdline == config.default_cmdline
    assert MachineConfig("vmlinuz", append="quiet", default_append=False).cmdline == "quiet"


def test_equal_by_value_and_printed_whole() -> None:
    one = MachineConfig("vmlinuz", initrds=["a", "b"], cpus=2)
    assert one == MachineConfig("vmlinuz", initrds=("a", "b"), cpus=2)
    assert one != MachineConfig("vmlinuz", initrds=["a"], cpus=2)
    assert one != "vmlinuz"
    assert eval(repr(one)) == one
    with pytest.raises(TypeError):
        hash(one)
