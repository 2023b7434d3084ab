"""The pytest plugin: virtual machines as fixtures, each usable alone.

    vmm_kernel         a kernel to boot: --vmm-kernel, a marker's, or Debian's cloud kernel
    vmm_initrd         what it boots into; override it, and vmm_ready, to boot your own
    machine_factory    makes machines and closes them
    machine            one, not started
    booted_machine     one in user space, `machine.run([...])` works
    restored_machine   the same from a snapshot taken once a session: no boot, fresh for each test
    lan                several booted machines on a private network

`@pytest.mark.vmm(memory="1G", cpus=2, kernel=PATH, ...)` sets keywords of `MachineConfig` for what
a test's fixtures make; nearer markers (test, class, module) go before farther ones.

A host that cannot run such a machine skips the test, with what `vmm doctor` says; with
--vmm-require (or `vmm_require = true`, or VMM_REQUIRE=1) the test fails. A failing test's report
has the console's last lines, the last events and the registers of each of its machines.
Loaded by every pytest where vmm is installed, so nothing of vmm is imported before a test asks.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from typing import Any

    from vmm import Machine
    from vmm.doctor import Report
    from vmm.testing.kernels import Kernel
    from vmm.testing.machines import MachineFactory

MARKER = (
    "vmm(memory=, cpus=, kernel=, **keywords): what vmm.MachineConfig is given for the machines of "
    "this test"
)
BOOT_TIMEOUT = "120"
_machines: pytest.StashKey[MachineFactory] = pytest.StashKey()
_host: pytest.StashKey[Report] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vmm", "virtual machines")
    group.addoption("--vmm-kernel", metavar="FILE", help="the kernel vmm's fixtures boot")
    group.addoption(
        "--vmm-require",
        action="store_true",
        help="fail, and do not skip, where this host cannot run the machine a test needs",
    )
    parser.addini("vmm_kernel", "the kernel vmm's fixtures boot; relative to the rootdir")
    parser.addini("vmm_require", "as --vmm-require", type="bool", default=False)
    parser.addini(
        "vmm_boot_timeout", "seconds a machine may take to user space", default=BOOT_TIMEOUT
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    factory = item.stash.get(_machines, None)
    if report.failed and factory is not None:
        from vmm.testing.machines import sections

        for number, machine in enumerate(factory.machines):
            report.sections += sections(machine, f"vmm machine {number}")
    return report


# --- the host ---------------------------------------------------------------------------------


def _need(request: pytest.FixtureRequest, *, linux: bool) -> None:
    """Skip or fail unless this host runs guests (`linux`: Debian's kernels, to user space)."""
    config = request.config
    report = config.stash.get(_host, None)
    if report is None:
        from vmm.doctor import examine

        report = config.stash[_host] = examine()
    if report.runs_linux if linux else report.usable:
        return
    required = config.getoption("--vmm-require") or config.getini("vmm_require")
    if required or os.environ.get("VMM_REQUIRE", "0") not in ("", "0"):
        pytest.fail(f"vmm: {report.verdict}", pytrace=False)
    pytest.skip(f"vmm: {report.verdict}")


def _marked(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The keywords of the test's markers, the nearest first."""
    values: dict[str, Any] = {}
    for mark in request.node.iter_markers("vmm"):
        if mark.args:
            raise pytest.UsageError(
                f"{request.node.nodeid}: mark.vmm takes keywords only: {MARKER}"
            )
        values = {**mark.kwargs, **values}
    return values


def _boot_timeout(request: pytest.FixtureRequest) -> float:
    text = request.config.getini("vmm_boot_timeout")
    try:
        return float(text)
    except ValueError:
        raise pytest.UsageError(f"vmm_boot_timeout = {text!r} is not a number of seconds") from None


# --- the ladder -------------------------------------------------------------------------------


@pytest.fixture
def vmm_kernel(request: pytest.FixtureRequest) -> Kernel:
    """A kernel: `.vmlinuz`, `.modules`, `.release` (a `vmm.testing.kernels.Kernel`).

    The marker's, or --vmm-kernel, or `vmm_kernel` of the configuration; else Debian's cloud kernel,
    fetched once with apt-get and kept (`vmm.testing.kernels`). Skips where no Linux boots.
    """
    from vmm.errors import VmmError
    from vmm.testing.kernels import debian_kernel, kernel_at

    config = request.config
    path = _marked(request).get("kernel") or config.getoption("--vmm-kernel")
    if not path and config.getini("vmm_kernel"):
        path = config.rootpath / config.getini("vmm_kernel")
    try:
        if path:
            kernel = kernel_at(Path(path))
        _need(request, linux=True)
        return kernel if path else debian_kernel()
    except VmmError as err:
        pytest.fail(f"vmm: {err}", pytrace=False)


@pytest.fixture
def vmm_initrd(
    request: pytest.FixtureRequest, vmm_kernel: Kernel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The initrd of `machine` and those above it; override this fixture to boot your own.

    This one is busybox and a shell that waits for ever, with drivers for what the markers ask for.
    """
    from vmm.testing import initrds

    path = tmp_path_factory.mktemp("vmm") / "initrd.img"
    initrds.waiting(vmm_kernel, _marked(request)).write(str(path))
    return path


@pytest.fixture
def machine_factory(request: pytest.FixtureRequest) -> Iterator[MachineFactory]:
    """Call it with a kernel and keywords of `MachineConfig` for a machine; all are closed after."""
    _need(request, linux=False)
    from vmm.testing.machines import MachineFactory

    factory = MachineFactory({"console": "none", **_marked(request)})
    request.node.stash[_machines] = factory
    yield factory
    factory.close()


@pytest.fixture
def machine(machine_factory: MachineFactory, vmm_kernel: Kernel, vmm_initrd: Path) -> Machine:
    """A machine with `vmm_kernel` and `vmm_initrd`, not started."""
    return machine_factory(vmm_kernel, **_bootable(vmm_initrd, machine_factory.defaults))


def _bootable(initrd: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Keywords of a machine that boots, where `values` do not say otherwise."""
    given = {key: value for key, value in values.items() if key != "kernel"}
    return {"initrds": [str(initrd)], "append": "quiet", "agent": True, **given}


@pytest.fixture
def vmm_ready() -> str | None:
    """What `vmm_initrd` prints on the console when all is up; None: not to be waited for."""
    return "ready"


@pytest.fixture
def booted_machine(
    request: pytest.FixtureRequest, machine: Machine, vmm_ready: str | None
) -> Machine:
    """A machine in user space, whose agent answers: `booted_machine.run(["uname", "-r"])`."""
    _boot(request, vmm_ready, machine)
    return machine


def _boot(request: pytest.FixtureRequest, ready: str | None, *machines: Machine) -> None:
    limit = _boot_timeout(request)
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.wait_for_agent(limit)
        if ready is not None:
            machine.console.wait_for(ready, timeout=limit)


@pytest.fixture
def vmm_prepare() -> Callable[[Machine], object] | None:
    """Override it to do something in the machine before the snapshot `restored_machine` is of:
    a function of that machine, booted."""
    return None


@pytest.fixture
def restored_machine(
    request: pytest.FixtureRequest,
    vmm_kernel: Kernel,
    vmm_initrd: Path,
    vmm_ready: str | None,
    vmm_prepare: Callable[[Machine], object] | None,
    machine_factory: MachineFactory,
    tmp_path_factory: pytest.TempPathFactory,
) -> Machine:
    """A running machine from a snapshot that is taken once a session, fresh for each test.

    One snapshot for each set of markers, kernel, initrd and `vmm_prepare`; shared by the workers of
    pytest-xdist.
    """
    from vmm import Machine
    from vmm.testing.snapshots import shared_snapshot

    base = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        base = base.parent  # what the workers of pytest-xdist have in common

    def boot() -> Machine:
        machine = machine_factory(vmm_kernel, **_bootable(vmm_initrd, machine_factory.defaults))
        _boot(request, vmm_ready, machine)
        if vmm_prepare is not None:
            vmm_prepare(machine)
        return machine

    settings = sorted(machine_factory.defaults.items())
    what = [vmm_kernel.vmlinuz, vmm_initrd.read_bytes(), settings, vmm_prepare]
    directory = shared_snapshot(base / "vmm-snapshots", what, boot)
    machine_factory.close()
    machine = machine_factory.make(lambda: Machine.restore(str(directory)))
    machine.start()
    machine.wait_for_agent(_boot_timeout(request))
    return machine


@pytest.fixture
def lan(
    request: pytest.FixtureRequest,
    vmm_kernel: Kernel,
    machine_factory: MachineFactory,
    tmp_path: Path,
) -> Callable[..., list[Machine]]:
    """`lan(3, **keywords)`: machines on a private network of their own, booted.

    The first has the address 10.0.0.1/24 on eth0, the next 10.0.0.2. No frame leaves this process.
    """

    def make(count: int = 2, **options: Any) -> list[Machine]:
        from vmm.testing import initrds

        name = f"pytest-{os.getpid()}-{id(make):x}-{len(machine_factory.machines)}"
        values = {**machine_factory.defaults, **options}
        values["nets"] = [f"lan={name}", *values.get("nets", ())]
        path = tmp_path / f"{name}.img"
        initrds.waiting(vmm_kernel, values).write(str(path))
        made = [machine_factory(vmm_kernel, **_bootable(path, values)) for _ in range(count)]
        _boot(request, "ready", *made)
        for number, machine in enumerate(made, 1):
            for words in (
                f"ip addr add 10.0.0.{number}/24 dev eth0",
                "ip link set eth0 up",
                "ip link set lo up",
            ):
                machine.run(words.split(), check=True, timeout=_boot_timeout(request))
        return made

    return make
