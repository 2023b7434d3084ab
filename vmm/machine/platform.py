"""What surrounds the processor: address spaces, legacy devices, tables, console."""

from __future__ import annotations

import os

from vmm import layout
from vmm.console.console import Console
from vmm.console.panic import PanicWatch
from vmm.devices.bus import AddressSpace
from vmm.devices.debugexit import DebugExit
from vmm.devices.i8042 import I8042
from vmm.devices.nopci import NoPci
from vmm.devices.power import AcpiPower
from vmm.devices.pvpanic import PvPanic
from vmm.devices.rtc import Rtc
from vmm.devices.uart import Uart
from vmm.errors import StateError, call_each
from vmm.kvm import constants
from vmm.machine import exits
from vmm.machine.coalescing import ConsoleCoalescing
from vmm.machine.exits import MachineExit
from vmm.machine.late_pit import LatePit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.agent.link import Link
    from vmm.boot import BootState
    from vmm.kvm import CpuidEntry, Kvm, Vm
    from vmm.machine.machine import Machine
    from vmm.machine.vcpu_thread import VcpuThread
    from vmm.machine.virtio import VirtioDevices
    from vmm.virtio.balloon import Balloon
    from vmm.virtio.console import VirtioConsole
    from vmm.virtio.device import VirtioDevice


IOAPIC_MASKED = 1 << 16
"""Of a redirection table entry: the interrupt is not delivered."""


class Platform:
    """The devices of one machine, wired to it.

    Attributes:
        pio, mmio: the two address spaces.
        uart, power, rtc, pit: devices others need to reach.
        virtio: the virtio devices, None where there are none.
        vmgenid: the guest was told of a VM generation ID, at layout.VMGENID.
        console: what the UART's output goes to and its input comes from.
    """

    def __init__(self, machine: Machine, vm: Vm) -> None:
        self.machine = machine
        self.vm = vm
        self.console = Console(machine.config.console_where)
        self._panic = PanicWatch()
        self.console.tail.before_cut = self._panic.cut
        self._coalescing: ConsoleCoalescing | None = None
        self.virtio: VirtioDevices | None = None
        self.hvc: VirtioConsole | None = None
        self.balloon: Balloon | None = None
        self.vmgenid = False
        self.agent: Link | None = None
        self.pio = AddressSpace("port", 16)
        self.mmio = AddressSpace("mmio", 64)
        if machine.config.trace:
            self.pio.trace = self.mmio.trace = _trace
        end = machine.end
        self.uart = Uart(self._line(layout.GSI_UART))
        self.power = AcpiPower(self._poweroff, self._reset, self._line(layout.GSI_GED))
        self.rtc = Rtc(
            machine.config.memory,
            irq=self._line(layout.GSI_RTC),
            running=lambda: machine.state == "running",
        )
        self.pio.add(layout.PORT_UART, 8, self.uart)
        self.pio.add(layout.PORT_ACPI, 8, self.power)
        self.pio.add(layout.PORT_RTC, 2, self.rtc)
        self.pit = LatePit(vm)
        self.pio.add(layout.PORT_PIT, 4, self.pit)
        self.pio.add(layout.PORT_SPEAKER, 1, self.pit, layout.PORT_SPEAKER - layout.PORT_PIT)
        i8042 = I8042(self._reset)
        self.pio.add(layout.PORT_I8042, 1, i8042)
        self.pio.add(layout.PORT_I8042 + 4, 1, i8042, 4)
        self.pio.add(layout.PORT_PVPANIC, 1, PvPanic(machine.panicked))
        self.pio.add(
            layout.PORT_EXIT,
            1,
            DebugExit(
                lambda value: end(
                    MachineExit(
                        exits.EXIT_PORT, f"the guest wrote {value} to the exit port", status=value
                    )
                )
            ),
        )

    # --- wiring -----------------------------------------------------------------------------------

    def add_virtio(self) -> None:
        """Make the virtio devices the configuration asks for, if any."""
        config = self.machine.config
        if config.transport != "pci":
            self.pio.add(layout.PORT_PCI, NoPci.LENGTH, NoPci())
        disks = config.drives or config.shares or config.vhost_user_blks
        talk = config.vsock or config.hvc or config.ports or config.agent
        memory = config.balloon is not None
        if config.transport == "pci":
            from vmm.machine.virtio_pci import PciDevices

            self.virtio = PciDevices(self.machine, self.mmio, self.pio)
        elif disks or talk or memory or config.nets or config.rng or config.devices:
            from vmm.machine.virtio import MmioDevices

            self.virtio = MmioDevices(self.machine, self.mmio)
        else:
            return
        if config.drives or config.nets:  # much is going to be copied
            for region in self.machine.memory.regions:
                region.prefer_huge_pages()
        drives, shares = config.drives, config.shares
        root = config.root_parts
        if root is not None:
            drives += (root.drive,) if root.drive is not None else ()
            shares += root.shares
        if len(drives) > 1:
            from vmm.block.drive import check_once

            check_once(drives)
        for number, drive in enumerate(drives):
            self.virtio.add(drive.open(number))
        for number, disk in enumerate(config.vhost_user_blks):
            self.virtio.add(disk.open(number))
        for number, net in enumerate(config.nets):
            nic = net.open(number)
            if nic is not None:
                self.virtio.add(nic)
        if config.rng:
            from vmm.virtio.rng import Entropy, parse

            limit = parse(config.rng) if isinstance(config.rng, str) else None
            self.virtio.add(Entropy(limit=limit))
        if config.hvc or config.ports:
            self.virtio.add(self._virtio_console())
        if config.balloon is not None:
            from vmm.virtio.balloon import Balloon

            self.balloon = Balloon(size=config.balloon)
            self.virtio.add(self.balloon)
        if config.vsock or config.agent:
            self._add_vsock(self.virtio)
        for share in shares:
            self.virtio.add(share.open())
        for make in config.devices:
            self.virtio.add(make())

    def _add_vsock(self, virtio: VirtioDevices) -> None:
        """The socket device, and the way to the agent over it."""
        from vmm.virtio.vsock import Vsock
        from vmm.virtio.vsock_host import VsockHost

        config = self.machine.config
        device = config.vsock.open() if config.vsock else Vsock(3, VsockHost(None))
        virtio.add(device)
        if config.agent and isinstance(device, Vsock):
            from vmm.agent.link import Link

            self.agent = Link(device, self._console_bytes)

    def power_off_by_agent(self) -> None:
        """Where the guest's init is the agent's, nothing else in it knows a power button."""
        if self.agent is not None and self._init_is_the_agent():
            self.agent.power_off()

    def _init_is_the_agent(self) -> bool:
        config = self.machine.config
        if self.agent is None or config.root is None:
            return False
        from vmm.agent.archive import guest_init

        return guest_init(config) is None

    def power_button_unseen(self) -> str:
        """Why nothing in the guest notices the power button; an empty string where it may.

        A guest that has never read the device's register and has its interrupt masked at the
        IOAPIC has no driver for it (yet). Whether the driver's event reaches a program that acts
        on it is not known here.
        """
        if self.power.watched:
            return ""
        if self.agent is not None and self._init_is_the_agent():
            return "" if self.agent.ready else "the agent in the guest is not up"
        if not self.machine.config.acpi:
            return "the guest has no ACPI, and so no power button (--no-acpi)"
        entry = self.vm.get_irqchip(constants.IRQCHIP_IOAPIC).chip.ioapic.redirtbl[layout.GSI_GED]
        if int(entry) & IOAPIC_MASKED:
            return "no driver in the guest has taken its power button"
        return ""

    def _console_bytes(self) -> bytes:
        self.flush()
        return self.console.tail.bytes()

    def _virtio_console(self) -> VirtioConsole:
        """Port 0 on the machine's console, where it is asked for; named ports."""
        from vmm.virtio.console import VirtioConsole
        from vmm.virtio.console_ports import ConsolePort, Port

        config = self.machine.config
        ports: list[Port | None] = [None]
        if config.hvc:
            ports[0] = ConsolePort(self.console.sink, self.console.backend.ready)
        try:
            for number, port in enumerate(config.ports, 1):
                ports.append(port.open(number))
        except BaseException:
            for made in ports[1:]:
                if made is not None:
                    made.close()
            raise
        self.hvc = VirtioConsole(ports)
        return self.hvc

    def virtio_device(self, name: str) -> VirtioDevice:
        """The virtio device `name`; StateError where there is none."""
        transports = self.virtio.transports if self.virtio is not None else []
        for transport in transports:
            if transport.name == name:
                return transport.device
        names = ", ".join(transport.name for transport in transports) or "no virtio devices"
        raise StateError(f"this machine has no virtio device {name!r}; it has {names}")

    def resize(self, cols: int = 0, rows: int = 0) -> None:
        """Tell a virtio console its size; without one, that of the terminal, if there is any."""
        if self.hvc is None:
            return
        backend = self.console.backend
        if not cols:
            if not backend.interactive:
                return
            try:
                cols, rows = os.get_terminal_size(backend.input_fd)
            except OSError:  # it has gone
                return
        self.hvc.resize(cols, rows)

    def cpuid_tables(self, kvm: Kvm) -> list[list[CpuidEntry]]:
        """What each vCPU's CPUID says."""
        from vmm.cpu import build, host_brand

        config = self.machine.config
        deadline = bool(kvm.check_extension(constants.CAP_TSC_DEADLINE_TIMER))
        return build(
            kvm.supported_cpuid(),
            config.cpu,
            config.cpus,
            tsc_deadline=deadline,
            brand=host_brand(),
        )

    def load_kernel(self, kernel: str) -> BootState:
        """Put the kernel, initrds and tables into guest memory."""
        from vmm.boot import load
        from vmm.tables import mptable

        config, memory = self.machine.config, self.machine.memory
        rsdp = None
        blobs = [mptable.build(config.cpus)]  # with ACPI too: looking for it in vain takes long
        if config.acpi:
            from vmm.tables import acpi

            virtio = self.virtio.windows() if self.virtio is not None else ()
            pci = config.transport == "pci"
            tables = acpi.build(acpi.AcpiConfig(cpus=config.cpus, virtio_mmio=virtio, pci=pci))
            blobs.append((layout.VMGENID, os.urandom(layout.VMGENID_SIZE)))
            self.vmgenid = True
            rsdp = tables.rsdp
            blobs += tables.blobs
        initrds: list[str | bytes] = [*config.initrds]
        if config.agent:
            from vmm.agent import archive

            initrds.append(archive.build(config))
        state = load(memory, kernel, initrds, self.cmdline, mode=config.boot, rsdp=rsdp)
        for gpa, blob in blobs:
            memory.write(gpa, blob)
        return state

    @property
    def cmdline(self) -> str:
        """The whole kernel command line, with the virtio-mmio devices where it is to name them."""
        config = self.machine.config
        devices = self.virtio.windows() if self.virtio is not None else []
        if not devices or (config.acpi and not config.cmdline_devices):
            return config.cmdline
        return config.command_line(
            # Documentation/admin-guide/kernel-parameters.txt: virtio_mmio.device=
            f"virtio_mmio.device={size}@{base:#x}:{gsi}"
            for base, size, gsi in devices
        )

    def start(self, threads: list[VcpuThread]) -> None:
        """Called before the first vCPU runs."""
        if self.virtio is not None:
            self.virtio.watch_peers()
        line = None
        if self.hvc is not None and (port := self.hvc.console_port()) is not None:
            from vmm.console.hvc import HvcLine

            line = HvcLine(self.uart, port)
            self.resize()
        self.console.attach(self.uart, self._escape, line)
        self._coalescing = ConsoleCoalescing(self.vm, self.uart, threads)
        self.uart.sink = self._sink

    def flush(self, wait: bool = False) -> None:
        """Bring out what the guest has written to the console; see `Uart.flush`."""
        if self._coalescing is not None:
            self._coalescing.drain()
        self.uart.flush(wait)

    def resumed(self) -> None:
        """The machine goes on after a pause."""
        self.rtc.resumed()
        if self.virtio is not None:
            self.virtio.resumed()

    def end(self, why: str) -> None:
        """The machine ends: nothing may hold a vCPU up, nobody waits for the guest any more."""
        self.console.end()
        if self.agent is not None:
            self.agent.end(why)

    def rolled_back(self) -> None:
        """The guest is where it was: what it printed since, it has not printed yet."""
        self._panic.forget(self.console.tail.position)

    def revive(self) -> None:
        """The machine has not ended after all."""
        self.console.revive()
        if self.agent is not None:
            self.agent.revive()

    def hurry(self, *, ending: bool = False) -> None:
        """Somebody waits for the vCPUs, which may wait for another process."""
        if self.virtio is not None:
            self.virtio.hurry(ending=ending)

    def end_threads(self, until: float | None) -> bool:
        """Whether the devices' threads have ended by `until`, of time.monotonic; they are told to.

        One has not where it is in a function of the program that does not return."""
        if self.virtio is None:
            return True
        self.virtio.end()
        return self.virtio.join(until)

    def close(self) -> None:
        """Give back what the devices hold, and the terminal; all of it, whatever raises."""
        steps: list[Callable[[], object]] = []
        if self._coalescing is not None:
            steps.append(self._coalescing.close)
        if self.virtio is not None:
            steps.append(self.virtio.close)
        steps += [self.uart.flush, self.console.close]
        steps += [device.close for device in self.pio.devices() + self.mmio.devices()]
        if self.agent is not None:
            steps.append(self.agent.close)
        call_each(steps)

    # --- called by devices ------------------------------------------------------------------------

    def _line(self, gsi: int) -> Callable[[int], None]:
        def set_level(level: int) -> None:
            self.vm.irq_line(gsi, level)

        return set_level

    def _sink(self, data: bytes) -> None:
        self.console.sink(data)
        if self._coalescing is not None:
            self._coalescing.saw(len(data))

    def _escape(self) -> None:
        self.machine.end(MachineExit(exits.STOPPED, "ended from the keyboard (Ctrl-A x)"))

    def _poweroff(self) -> None:
        self.machine.end(MachineExit(exits.POWEROFF, "the guest powered off"))

    def _reset(self) -> None:
        self.flush(wait=True)
        tail = self.console.tail
        data = tail.bytes()
        line = self._panic.judge(data[max(self._panic.since - (tail.position - len(data)), 0) :])
        if line:
            self.machine.panic_seen("printed")
            self.machine.end(MachineExit(exits.PANIC, f"the guest's kernel panicked: {line}"))
            return
        self.machine.end(MachineExit(exits.REBOOT, "the guest rebooted"))


def _trace(line: str) -> None:
    import os
    import select
    from contextlib import suppress

    poll = select.poll()
    poll.register(2, select.POLLOUT)
    with suppress(OSError):  # nobody may be listening, or reading; the guest goes on
        if poll.poll(0):
            os.write(2, os.fsencode(f"vmm: {line}\n"))
