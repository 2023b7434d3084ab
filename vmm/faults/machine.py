"""`machine.faults`: the faults of a machine's disks and networks, and its own."""

from __future__ import annotations

from vmm.errors import StateError, UsageError
from vmm.faults.rules import Control, Fault, seconds
from vmm.machine import exits
from vmm.machine.exits import MachineExit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmm.faults.disk import DiskFaults
    from vmm.faults.net import NetFaults
    from vmm.faults.rules import FaultEvent
    from vmm.faults.volatile import Cut
    from vmm.machine.machine import Machine
    from vmm.machine.vcpu_thread import VcpuThread
    from vmm.virtio.device import VirtioDevice

CLOCK_MAX = 100 * 366 * 86400.0
"""Seconds a clock jumps at most."""
PARKED_WITHIN = 0.2
"""Seconds between looks at what a vCPU that is to be stalled waits for."""


class Faults:
    """The faults of `machine`. All methods from any thread."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._control = Control(machine.config.fault_seed, machine.emit, machine.monitor_failed)
        self._disks: dict[int, DiskFaults] = {}
        self._nets: dict[int, NetFaults] = {}

    def __repr__(self) -> str:
        return f"<faults: {', '.join(map(repr, self.active)) or 'none'}>"

    def seed(self, seed: int) -> None:
        """Begin anew with chance: faults set from now on strike as they did after the last call
        with the same `seed`, if they are set and met in the same order."""
        self._control.reseed(seed)

    @property
    def active(self) -> tuple[Fault, ...]:
        """The faults that are set, oldest first."""
        return self._control.faults

    @property
    def log(self) -> list[FaultEvent]:
        """What was set, struck and cleared, oldest first; `Machine.event_log` has it too."""
        return list(self._control.log)

    def tell(self, event: FaultEvent) -> None:
        """Log an event of a fault that is not of this machine alone."""
        self._control.log.append(event)
        self._machine.emit(event)

    def clear(self) -> None:
        """Clear every fault. Volatile caches stay."""
        self._control.clear()

    def close(self) -> None:
        """Clear every fault, for good; called by the machine before its devices end."""
        self._control.close()

    # --- devices ----------------------------------------------------------------------------------

    def disk(self, number: int = 0) -> DiskFaults:
        """The faults of the `number`-th of the machine's drives; a root image's is the one after.

        Raises:
            UsageError: there is no such disk.
            StateError: its requests do not come by here.
        """
        with self._control.lock:
            found = self._disks.get(number)
            if found is None:
                from vmm.faults.disk import DiskFaults
                from vmm.virtio.blk import Block

                device = self._device("disk", "blk", number)
                if not isinstance(device, Block):
                    raise StateError(
                        f"faults.disk({number}): qemu-storage-daemon serves it; a drive with "
                        "format=raw, or with serial=, has faults"
                    )
                found = DiskFaults(device, self._control, f"faults.disk({number})")
                self._disks[number] = found
            return found

    def net(self, number: int = 0) -> NetFaults:
        """The faults of the `number`-th of the machine's network cards.

        Raises:
            UsageError: there is no such card.
            StateError: its frames do not come by here.
        """
        with self._control.lock:
            found = self._nets.get(number)
            if found is None:
                from vmm.faults.net import NetFaults
                from vmm.virtio.net import Nic

                nets = self._machine.config.nets
                device = self._device("net", "net", number)
                if not isinstance(device, Nic) or not device.FRAMES_HERE:
                    raise StateError(
                        f"faults.net({number}): the frames of {nets[number].what} are carried by "
                        "another, where no fault can meet them"
                    )
                found = NetFaults(device, self._control, f"faults.net({number})")
                self._nets[number] = found
            return found

    def _device(self, what: str, name: str, number: int) -> VirtioDevice:
        virtio = self._machine.platform.virtio
        devices = [transport.device for transport in virtio.transports] if virtio else []
        found = {device.name: device for device in devices}
        if isinstance(number, int) and f"{name}{number}" in found:
            return found[f"{name}{number}"]
        have = [each.removeprefix(name) for each in found if each.removeprefix(name).isdecimal()]
        numbers = f"numbers {', '.join(have)}" if have else "none"
        raise UsageError(f"faults.{what}({number!r}): there is no such; the machine has {numbers}")

    # --- power ------------------------------------------------------------------------------------

    def volatile(self, cache: int | None = None) -> None:
        """Give every disk that can be written a volatile cache, see `DiskFaults.volatile`."""
        for disk in self._writable("volatile"):
            if not disk.is_volatile:
                disk.volatile() if cache is None else disk.volatile(cache)

    def power_cut(self, keep: str | float = "none", *, torn: float = 0.0) -> list[Cut]:
        """Pull the plug: the machine ends at once, its disks lose what was not flushed.

        The images are left as a disk would be found: close the machine, then look at them or boot
        another from them. Nothing may have asked for `volatile` too late: each disk must have its
        cache from before.

        Args:
            keep: of the writes since the last flush, what has reached the disk all the same:
                `none`, `some` (each by chance), `all`, or each with this probability.
            torn: the probability of such a write to have reached it in part: whole sectors of 512
                bytes, any of them.

        Returns:
            What was lost and kept, for each disk that can be written.

        Raises:
            StateError: the machine does not run, or a disk has no volatile cache.
        """
        from vmm.faults.disk import check_cut

        machine = self._machine
        if machine.in_vcpu_thread:
            raise StateError(
                "faults.power_cut: called in a vCPU's own thread, which cannot wait for itself; "
                "call it in another"
            )
        chosen = check_cut("faults.power_cut", keep, torn)
        disks = list(self._writable("power_cut"))
        for disk in disks:
            disk.unflushed  # noqa: B018  # it raises where there is no record of writes
        if machine.state not in ("running", "paused"):
            raise StateError(f"faults.power_cut: the machine is {machine.state}, not running")
        machine.end(MachineExit(exits.STOPPED, "the power was cut (faults.power_cut)"))
        machine.wait()
        cuts = []
        for disk in disks:
            disk.device.halt()
            cuts.append(disk.cut(*chosen))
        return cuts

    def power_cut_images(
        self, directory: str, keep: str | float = "some", *, torn: float = 0.5
    ) -> list[Cut]:
        """Write what each disk would hold after a power cut now, all at one moment, to `disk0.img`
        and so on in `directory`; the guest goes on. See `DiskFaults.power_cut_image`."""
        from os.path import join

        from vmm.faults.disk import check_cut, cut_images

        chosen = check_cut("faults.power_cut_images", keep, torn)
        drives = self._machine.config.drives
        numbers = [each for each, drive in enumerate(drives) if not drive.readonly]
        disks = zip(numbers, self._writable("power_cut_images"), strict=True)
        return cut_images(
            [(disk, join(directory, f"disk{number}.img")) for number, disk in disks], *chosen
        )

    def _writable(self, call: str) -> Iterator[DiskFaults]:
        drives = self._machine.config.drives
        if not drives:
            raise UsageError(f"faults.{call}: the machine has no drives")
        return (self.disk(each) for each, drive in enumerate(drives) if not drive.readonly)

    # --- the machine itself -----------------------------------------------------------------------

    def clock_jump(self, by: float, *, kvmclock: bool = True, rtc: bool = True) -> None:
        """Have the guest's clocks jump `by` seconds ahead or, if negative, back.

        Args:
            kvmclock: what Linux takes its time from under KVM, unless it uses the TSC. It lets no
                clock go back: time stands still until kvmclock has caught up.
            rtc: the clock of the machine, in whole seconds, which Linux reads at its start.
        """
        where = "faults.clock_jump"
        if not isinstance(by, int | float) or not abs(by) <= CLOCK_MAX:
            raise UsageError(f"{where}: {by!r} is not seconds, a century at most")
        machine = self._machine
        if machine.state in ("stopped", "closed"):
            raise StateError(f"{where}: the machine is {machine.state}")
        if kvmclock:
            clock = machine.vm.get_clock()
            now = clock.clock + int(by * 1e9)
            if now < 0:
                raise UsageError(
                    f"{where}: {by:g} s is before kvmclock began, {clock.clock / 1e9:.3f} s ago"
                )
            clock.clock = now
            clock.flags = 0  # take it as it is, whatever time it is on the host
            machine.vm.set_clock(clock)
        if rtc:
            machine.platform.rtc.jump(int(by))
        self._control.record(
            "machine", "clock_jump", "struck", {"by": by, "kvmclock": kvmclock, "rtc": rtc}
        )

    def stall(self, vcpu: int, duration: float | None = None) -> Fault:
        """Have one vCPU stand still while the others go on.

        It is out of the guest when the call returns, and goes on when `duration` seconds have
        passed, if they are given, or the fault is cleared.
        """
        where = "faults.stall"
        threads = self._machine.vcpu_threads
        if not isinstance(vcpu, int) or not 0 <= vcpu < len(threads):
            raise UsageError(f"{where}: vCPU {vcpu!r} is not one of {len(threads)}, from 0 on")
        if self._machine.state not in ("running", "paused"):
            raise StateError(f"{where}: the machine is {self._machine.state}, not running")
        if duration is not None:
            duration = seconds(where, "duration", duration)
        thread = threads[vcpu]
        fault = Timed(
            self._control, f"vcpu{vcpu}", "stall", {"duration": duration},
            lambda: thread.stall(True), lambda: thread.stall(False),
        ).set()  # fmt: skip
        _wait_out(thread)
        fault.struck()
        if duration is not None:
            fault.end_after(duration)
        return fault

    def memory_pressure(self, size: int, duration: float | None = None) -> Fault:
        """Have the balloon take `size` bytes of memory from the guest, until the fault is cleared
        or `duration` seconds have passed.

        The guest gives it in its own time (`machine.balloon.actual`), and takes it back rather than
        run out of memory. The machine needs a balloon: `balloon=0`.
        """
        where = "faults.memory_pressure"
        balloon = self._machine.balloon
        left = self._machine.config.memory - balloon.wanted
        if not isinstance(size, int) or not 0 < size <= left:
            raise UsageError(f"{where}: {size!r} is not bytes, up to the {left} there are")
        if duration is not None:
            duration = seconds(where, "duration", duration)
        fault = Timed(
            self._control, "balloon", "memory_pressure", {"size": size, "duration": duration},
            lambda: balloon.target(balloon.wanted + size),
            lambda: balloon.target(max(0, balloon.wanted - size)),
        ).set()  # fmt: skip
        if duration is not None:
            fault.end_after(duration)
        return fault


def _wait_out(thread: VcpuThread) -> None:
    """Wait until a vCPU, which is stalled, runs no guest code: it is parked, or its last access to
    a device waits for a program or for the console's reader; it parks before it runs any then."""
    while not thread.wait_parked(PARKED_WITHIN):
        from vmm import held_up

        if held_up.by_a_peer(thread.ident) or held_up.by_a_reader(thread.ident):
            return


class Timed(Fault):
    """A fault of the machine, which may end by itself."""

    def __init__(
        self,
        control: Control,
        device: str,
        kind: str,
        details: dict[str, object],
        begin: Callable[[], object],
        end: Callable[[], object],
    ) -> None:
        super().__init__(control, device, kind, details)
        self._begin, self._end = begin, end

    def begin(self) -> None:
        self._begin()

    def end(self) -> None:
        self._end()

    def end_after(self, duration: float) -> None:
        """Clear it in `duration` seconds."""
        from time import monotonic

        self._control.schedule.at(monotonic() + duration, self.clear)
