"""One thread a vCPU: KVM_RUN, and a flat switch over the exits it can make.

Pausing: `request` says what is wanted, sets immediate_exit and signals the thread. KVM_RUN then
completes what the last exit left open (a PIO or MMIO read) and returns EINTR; the thread parks
with its vCPU in a state that can be saved. The signal is blocked in the thread and unblocked only
inside KVM_RUN (KVM_SET_SIGNAL_MASK), so none is lost and no signal handler is needed.
"""

from __future__ import annotations

# The C module: `signal` wraps it in enums, which cost two milliseconds to load.
import _signal  # type: ignore[import-not-found]
import errno
import fcntl
import struct
import threading
import time

from vmm.errors import KvmError
from vmm.kvm import constants, ioctls
from vmm.kvm.ffi import ffi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.devices.bus import AddressSpace
    from vmm.kvm.coalesced import CoalescedRing
    from vmm.kvm.vcpu import Vcpu
    from vmm.machine.machine import Machine

KICK_SIGNAL = _signal.SIGRTMIN + 2
"""Directed at one thread; glibc keeps the first two real-time signals for itself."""

RFLAGS_IF = 1 << 9

RUNNING, PAUSED, STOPPED = "running", "paused", "stopped"

_KVM_RUN = ioctls.RUN.number
_IMMEDIATE_EXIT = ffi.offsetof("struct kvm_run", "immediate_exit")
_EXIT_REASON = ffi.offsetof("struct kvm_run", "exit_reason") // 4
_UNION = ffi.offsetof("struct kvm_run", "io")
_IO = struct.Struct("<BBHIQ")  # direction, size, port, count, data_offset
_MMIO = struct.Struct("<Q8sIB")  # phys_addr, data, len, is_write
_MMIO_DATA = _UNION + 8


def _no_answer() -> int:
    return -1


class VcpuThread:
    """Runs one vCPU until it is asked to stop or the machine ends.

    Attributes:
        exits: how many exits came to user space.
    """

    def __init__(self, machine: Machine, vcpu: Vcpu, pio: AddressSpace, mmio: AddressSpace) -> None:
        self.machine = machine
        self.vcpu = vcpu
        self.exits = 0
        self._pio = pio
        self._mmio = mmio
        self._ring: CoalescedRing | None = None
        self._polled_port = -1
        self._poll: Callable[[], int] = _no_answer
        self._stalls = 0
        self._cond = threading.Condition(threading.Lock())
        self._asked = False
        self._dead: bool | None = None
        self.renew()

    # --- for other threads ------------------------------------------------------------------------

    def renew(self) -> None:
        """Have a thread that has not started: at first, and when the former has ended."""
        self._want = PAUSED
        self._parked = False
        name = f"vcpu{self.vcpu.number}"
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread, parked."""
        # Blocked from its first moment: a kick before would end the process.
        mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, {KICK_SIGNAL})
        try:
            self._thread.start()
        finally:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)

    def coalesce(self, ring: CoalescedRing, port: int, poll: Callable[[], int]) -> None:
        """Empty `ring` before each exit is handled, but for byte reads of `port` that `poll`
        answers (it gives -1 for those it does not)."""
        self._poll, self._polled_port = poll, port
        self._ring = ring  # last: the thread looks at it first

    def request(self, state: str) -> None:
        """Ask for RUNNING, PAUSED or STOPPED; does not wait."""
        with self._cond:
            if self._want == STOPPED:
                return
            self._want = state
            if state == RUNNING:
                self.vcpu.run_map[_IMMEDIATE_EXIT] = 0
                self._cond.notify_all()
                return
            self._cond.notify_all()
            ident = self._thread.ident
            if self._parked or ident is None:
                return
            self.vcpu.run_map[_IMMEDIATE_EXIT] = 1
            if ident != threading.get_ident() and self._thread.is_alive():
                _signal.pthread_kill(ident, KICK_SIGNAL)

    def stall(self, stalled: bool) -> None:
        """Keep this vCPU from running whatever is requested, or no longer (as often as it was
        stalled); does not wait."""
        with self._cond:
            self._stalls += 1 if stalled else -1
            self._cond.notify_all()
            ident = self._thread.ident
            if stalled and not self._parked and ident not in (None, threading.get_ident()):
                self.vcpu.run_map[_IMMEDIATE_EXIT] = 1
                if self._thread.is_alive():
                    _signal.pthread_kill(ident, KICK_SIGNAL)

    def is_dead(self, timeout: float) -> bool:
        """Whether the vCPU is halted for good: interrupts disabled, or never started. Interrupts
        KVM_RUN to ask; False where it does not run, or no answer comes within `timeout` seconds.
        """
        with self._cond:
            ident = self._thread.ident
            if self._held() or self._parked or ident is None or not self._thread.is_alive():
                return False
            self._asked, self._dead = True, None
            self.vcpu.run_map[_IMMEDIATE_EXIT] = 1
            _signal.pthread_kill(ident, KICK_SIGNAL)
            self._cond.wait_for(lambda: self._dead is not None or self._parked, timeout)
            self._asked = False
            return self._dead is True

    def cpu_time(self) -> int:
        """CPU time of the thread in ns, guest code included; -1 where it has ended."""
        # The kernel's clock of another thread (clock_getcpuclockid(3), CPUCLOCK_PERTHREAD), by its
        # number: pthread_getcpuclockid(3) crashes where that thread has ended.
        number = self._thread.native_id
        try:
            return time.clock_gettime_ns(~number << 3 | 6) if number is not None else -1
        except OSError:
            return -1

    def resumed(self) -> None:
        """Tell the guest's kvmclock of the pause, if it uses that (KVM_KVMCLOCK_CTRL)."""
        try:
            self.vcpu.kvmclock_ctrl()
        except KvmError as err:
            if err.errno != errno.EINVAL:
                raise

    def wait_parked(self, timeout: float | None = None) -> bool:
        """Wait until the vCPU is out of KVM_RUN and parked, or the machine has ended; whether that
        came within `timeout` seconds."""
        if self._thread.ident == threading.get_ident():
            return True
        with self._cond:
            while not self._parked and self._want != STOPPED:
                if not self._cond.wait(timeout):
                    return False
        return True

    def join(self, timeout: float | None = None) -> bool:
        """Whether the thread has ended within `timeout` seconds, or never began.

        Where only the host is slow, it has longer; see `vmm.held_up`.
        """
        if self._thread.ident in (None, threading.get_ident()):
            return True
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        from vmm import held_up

        return held_up.join(self._thread)

    @property
    def ident(self) -> int | None:
        """The thread's `threading.get_ident()`; None before it starts."""
        return self._thread.ident

    @property
    def is_current(self) -> bool:
        """Whether the caller runs on this thread."""
        return threading.current_thread() is self._thread  # idents of ended threads come again

    # --- the thread -------------------------------------------------------------------------------

    def _main(self) -> None:
        blocked = _signal.pthread_sigmask(_signal.SIG_BLOCK, ())
        try:
            self.vcpu.set_signal_mask(blocked - {KICK_SIGNAL})
            while self._park():
                self._run()
        except BaseException as err:
            self.machine.monitor_failed(err)
        finally:
            with self._cond:
                self._want = STOPPED
                self._parked = True
                self._cond.notify_all()

    def _park(self) -> bool:
        """Wait for RUNNING (True) or STOPPED (False)."""
        while _signal.sigtimedwait({KICK_SIGNAL}, 0) is not None:
            pass
        with self._cond:
            if self._asked and self._dead is None:
                self._dead = self._is_dead()
                self._cond.notify_all()
            if self._held():
                self._parked = True
                self._cond.notify_all()
                while self._held():
                    self._cond.wait()
                self._parked = False
            if self._want == RUNNING:
                self.vcpu.run_map[_IMMEDIATE_EXIT] = 0
            return self._want == RUNNING

    def _is_dead(self) -> bool:
        """Whether nothing but an NMI or an INIT wakes the vCPU (Intel SDM volume 2A, HLT)."""
        try:
            state = self.vcpu.get_mp_state()
            if state == constants.MP_STATE_HALTED:
                return not self.vcpu.get_regs().rflags & RFLAGS_IF
            return state == constants.MP_STATE_UNINITIALIZED
        except KvmError:
            return False

    def _held(self) -> bool:
        """Whether to stay parked."""
        return self._want == PAUSED or (self._stalls > 0 and self._want != STOPPED)

    def _run(self) -> None:
        """Run until a request interrupts KVM_RUN."""
        fd = self.vcpu.fd
        run = self.vcpu.run_map
        words = memoryview(run)[:32].cast("I")
        pio_write, mmio_read, mmio_write = self._pio.write, self._mmio.read, self._mmio.write
        pio_read = self._pio.read
        unpack_io, unpack_mmio = _IO.unpack_from, _MMIO.unpack_from
        ioctl = fcntl.ioctl
        from_bytes = int.from_bytes
        exits = self.exits
        exit_io = constants.EXIT_IO
        try:
            while True:
                try:
                    # Without an argument: for an integer, fcntl first tries it as two kinds of
                    # buffer, which costs 1.3 µs.
                    ioctl(fd, _KVM_RUN)
                except InterruptedError:
                    return
                except BlockingIOError:  # an AP that has been woken by INIT or SIPI
                    continue
                except OSError as err:
                    if not self._failed_run(err):
                        return
                    continue
                exits += 1
                reason = words[_EXIT_REASON]
                ring = self._ring  # now: another thread may have set it during KVM_RUN
                if reason == exit_io:
                    direction, size, port, count, offset = unpack_io(run, _UNION)
                    if ring is not None:
                        if port == self._polled_port and size == count == 1 and not direction:
                            value = self._poll()
                            if value >= 0:
                                run[offset] = value
                                continue
                        ring.drain()
                    if count == 1:
                        if direction:
                            if size == 1:
                                pio_write(port, 1, run[offset])
                            else:
                                pio_write(
                                    port, size, from_bytes(run[offset : offset + size], "little")
                                )
                        elif size == 1:
                            run[offset] = pio_read(port, 1)
                        else:
                            run[offset : offset + size] = pio_read(port, size).to_bytes(
                                size, "little"
                            )
                    else:
                        self._string_io(direction, size, port, count, offset)
                    continue
                if ring is not None:
                    ring.drain()
                if reason == constants.EXIT_MMIO:
                    addr, data, size, is_write = unpack_mmio(run, _UNION)
                    if is_write:
                        mmio_write(addr, size, from_bytes(data[:size], "little"))
                    else:
                        run[_MMIO_DATA : _MMIO_DATA + size] = mmio_read(addr, size).to_bytes(
                            size, "little"
                        )
                elif reason == constants.EXIT_INTR or not self.machine.vcpu_exit(self, reason):
                    return
        finally:
            self.exits = exits
            words.release()

    def _string_io(self, direction: int, size: int, port: int, count: int, offset: int) -> None:
        """INS and OUTS with a repeat count: `count` items in the run area, in order."""
        run = self.vcpu.run_map
        for position in range(offset, offset + size * count, size):
            if direction:
                value = int.from_bytes(run[position : position + size], "little")
                self._pio.write(port, size, value)
            else:
                value = self._pio.read(port, size)
                run[position : position + size] = value.to_bytes(size, "little")

    def _failed_run(self, err: OSError) -> bool:
        """KVM_RUN failed outright; whether to go on."""
        if err.errno == errno.EFAULT:
            return self.machine.vcpu_exit(self, constants.EXIT_MEMORY_FAULT)
        raise err
