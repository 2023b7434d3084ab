"""A machine: assembly of its parts, and its life from created to stopped."""

from __future__ import annotations

import threading
import time

from vmm import config_paths, descriptors, priority
from vmm.config import MachineConfig
from vmm.config_types import shown
from vmm.errors import HostError, StateError, UsageError, VmmError, call_each
from vmm.forked import drop_in_child
from vmm.kvm import constants
from vmm.machine import exits, unclosed
from vmm.machine.begin import begin
from vmm.machine.exits import MachineExit
from vmm.machine.guest_calls import GuestCalls
from vmm.machine.moments import MomentCalls
from vmm.machine.program import ProgramCalls
from vmm.machine.vcpu_thread import PAUSED, RUNNING, STOPPED, VcpuThread
from vmm.memory import GuestMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn, Self

    from vmm.agent.link import Link
    from vmm.boot import BootState
    from vmm.console.tail import ConsoleTail, Pattern
    from vmm.faults import Faults
    from vmm.kvm.vcpu import Vcpu
    from vmm.machine.origin import Origin
    from vmm.machine.platform import Platform
    from vmm.snapshot.checkpoint import Checkpoint
    from vmm.virtio.balloon import Balloon
    from vmm.virtio.device import VirtioDevice

CREATED = "created"
CLOSED = "closed"
PARKED_WITHIN = 0.2
"""Seconds in which vCPUs park, unless the guest has called a function of the program."""
UNSEEN_PATIENCE = 0.25
"""Seconds in which a guest that has no driver for the power button yet may look at it."""
CRASH_KERNELS_TOLD = 10
"""How often a guest can tell that its crash kernel takes over: other events stay in the log."""
END_WITHIN = 0.4
"""Seconds that `stop` and `close` wait for the machine's threads, which only a function of the
program can hold up."""


class Machine(ProgramCalls, GuestCalls, MomentCalls):
    """One virtual machine; a context manager that leaves nothing behind.

    States: `created` (everything is built, nothing ran), `running`, `paused`, `stopped` (`exit`
    says why), `closed`. A call that needs another state raises `StateError`.

    >>> config = MachineConfig("vmlinuz", initrds=["initrd"])  # doctest: +SKIP
    >>> with Machine(config) as m:
    ...     m.start()
    ...     m.console.wait_for("login:", timeout=30)
    ...     m.shutdown()
    ...     m.exit
    MachineExit('poweroff', 'the guest powered off', status=0)

    Args:
        origin: what it comes from, if it does not boot: see `Machine.restore`.
        isolate: have it in a child process of its own, locked down; see docs/security.md.

    Attributes:
        isolated: it has a process of its own.
        config: as given, but that paths of what is opened or removed later are absolute.
        directory: the working directory when it was made.
        memory: the guest's RAM.
        platform: its devices.
        exit: why it stopped, or None.
        on_error: told in a line of what goes wrong with a device while the machine goes on.
        origin: what it comes from, if it did not boot.
        restored: a state was put into it, so that to start it is to go on.
        doubt: asked at the end for a reason behind the one that shows.
        moment: held by who takes its state, from pausing it to having it go on.
        kept_still: its state is being taken, and must not change.
        paused_for: why a device had it paused, until it goes on; else an empty string.
    """

    isolated = False

    def __new__(cls, *args: object, isolate: bool = False, **options: object) -> Self:
        if not isolate or getattr(cls, "isolated", False):
            return object.__new__(cls)
        if cls is not Machine:
            raise UsageError(f"{cls.__name__}: isolate=True is for Machine, not for a class of it")
        from vmm.isolated.machine import IsolatedMachine

        return object.__new__(IsolatedMachine)  # type: ignore[return-value]  # it is a Machine

    def __init__(
        self, config: MachineConfig, *, origin: Origin | None = None, isolate: bool = False
    ) -> None:
        if not isinstance(config, MachineConfig):
            raise UsageError(
                f"Machine: {shown(config)} is not a MachineConfig; Machine(MachineConfig(KERNEL)), "
                "or MachineConfig.load(FILE)"
            )
        config.check_host()
        self.directory = config_paths.here()
        relative = config_paths.is_relative(config)
        self.config = config_paths.absolute(config) if relative else config
        self.origin = origin
        self.restored = False
        self.kept_still = 0
        self.doubt: Callable[[], MachineExit | None] | None = None
        self.moment = threading.RLock()
        self.exit: MachineExit | None = None
        self.on_error: Callable[[str], object] | None = None
        self.paused_for = ""
        self._prepare_events()
        self.started_at = 0.0
        self.boot: BootState | None = None
        self._state = CREATED
        self._lock = threading.RLock()
        self._telling = threading.RLock()
        self._ended = threading.Event()
        self._closers: list[Callable[[], object]] = []
        self._handles: list[Callable[[], object]] = []
        self.platform: Platform
        self._close_platform: Callable[[], None] | None = None
        self._threads: list[VcpuThread] = []
        self._watchdog: threading.Timer | None = None
        self._vcpus: list[Vcpu] = []
        self._checkpoint: Checkpoint | None = None
        self._clones = self._crash_kernels = 0
        self._faults: Faults | None = None
        drop_in_child(self)
        descriptors.raise_limit()
        try:
            self._build()
        except BaseException as err:
            try:
                self._close_all()
            finally:
                self._state = CLOSED
            told = descriptors.exhausted(err)
            if told is None:
                raise
            raise told from err
        if self.config is not config:
            config_paths.settle_console(self.config, self.directory)
        unclosed.watch(self)

    # --- assembly -----------------------------------------------------------------------------

    def _build(self) -> None:
        config = self.config
        origin = self.origin
        self.kvm, self.vm = kvm, vm = begin(config) if origin is None else origin.begin(config)
        self._handles += [kvm.close, vm.close]
        if origin is None:
            self.memory = GuestMemory(config.memory, config.backing or config.default_backing)
        else:
            self.memory = origin.map_memory(config)
        self._handles.insert(1, self.memory.close)  # after the VM: then nobody maps it any more
        from vmm.machine.platform import Platform

        self.platform = Platform(self, vm)
        self._close_platform = self.platform.close
        self.platform.add_virtio()
        if config.kernel is not None and origin is None:
            self.boot = self.platform.load_kernel(config.kernel)
        tables = self.platform.cpuid_tables(kvm) if origin is None else None
        for number in range(config.cpus):
            vcpu = vm.create_vcpu(number)
            self._vcpus.append(vcpu)
            self._handles.append(vcpu.close)
            if tables is not None:
                vcpu.set_cpuid2(tables[number])
            if self.boot is not None:
                from vmm.boot import registers

                registers.set_up(vcpu, self.boot if number == 0 else None)
        for slot, region in enumerate(self.memory.regions):
            vm.set_user_memory_region(slot, region.gpa, region.size, region.hva)
        self._threads = [
            VcpuThread(self, vcpu, self.platform.pio, self.platform.mmio) for vcpu in self._vcpus
        ]
        if origin is not None:
            origin.apply(self)

    def forked(self) -> None:
        """This is a child that was forked: the machine is its parent's, and closed here."""
        self._state = CLOSED
        self._lock, self._telling, self.moment = (threading.RLock() for _ in range(3))

    def __repr__(self) -> str:
        """`<Machine running: vmlinuz, 1 vCPU, 256 MiB>`, and why it stopped, if it did."""
        config, cpus = self.config, self.config.cpus
        kernel = config.kernel or ("no kernel" if self.origin is None else "restored or copied")
        text = f"{self._state}: {kernel}, {cpus} vCPU{'s' * (cpus > 1)}, {config.memory >> 20} MiB"
        if self.paused_for:
            text += f"; {self.paused_for}"
        if self.exit is not None:
            text += f"; {self.exit.message}"
        return f"<{type(self).__name__} {text}>"

    def __reduce__(self) -> NoReturn:
        """A copy would close what this one uses."""
        raise TypeError("a Machine is not copied or pickled so: see clone() and snapshot()")

    def __del__(self) -> None:
        if getattr(self, "_state", CLOSED) != CLOSED:
            unclosed.forgotten(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the machine if it runs, and give back everything; harmless twice.

        All of it is given back even if a part raises; the first such error is raised then. This
        takes a second at most: where a function of the program that the guest has called, a
        listener, or a disk of the host's does not return, a ResourceWarning says so, and what that
        thread uses (the vCPUs, RAM, the image) is given back when it does return.
        """
        if self._state == CLOSED:
            return
        self.unplug()
        # A rollback under way in another thread would have the machine run again.
        moment = self.moment.acquire(timeout=END_WITHIN)
        try:
            if self._state != CLOSED:
                self._close()
        finally:
            if moment:
                self.moment.release()

    def _close(self) -> None:
        self.unplug()
        if self._watchdog is not None:
            self._watchdog.join(END_WITHIN)
        if self.config.kernel is not None and self.has_run:
            from vmm.machine import halted

            halted.forget(self, END_WITHIN)
        try:
            steps = [self._faults.close] if self._faults is not None else []
            call_each([*steps, self._close_all])
        finally:
            self._state = CLOSED
            self._close_events()

    def at_close(self, function: Callable[[], object]) -> None:
        """Have `function` called when the machine is closed, before its memory is."""
        self._closers.append(function)

    def _close_all(self) -> None:
        until = time.monotonic() + END_WITHIN
        if self._close_platform is not None:
            self.platform.hurry(ending=True)
        threads = self._join_vcpus(until)
        steps: list[Callable[[], object]] = []
        later: list[Callable[[], object]] = []
        platform, self._close_platform = self._close_platform, None
        if platform is not None:
            # First: its console thread may still raise interrupts, and holds a vCPU's mapping.
            devices = self.platform.end_threads(until)
            (steps if devices else later).append(platform)
            if not devices:
                steps.append(self.platform.console.close)  # gives the terminal back
            threads = threads and devices
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is not None:
            steps.append(checkpoint.close)
        closers, self._closers = self._closers, []
        steps += reversed(closers)
        handles, self._handles = self._handles, []
        (steps if threads else later).extend(reversed(handles))
        if later:
            steps.append(lambda: self._close_later(later))
        call_each(steps)

    def _close_later(self, steps: list[Callable[[], object]]) -> None:
        """A thread of the machine is in a function that does not return, or waits for a disk: have
        `steps` done when it has returned, which may be never."""
        import warnings

        def close() -> None:
            self._join_vcpus(None)
            self.platform.end_threads(None)
            call_each(steps)

        threading.Thread(target=close, name="vmm-close", daemon=True).start()
        warnings.warn(
            f"{self!r} is closed while a function of the program, called by its guest or with an "
            "event, or a disk of the host's has not returned; its vCPUs and memory are given back "
            "when it does",
            ResourceWarning,
            stacklevel=2,
        )

    def _join_vcpus(self, until: float | None) -> bool:
        """Whether the vCPUs' threads have ended by `until`, of time.monotonic."""
        ended = True
        for thread in self._threads:
            left = None if until is None else max(until - time.monotonic(), 0)
            ended &= thread.join(left)
        return ended

    # --- life cycle ---------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """`created`, `running`, `paused`, `stopped` or `closed`."""
        return self._state

    @property
    def vcpus(self) -> list[Vcpu]:
        """Its vCPUs' descriptors, for registers and other state, while none runs.

        Raises:
            StateError: the machine is running (KVM would have the caller wait until the vCPU comes
                out of KVM_RUN, maybe for ever), or closed.
        """
        if self._state in (RUNNING, CLOSED):
            raise StateError(f"vcpus: the machine is {self._state}, not created, paused or stopped")
        return self._vcpus

    def virtio_device(self, name: str) -> VirtioDevice:
        """The virtio device `name`: `blk0`, `net0`, `rng` ...; StateError where there is none."""
        return self.platform.virtio_device(name)

    @property
    def balloon(self) -> Balloon:
        """The memory balloon: `target(bytes)`, `actual`, `stats()`. StateError without one."""
        balloon = self.platform.balloon
        if balloon is None:
            raise StateError("this machine has no balloon; make it with balloon=0")
        return balloon

    @property
    def faults(self) -> Faults:
        """Faults of its disks, networks, clocks and vCPUs, set and cleared while it runs."""
        with self._lock:
            if self._faults is None:
                from vmm.faults import Faults

                self._faults = Faults(self)
            return self._faults

    @property
    def vcpu_threads(self) -> tuple[VcpuThread, ...]:
        """The threads that run `vcpus`."""
        return tuple(self._threads)

    @property
    def console(self) -> ConsoleTail:
        """The last of the console's output, and waiting for more of it."""
        return self.platform.console.tail

    def flush(self) -> None:
        """Bring out what the guest has written to the console, and `console` has not yet."""
        self.platform.flush()

    def wait_for(
        self, pattern: Pattern, timeout: float | None = None, since: int | None = None
    ) -> str:
        """Wait until the guest prints `pattern`; see `ConsoleTail.wait_for`."""
        return self.console.wait_for(pattern, timeout, since)

    def send(self, text: str | bytes) -> None:
        """Type `text` on the console; what the guest cannot take yet waits. Running or paused."""
        if self._state not in (RUNNING, PAUSED):
            raise StateError(f"send: the machine is {self._state}, not running or paused")
        self.platform.console.send(text.encode() if isinstance(text, str) else text)

    def start(self) -> None:
        """Run: from created. Returns at once."""
        self.start_parked()
        self.let_go()

    def start_parked(self) -> None:
        """All of `start` but that the vCPUs run, which `let_go` has them do.

        Between the two the machine counts as running. Copies of a busy machine are started so: the
        first of them would take the processors from the start of the others.
        """
        with self._lock:
            self.need("start", CREATED)
            self.platform.start(self._threads)
            self.console.before_wait = self._before_console_wait
            self._state = RUNNING
            self.started_at = time.monotonic()
            try:
                for thread in self._threads:
                    thread.start()
                self._watch()
            except RuntimeError as err:
                self.monitor_failed(err)
                raise HostError(
                    f"--cpus {self.config.cpus}: {err}; see `ulimit -u` and `ulimit -v`"
                ) from err
            if self.restored:
                for thread in self._threads:
                    thread.resumed()
                self.platform.resumed()
            self._tell("started")

    def let_go(self) -> None:
        """Have the vCPUs run, unless somebody has paused or ended the machine meanwhile."""
        with self._lock:
            if self._state == RUNNING:
                for thread in self._threads:
                    thread.request(RUNNING)

    def pause(self) -> None:
        """Park every vCPU; returns when all are out of KVM_RUN. From running."""
        with priority.first:
            with self._lock:
                self.need("pause", RUNNING)
                self.platform.console.hold()
                for thread in self._threads:
                    thread.request(PAUSED)
                self._state = PAUSED
            parked = [thread.wait_parked(PARKED_WITHIN) for thread in self._threads]
        if not all(parked):
            self.wait_parked()
        if self.exit is not None:  # the guest ended meanwhile
            return
        self.platform.flush()
        self._tell("paused")

    def resume(self) -> None:
        """Go on: from paused."""
        with self._lock:
            self.need("resume", PAUSED)
            if self.kept_still:
                raise StateError("resume: it is being copied, and goes on by itself")
            for thread in self._threads:
                thread.resumed()
            self._state = RUNNING
            self.paused_for = ""
            self.platform.console.go_on()
            self._tell("resumed")
            self.let_go()  # after that was told: what the vCPUs do comes after it
        self.platform.resumed()

    @property
    def has_run(self) -> bool:
        """Whether its vCPUs have ever run."""
        return bool(self.started_at)

    @property
    def in_vcpu_thread(self) -> bool:
        """Whether the caller is in a vCPU's thread: a device's handler, an event's listener."""
        return any(thread.is_current for thread in self._threads)

    def wait_parked(self) -> None:
        """Wait until no vCPU runs: a device or a panic pauses a machine without waiting."""
        if self._state == PAUSED:
            self.platform.console.hold()
            for thread in self._threads:
                self._wait_parked(thread)

    def _wait_parked(self, thread: VcpuThread) -> None:
        """Wait until a vCPU does not run: it is parked, or the guest has accessed a device whose
        server, another program, does not answer. It parks as soon as that does, before it runs."""
        while not thread.wait_parked(PARKED_WITHIN):
            from vmm import held_up

            if held_up.by_a_peer(thread.ident):
                return
            self.platform.hurry()

    def pause_for(self, why: str) -> None:
        """A device cannot go on: pause, from any thread and without waiting for the vCPUs."""
        with self._lock:
            if self._state != RUNNING:
                return
            for thread in self._threads:
                thread.request(PAUSED)
            self._state = PAUSED
            self.paused_for = why
            self._tell("paused", why)

    def unplug(self) -> None:
        """End the machine, if it has started, without waiting for its vCPUs, as `stop` does."""
        if self._state not in (CREATED, CLOSED):
            self.end(MachineExit(exits.STOPPED, "stopped by the monitor"))

    def stop(self) -> MachineExit:
        """End the machine now, as pulling the plug; why it ended (maybe before) is returned.

        A function of the program that the guest has called is waited for, but not for long.
        """
        if self._state != CLOSED:
            self.end(MachineExit(exits.STOPPED, "stopped by the monitor"))
        elif self.exit is None:
            raise StateError("stop: the machine is closed, and was never started")
        self._join()
        assert self.exit is not None
        return self.exit

    def shutdown(self, timeout: float | None = 30.0) -> MachineExit:
        """Press the power button and wait; after `timeout` seconds the plug is pulled.

        The plug is pulled at once where nothing in the guest can notice the power button (see
        `power_button_unseen`). From running or paused.
        """
        if self._state != PAUSED:
            self.need("shutdown", RUNNING)
        self.press_power_button()
        unseen = self.power_button_unseen()
        if unseen and self._state == RUNNING:  # perhaps it is just about to look
            self._ended.wait(UNSEEN_PATIENCE)
            unseen = self.power_button_unseen()
        if unseen or not self._ended.wait(timeout):
            self.stop()
        return self.wait()

    def power_button_unseen(self) -> str:
        """Why nothing in the guest would notice the power button; empty where something may.

        The reasons: it is paused, it has no ACPI, no driver in it has taken the power button.
        """
        if self._state != RUNNING:
            return f"the machine is {self._state}"
        return self.platform.power_button_unseen()

    def _agent(self) -> Link:
        agent = self.platform.agent
        if agent is None:
            raise StateError("this machine has no agent in the guest; make it with agent=True")
        if self._state in (CREATED, CLOSED):
            raise StateError(f"the guest's agent: the machine is {self._state}, not running")
        return agent

    def resize_console(self, cols: int, rows: int) -> None:
        """Tell a virtio console (`hvc`) its size in characters."""
        self.platform.resize(cols, rows)

    def press_power_button(self) -> None:
        """What SIGTERM does to `vmm run`: an ACPI power button event. Nothing if it has stopped."""
        if self._state in (CREATED, CLOSED):
            raise StateError(f"press_power_button: the machine is {self._state}, not running")
        self.platform.power.press_power_button()
        self.platform.power_off_by_agent()

    def wait(self, timeout: float | None = None) -> MachineExit:
        """Wait for the end.

        Raises:
            TimeoutError: `timeout` seconds passed first; the machine goes on. (The time limit of
                the configuration is another thing: it ends the machine.)
            StateError: it was not started.
        """
        if self._state in (CREATED, CLOSED) and self.exit is None:
            raise StateError(f"wait: the machine is {self._state}, and was never started")
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the machine has not ended within {timeout:g} s")
        self._join()
        assert self.exit is not None
        return self.exit

    def revive(self) -> None:
        """From stopped to paused, with new threads, which park. StateError where one of the former
        has not ended."""
        self._join()
        if not self._join_vcpus(time.monotonic()):
            raise StateError("a function of the program that the guest called has not returned")
        if self._watchdog is not None:
            self._watchdog.join()
            self._watchdog = None
        with self._lock:
            self.exit = None
            self._ended.clear()
            self._reopen_events()
            self._state = PAUSED
            self.platform.revive()
            for thread in self._threads:
                thread.renew()
                thread.start()
            self._watch()

    # --- called by vCPU threads and devices -----------------------------------------------------

    def end(self, reason: MachineExit) -> None:
        """The machine is over; the first reason given stays. From any thread."""
        if self.doubt is not None:
            reason = self.doubt() or reason
        # Whoever has the lock for long is in a listener that does not return.
        locked = self._lock.acquire(timeout=END_WITHIN)
        try:
            if self.exit is not None:
                return
            self.exit = reason
            self._state = STOPPED
            self.platform.end(reason.message)
            for thread in self._threads:
                thread.request(STOPPED)
            if self._watchdog is not None:
                self._watchdog.cancel()
        finally:
            if locked:
                self._lock.release()
        try:
            self._tell("stopped", reason)
        finally:
            self._ended.set()  # last: who waits for the end finds it told

    def monitor_failed(self, err: BaseException) -> None:
        """An exception escaped in a vCPU thread: end, and say what it was."""
        import traceback

        err = descriptors.exhausted(err) or err
        text = str(err) if isinstance(err, VmmError) else f"{type(err).__name__}: {err}"
        report = "" if isinstance(err, VmmError) else "".join(traceback.format_exception(err))
        self.end(MachineExit(exits.MONITOR_ERROR, f"monitor error: {text}", report=report))

    def device_error(self, line: str) -> None:
        """Something is wrong with a device; the machine goes on."""
        if self.on_error is not None:
            self.on_error(line)
        self._tell("device error", line)

    def panicked(self, event: str) -> None:
        """The guest told pvpanic of a panic."""
        if event != "panicked":  # a crash kernel takes over
            self._crash_kernels += 1
            if self._crash_kernels <= CRASH_KERNELS_TOLD:
                self.panic_seen(event)
            return
        self.panic_seen(event)
        if self.config.on_panic == "exit":
            self.end(MachineExit(exits.PANIC, "the guest's kernel panicked"))
            return
        with self._lock:
            if self._state == RUNNING:
                for thread in self._threads:
                    thread.request(PAUSED)
                self._state = PAUSED
        self.platform.flush()
        self._tell("paused", "the guest's kernel panicked")

    def vcpu_exit(self, thread: VcpuThread, reason: int) -> bool:
        """An exit other than PIO and MMIO; whether the vCPU goes on."""
        if reason == constants.EXIT_SYSTEM_EVENT:
            kind = thread.vcpu.kvm_run.system_event.type
            if kind == constants.SYSTEM_EVENT_SHUTDOWN:
                self.end(MachineExit(exits.POWEROFF, "the guest powered off"))
            elif kind == constants.SYSTEM_EVENT_RESET:
                self.end(MachineExit(exits.REBOOT, "the guest rebooted"))
            else:
                self.panic_seen("reported")
                self.end(MachineExit(exits.PANIC, "the guest reported a crash"))
            return False
        from vmm.machine import failure

        self.end(failure.describe(self, thread.vcpu, reason))
        return False

    # --- inside ---------------------------------------------------------------------------------

    def need(self, call: str, state: str) -> None:
        """StateError, in the name of `call`, unless it is in `state`."""
        if self._state != state:
            raise StateError(f"{call}: the machine is {self._state}, not {state}")

    def _watch(self) -> None:
        """Have the time limit kept, whether or not anybody waits for the end."""
        if self.config.kernel is not None:
            from vmm.machine import halted

            halted.watch(self)
        limit = self.config.timeout
        if limit is None:
            return
        reason = MachineExit(exits.TIMEOUT, f"no end within {limit:g} s (--timeout)")
        self._watchdog = threading.Timer(limit, self.end, (reason,))
        self._watchdog.daemon = True
        self._watchdog.start()

    def _join(self) -> None:
        if self._state == CLOSED:
            return
        self.platform.hurry(ending=True)
        self._join_vcpus(time.monotonic() + END_WITHIN)
        self.platform.flush(wait=True)  # not for long: a stuck reader is given up on at the end
        self.console.close()

    def _before_console_wait(self) -> None:
        """Somebody waits for output: bring out what there is, tell that no more will come."""
        if self._ended.is_set():
            self._join()
        else:
            self.platform.flush()
