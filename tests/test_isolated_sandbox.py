"""vmm/isolated: what code in a machine's process, taken over by its guest, can still do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import intruder, isolated_intruder
from tests.support.intruder_targets import targets
from vmm import Machine, MachineConfig
from vmm.events import DeviceError
from vmm.isolated import nursery
from vmm.isolated.machine import IsolatedMachine
from vmm.machine import exits
from vmm.sandbox import landlock, seccomp
from vmm.sandbox.calls import DEADLY

pytestmark = [
    pytest.mark.needs_kvm,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not landlock.abi() or not seccomp.available(),
        reason="this kernel has no Landlock, or no seccomp",
    ),
]

MIB = 1 << 20
REFUSED = (
    "EPERM",
    "EACCES",
    "ENOSYS",
    "ENAMETOOLONG",
    "ENOENT",
    "ENODEV",
    "ENXIO",
    "EAFNOSUPPORT",
    "ENOTSUP",
)
ENDS = [
    name
    for name in intruder.PROBES
    if list(intruder.PROBES).index(name) >= list(intruder.PROBES).index("trace a process")
]
"""Probes that end the process (vmm.sandbox.calls.DEADLY)."""


@pytest.fixture(scope="module")
def zygote_with_intruders() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nursery, "_PROGRAM", isolated_intruder.PROGRAM)
        patch.setattr(nursery, "_zygotes", [])
        yield
        for zygote in nursery._zygotes:
            zygote.close()


@pytest.fixture
def facts(tmp_path: Path, zygote_with_intruders: None) -> Iterator[dict[str, Any]]:
    """What there is to be attacked."""
    with targets(tmp_path) as found:
        yield {**found, "program": os.getpid()}


def machine(facts: dict[str, Any], tmp_path: Path, probes: list[str]) -> IsolatedMachine:
    """One that is about to turn on the program; `append` is where it finds the facts."""
    told = tmp_path / f"facts-{len(list(tmp_path.iterdir()))}"
    told.write_text(json.dumps({**facts, "probes": probes}))
    made = Machine(
        MachineConfig(
            facts["kernel"], memory=16 * MIB, append=str(told), default_append=False,
            vsock=f"cid=7,path={told}.sock",
        ),
        isolate=True,
    )  # fmt: skip
    assert isinstance(made, IsolatedMachine)
    return made


def test_every_probe_is_refused(facts: dict[str, Any], tmp_path: Path) -> None:
    probes = [name for name in intruder.PROBES if name not in ENDS]
    with machine(facts, tmp_path, []) as other:
        facts["other"] = other.process.process.pid
        facts["zygote"] = nursery._zygotes[-1].child.pid
        with machine(facts, tmp_path, probes) as m:
            assert m.lacks == []
            m.start()
            assert m.wait(120).status == 9
            [said] = [event for event in m.event_log if isinstance(event, DeviceError)]
        other.start()  # it is there, and well
        assert other.wait(120).status == 9
    found = json.loads(said.line)
    threads = found.pop("threads")
    assert threads and all(each == ["2", "1", "0" * 16, "0" * 16] for each in threads)
    assert found.keys() == {*probes, *isolated_intruder.OWN}
    allowed = (*REFUSED, "EBADF")  # the broker's connection is not there any more
    assert {name: result for name, result in found.items() if result not in allowed} == {}
    assert found["ask the broker for a directory"] in ("EBADF", "EPERM")


@pytest.mark.one_lane
@pytest.mark.parametrize("probe", ENDS)
def test_calls_that_end_it(facts: dict[str, Any], tmp_path: Path, probe: str) -> None:
    """A crash is an event, as any other."""
    facts.update(other=0, zygote=0)
    with machine(facts, tmp_path, [probe]) as m:
        m.start()
        ended = m.wait(120)
    assert ended.kind == exits.CRASHED
    assert ended.message.startswith("the machine's process was killed by SIGSYS")


def test_there_are_such_calls() -> None:
    assert len(ENDS) > 10 and len(DEADLY) > 20
