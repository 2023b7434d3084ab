"""The i8254 in KVM, created when the guest first touches it.

A Linux with kvmclock and a local APIC timer never does, and a VM without it is quicker: KVM takes
two grace periods (16 ms at 250 Hz) to take the i8254 of a VM down again, and keeps a thread for it.

Creating it does away with exits for its ports. The one access that did exit is put into its state
here, in the way of KVM's pit_ioport_write() and speaker_ioport_write() (arch/x86/kvm/i8254.c).
"""

from __future__ import annotations

from _thread import allocate_lock

from vmm import layout
from vmm.devices.device import ByteDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.kvm import Vm

_CONTROL = 3
_SPEAKER = layout.PORT_SPEAKER - layout.PORT_PIT
_READ_BACK = 3
_SPEAKER_DATA_ON = 1 << 1
"""KVM_PIT_FLAGS_SPEAKER_DATA_ON."""


class LatePit(ByteDevice):
    """Stands at ports 0x40 to 0x43 and 0x61 until KVM's i8254 does.

    Attributes:
        created: whether KVM has it.
    """

    LENGTH = _SPEAKER + 1

    def __init__(self, vm: Vm) -> None:
        super().__init__("pit")
        self.created = False
        self._vm = vm
        self._lock = allocate_lock()

    def create(self) -> None:
        """Have it in KVM from now on, as after power-on; harmless twice."""
        with self._lock:
            if not self.created:
                self._vm.create_pit2()
                self._fresh = self._vm.get_pit2()
                self.created = True

    def reset(self) -> None:
        """As after power-on."""
        if self.created:
            self._vm.set_pit2(self._fresh)

    def read8(self, offset: int) -> int:
        """Counters nobody started read 0, and so does the speaker's port: gate and output low."""
        self.create()
        return 0

    def write8(self, offset: int, value: int) -> None:
        self.create()
        if offset == _CONTROL:
            self._control(value)
        elif offset == _SPEAKER:
            self._speaker(value)
        # A count before its mode means nothing (Intel 8254 data sheet, "Programming").

    def _control(self, value: int) -> None:
        channel, access = value >> 6, value >> 4 & 3
        if channel == _READ_BACK or not access:
            return  # nothing is counting that could be latched
        with self._lock:
            state = self._vm.get_pit2()
            counter = state.channels[channel]
            counter.rw_mode = counter.read_state = counter.write_state = access
            mode = value >> 1 & 7
            counter.mode = mode if mode < 6 else mode - 4
            counter.bcd = value & 1
            self._vm.set_pit2(state)

    def _speaker(self, value: int) -> None:
        with self._lock:
            state = self._vm.get_pit2()
            state.channels[2].gate = value & 1
            state.flags = state.flags & ~_SPEAKER_DATA_ON | value & _SPEAKER_DATA_ON
            self._vm.set_pit2(state)
