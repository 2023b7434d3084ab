"""vmm/kvm: structures, ioctl numbers and constants are those of <linux/kvm.h>, by the C compiler.

What is newer than the installed headers is named in NEWER; everything else must be in them.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmm.kvm import constants, ioctls
from vmm.kvm.abi_build import CDEF
from vmm.kvm.ffi import ffi

NEWER = {
    "struct kvm_userspace_memory_region2",  # Linux 6.8
    "struct kvm_run memory_fault",  # Linux 6.8
    "KVM_SET_USER_MEMORY_REGION2",
    "KVM_EXIT_MEMORY_FAULT",
    "KVM_CAP_USER_MEMORY2",
    "KVM_CAP_MEMORY_FAULT_INFO",
    "KVM_CAP_GUEST_MEMFD",
}
GUARDS = {
    "struct kvm_userspace_memory_region2": "KVM_SET_USER_MEMORY_REGION2",
    "struct kvm_run memory_fault": "KVM_EXIT_MEMORY_FAULT",
}
THERE = {"kvm_guest_debug.debugreg": "arch.debugreg"}
"""Members whose path differs; the rest have the headers' names."""
STRUCTS = re.findall(r"^struct (\w+) \{", CDEF, re.M)
TABLE = {name: call for name, call in vars(ioctls).items() if isinstance(call, ioctls.Ioctl)}
CONSTANTS = {
    f"KVM_{name}": value
    for name, value in vars(constants).items()
    if name.isupper() and isinstance(value, int) and name != "TYPE_CHECKING"
}


def leaves(kind: Any, path: str = "", offset: int = 0) -> Iterator[tuple[str, int, int | None]]:
    """(member path, offset, size) of each named member; size None for a flexible array."""
    for name, field in kind.fields:
        inner = field.type
        where = f"{path}.{name}".strip(".")
        flexible = inner.kind == "array" and inner.length is None
        if name:
            yield where, offset + field.offset, None if flexible else ffi.sizeof(inner)
        if inner.kind in ("struct", "union"):
            yield from leaves(inner, where, offset + field.offset)


def question(label: str, expression: str) -> str:
    return f'printf("%s=%llu\\n", "{label}", (unsigned long long)({expression}));'


def questions() -> Iterator[tuple[str, str, int, str]]:
    """(label, C expression, our answer, macro that must be defined to ask)."""
    for name in STRUCTS:
        kind = ffi.typeof(f"struct {name}")
        tag = f"struct {name}"
        # The headers' sigset is a flexible array: ours has the kernel's 8 bytes in it.
        if name != "kvm_signal_mask":
            yield tag, f"sizeof({tag})", ffi.sizeof(kind), GUARDS.get(tag, "KVM_API_VERSION")
        for member, offset, size in leaves(kind):
            key = f"{tag} {member.split('.')[0]}"
            there = THERE.get(f"{name}.{member}", member)
            guard = GUARDS.get(key, GUARDS.get(tag, "KVM_API_VERSION"))
            yield f"{tag} {member}", f"offsetof({tag}, {there})", offset, guard
            if size is not None and member != "sigset":
                expression = f"sizeof((({tag} *)0)->{there})"
                yield f"{tag} {member} size", expression, size, guard
    for call in TABLE.values():
        yield call.name, call.name, call.number, call.name
    for name, value in CONSTANTS.items():
        yield name, name, value, name


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the C compiler makes of each question whose macro the headers have."""
    lines = ["#include <stddef.h>", "#include <stdio.h>", "#include <linux/kvm.h>", "int main() {"]
    for label, expression, _, guard in questions():
        lines += [f"#ifdef {guard}", question(label, expression), "#endif"]
    lines += ["return 0;", "}"]
    directory: Path = tmp_path_factory.mktemp("abi")
    (directory / "abi.c").write_text("\n".join(lines))
    subprocess.run(["gcc", "-w", "-O0", "-o", "abi", "abi.c"], cwd=directory, check=True)
    said = subprocess.run([directory / "abi"], capture_output=True, text=True, check=True).stdout
    pairs = (line.rpartition("=") for line in said.splitlines())
    return {label: int(value) for label, _, value in pairs}


def compare(answers: dict[str, int], prefix: str) -> tuple[dict[str, tuple[int, int]], set[str]]:
    """(what differs: ours and C's, labels C could not answer) of labels with this prefix."""
    wrong, unknown = {}, set()
    for label, _, ours, _ in questions():
        if not (label + " ").startswith(prefix):
            continue
        if label not in answers:
            unknown.add(label)
        elif answers[label] != ours:
            wrong[label] = (ours, answers[label])
    return wrong, unknown


@pytest.mark.parametrize("name", STRUCTS)
def test_structure(answers: dict[str, int], name: str) -> None:
    wrong, unknown = compare(answers, f"struct {name} ")
    assert not wrong
    assert all(any(label.startswith(newer) for newer in NEWER) for label in unknown), unknown


@pytest.mark.parametrize("name", TABLE)
def test_ioctl_number(answers: dict[str, int], name: str) -> None:
    call = TABLE[name]
    assert call.name == f"KVM_{name}"
    if call.name in NEWER and call.name not in answers:
        pytest.skip("newer than the installed headers")
    assert hex(call.number) == hex(answers[call.name])


def test_constants(answers: dict[str, int]) -> None:
    assert len(CONSTANTS) > 100
    wrong, unknown = compare(answers, "KVM_")
    assert not wrong
    assert unknown <= NEWER


def test_names_of_exits_and_capabilities() -> None:
    assert constants.EXIT_NAMES[constants.EXIT_IO] == "KVM_EXIT_IO"
    assert "KVM_EXIT_IO_OUT" not in constants.EXIT_NAMES.values()
    assert constants.CAP_NAMES[constants.CAP_IRQFD] == "IRQFD"
    names = [name for name in vars(constants) if name.startswith("CAP_") and name != "CAP_NAMES"]
    assert len(constants.CAP_NAMES) == len(names)


def test_newest_structures_have_the_documented_sizes() -> None:
    """For headers that do not know them; Documentation/virt/kvm/api.rst 4.140 and 5."""
    assert ffi.sizeof("struct kvm_userspace_memory_region2") == 160
    assert ioctls.SET_USER_MEMORY_REGION2.number == 0x40A0AE49
    run = ffi.typeof("struct kvm_run")
    members = {path: offset for path, offset, _ in leaves(run)}
    assert [members[f"memory_fault.{name}"] for name in ("flags", "gpa", "size")] == [32, 40, 48]


def test_a_generated_module_is_what_is_there(tmp_path: Path) -> None:
    from vmm.kvm import _abi, abi_build

    target = abi_build.build(str(tmp_path / "abi.py"))
    assert Path(target).read_text() == Path(_abi.__file__).read_text()
