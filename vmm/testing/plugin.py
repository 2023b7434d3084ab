"""The pytest plugin: virtual machines as fixtures, each usable alone.

    vmm_kernel         a kernel to boot: --vmm-kernel, a marker's, or Debian's cloud kernel
    vmm_initrd         what it boots into; override it, and vmm_ready, to boot your own
    machine_factory    makes machines and closes them
    machine            one, not started
    booted_machine     one in user space, `machine.run([...])` works
    restored_machine   the same from a snapshot taken once a session: no boot, fresh for each test
    lan                several booted machines on a private network
    module_machine_factory, session_machine_factory
                       machine_factory for machines that a module's, or all, tests share

`@pytest.mark.vmm(memory="1G", cpus=2, kernel=PATH, ...)` sets keywords of `MachineConfig` for what
a test's fixtures make; nearer markers (test, class, module) go before farther ones.

A host that cannot run such a machine skips the test, with what `vmm doctor` says; with
--vmm-require (or `vmm_require = true`, or VMM_REQUIRE=1) the test fails. A failing test's report
has the console's last lines, the last events and calls and the registers of each of its machines,
and the path of a page with all of it on one axis (`--vmm-artifacts`).
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
PREPARE_TIMEOUT = "600"
YES, NO = ("1", "true", "yes", "on", "y", "t"), ("", "0", "false", "no", "off", "n", "f")
_factories: pytest.StashKey[list[MachineFactory]] = pytest.StashKey()
_shared: pytest.StashKey[dict[str, MachineFactory]] = pytest.StashKey()
_host: pytest.StashKey[Report] = pytest.StashKey()
_failed_boots: pytest.StashKey[dict[str, str]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vmm", "virtual machines")
    group.addoption("--vmm-kernel", metavar="FILE", help="the kernel vmm's fixtures boot")
    group.addoption(
        "--vmm-require",
        action="store_true",
        help="fail, and do not skip, where this host cannot run the machine a test needs",
    )
    group.addoption(
        "--vmm-artifacts",
        metavar="DIR",
        help="where failing tests leave a page, console logs, events and registers; `off`: "
        "nowhere (default: in pytest's temporary directory)",
    )
    parser.addini("vmm_kernel", "the kernel vmm's fixtures boot; relative to the rootdir")
    parser.addini("vmm_require", "as --vmm-require", type="bool", default=False)
    parser.addini("vmm_artifacts", "as --vmm-artifacts; relative to the rootdir")
    parser.addini(
        "vmm_boot_timeout", "seconds a machine may take to user space", default=BOOT_TIMEOUT
    )
    parser.addini("vmm_prepare_timeout", "seconds vmm_prepare may take", default=PREPARE_TIMEOUT)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outermost: a test may be expected to fail
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    factories = _factories_of(item)
    if not factories:
        return (yield)
    from vmm.testing import failing

    failing.hide_frames()
    report = yield
    failing.phase(item, call)
    if report.failed:
        failing.tell(item, call, report, factories, _artifacts(item.config))
    return report


def _factories_of(item: pytest.Item) -> list[MachineFactory]:
    """Those that `item` has machines of, its own first."""
    found = [*item.stash.get(_factories, list["MachineFactory"]())]
    shared = item.config.stash.get(_shared, {})
    if shared:
        names = set(getattr(item, "fixturenames", ()))
        asked = getattr(getattr(item, "_request", None), "_fixture_defs", {})  # getfixturevalue
        found += [shared[name] for name in shared if name in names or name in asked]
    return found


def _artifacts(config: pytest.Config) -> Path | None:
    """The directory for what failing tests leave; None: nowhere."""
    chosen = config.getoption("--vmm-artifacts")
    if chosen is None and config.getini("vmm_artifacts"):
        chosen = config.getini("vmm_artifacts")
        return None if chosen == "off" else config.rootpath / str(chosen)
    if chosen is None:
        factory = getattr(config, "_tmp_path_factory", None)  # pytest's own, for its fixtures
        return None if factory is None else Path(factory.getbasetemp()) / "vmm-artifacts"
    return None if chosen == "off" else Path(config.invocation_params.dir) / str(chosen)


# --- the host ---------------------------------------------------------------------------------


def _need(request: pytest.FixtureRequest, *, linux: bool) -> None:
    """Skip or fail unless this host runs guests (`linux`: Debian's kernels, to user space)."""
    __tracebackhide__ = True
    config = request.config
    required = _required(config)
    report = config.stash.get(_host, None)
    if report is None:
        from vmm.doctor import examine

        report = config.stash[_host] = examine()
    if report.runs_linux if linux else report.usable:
        return
    if required:
        pytest.fail(f"vmm: {report.verdict}", pytrace=False)
    pytest.skip(f"vmm: {report.verdict}")


def _required(config: pytest.Config) -> bool:
    """Whether a machine that cannot run here is a failure."""
    __tracebackhide__ = True
    word = os.environ.get("VMM_REQUIRE", "").strip().lower()
    if word not in YES + NO:
        pytest.fail(
            f"vmm: VMM_REQUIRE={os.environ['VMM_REQUIRE']!r} is none of {', '.join(YES[:4])}, "
            f"{', '.join(NO[1:5])}",
            pytrace=False,
        )
    return bool(config.getoption("--vmm-require") or config.getini("vmm_require") or word in YES)


def _marked(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The keywords of the test's markers, the nearest first."""
    __tracebackhide__ = True
    values: dict[str, Any] = {}
    for mark in request.node.iter_markers("vmm"):
        if mark.args:
            pytest.fail(
                f"{request.node.nodeid}: mark.vmm takes keywords only: {MARKER}", pytrace=False
            )
        values = {**mark.kwargs, **values}
    if values:
        from vmm.errors import UsageError
        from vmm.testing.machines import check_keywords

        wrong = ""
        try:
            check_keywords(values, f"{request.node.nodeid}: mark.vmm")
        except UsageError as err:
            wrong = f"vmm: {err}"
        if wrong:
            pytest.fail(wrong, pytrace=False)
    return values


def _seconds(request: pytest.FixtureRequest, name: str) -> float:
    """A setting that is a number of seconds."""
    __tracebackhide__ = True
    text = str(request.config.getini(name))
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < 1e9:
        pytest.fail(f"vmm: {name} = {text!r} is not a number of seconds", pytrace=False)
    return number


# --- the ladder -------------------------------------------------------------------------------


@pytest.fixture
def vmm_kernel(request: pytest.FixtureRequest) -> Kernel:
    """A kernel: `.vmlinuz`, `.modules`, `.release` (a `vmm.testing.kernels.Kernel`).

    The marker's, or --vmm-kernel, or `vmm_kernel` of the configuration; else Debian's cloud kernel,
    fetched once with apt-get and kept (`vmm.testing.kernels`). Skips where no Linux boots.
    """
    return _kernel(request, _marked(request).get("kernel"))


def _kernel(request: pytest.FixtureRequest, marked: Any = None) -> Kernel:
    __tracebackhide__ = True
    from vmm.errors import VmmError
    from vmm.testing.kernels import debian_kernel, kernel_at

    config = request.config
    path = marked or config.getoption("--vmm-kernel")
    if not path and config.getini("vmm_kernel"):
        path = config.rootpath / config.getini("vmm_kernel")
    try:
        if path:
            kernel = kernel_at(Path(path))
        _need(request, linux=True)
        return kernel if path else debian_kernel()
    except VmmError as err:
        wrong = f"vmm: {err}"
    pytest.fail(wrong, pytrace=False)


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


def _factory(request: pytest.FixtureRequest, directories: pytest.TempPathFactory) -> MachineFactory:
    """A factory for the node of `request`, with its markers."""
    __tracebackhide__ = True
    marked = _marked(request)
    _need(request, linux=False)
    from vmm.testing.machines import MachineFactory

    return MachineFactory(
        {"console": "none", **marked},
        kernel=lambda: _kernel(request, marked.get("kernel")),
        directory=lambda: directories.mktemp("vmm"),
        boot_timeout=_seconds(request, "vmm_boot_timeout"),
    )


@pytest.fixture
def machine_factory(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MachineFactory]:
    """Call it with a kernel and keywords of `MachineConfig` for a machine; all are closed after.

    `machine_factory.boot(**keywords)` gives one in user space.
    """
    factory = _factory(request, tmp_path_factory)
    request.node.stash.setdefault(_factories, []).append(factory)
    yield factory
    factory.close()


def _wide(
    request: pytest.FixtureRequest, directories: pytest.TempPathFactory
) -> Iterator[MachineFactory]:
    factory = _factory(request, directories)
    shared = request.config.stash.setdefault(_shared, {})
    name = str(request.fixturename)
    shared[name] = factory
    yield factory
    del shared[name]
    factory.close()


@pytest.fixture(scope="module")
def module_machine_factory(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MachineFactory]:
    """`machine_factory` for fixtures of scope `module`: its machines live as long as a module's
    tests run, and share what they do to them. The module's markers count."""
    yield from _wide(request, tmp_path_factory)


@pytest.fixture(scope="session")
def session_machine_factory(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MachineFactory]:
    """`machine_factory` for fixtures of scope `session`; of pytest-xdist's workers, each has its
    own."""
    yield from _wide(request, tmp_path_factory)


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
    """Boot `machines`; what did not come up in this session is not tried again."""
    __tracebackhide__ = True
    from vmm.console.tail import ConsoleClosed
    from vmm.errors import AgentError
    from vmm.testing.identity import digest
    from vmm.testing.machines import wait_up

    limit = _seconds(request, "vmm_boot_timeout")
    failed = request.config.stash.setdefault(_failed_boots, {})
    configs = [machine.config for machine in machines]
    told = [
        (config.kernel, config.append, config.memory, config.cpus, config.transport)
        for config in configs
    ]
    archives = [Path(path).read_bytes() for config in configs for path in config.initrds]
    key = digest([ready, limit, told, archives])
    if key in failed and not _again(request):
        pytest.fail(f"vmm: {failed[key]}", pytrace=False)
    try:
        wait_up(list(machines), ready, limit)
    except (AgentError, TimeoutError, ConsoleClosed) as err:
        failed[key] = (
            f"this machine did not come up for {request.node.nodeid}, and is tried once a session: "
            f"{err}"
        )
        raise


def _again(request: pytest.FixtureRequest) -> bool:
    """Whether pytest-rerunfailures has the test run once more."""
    return int(getattr(request.node, "execution_count", 1)) > 1


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

    One snapshot for each content of markers, kernel, initrd, images and `vmm_prepare`; shared by
    the workers of pytest-xdist. Where its machine does not come up, that is tried once.
    """
    __tracebackhide__ = True
    import vmm
    from vmm.testing.bounded import ended_after
    from vmm.testing.machines import MachineFactory, wait_up
    from vmm.testing.snapshots import TriedError, shared_snapshot

    base = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        base = base.parent  # what the workers of pytest-xdist have in common
    limit = _seconds(request, "vmm_boot_timeout")
    prepare_limit = _seconds(request, "vmm_prepare_timeout")
    booting = MachineFactory(machine_factory.defaults)

    def boot() -> Machine:
        machine = booting(vmm_kernel, **_bootable(vmm_initrd, booting.defaults))
        wait_up([machine], vmm_ready, limit)
        if vmm_prepare is not None:
            with ended_after(machine, prepare_limit, "vmm_prepare"):
                vmm_prepare(machine)
        return machine

    what = [
        *(vmm.__version__, Path(vmm_kernel.vmlinuz), str(vmm_kernel.modules)),
        *(vmm_initrd.read_bytes(), sorted(booting.defaults.items()), vmm_ready, vmm_prepare),
        getattr(getattr(request.node, "callspec", None), "params", {}).get("vmm_prepare"),
    ]
    try:
        directory = shared_snapshot(
            base / "vmm-snapshots",
            what,
            boot,
            wait=limit + prepare_limit + 60,
            who=request.node.nodeid,
            failure=_boot_failure,
            again=_again(request),
        )
    except TriedError as err:
        tried: TriedError | None = err
    except BaseException:
        machine_factory.adopt(booting)  # for the report; closed after the test
        raise
    else:
        tried = None
    booting.close()
    if tried is not None:
        if tried.skipped:
            pytest.skip(str(tried))
        pytest.fail(f"vmm: {tried}", pytrace=False)
    machine = machine_factory.restore(str(directory))
    wait_up([machine], None, limit)
    return machine


def _boot_failure(err: BaseException) -> tuple[str, bool] | None:
    """What later tests are told of `err`, and whether they are to be skipped for it."""
    if isinstance(err, pytest.skip.Exception):
        return str(err), True
    if isinstance(err, pytest.exit.Exception) or not isinstance(
        err, (Exception, pytest.fail.Exception)
    ):
        return None  # an interrupt: it says nothing of the machine
    return f"{type(err).__name__}: {err}", False


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
        __tracebackhide__ = True
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
                machine.run(
                    words.split(), check=True, timeout=_seconds(request, "vmm_boot_timeout")
                )
        return made

    return make
