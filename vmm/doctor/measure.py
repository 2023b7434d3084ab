"""What guest code does on this KVM, found by running some: its speed, and whether SYSCALL works."""

from __future__ import annotations

import time

from vmm.doctor.guest import KERNEL_CS, USER_CS, GuestFailed, TinyGuest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.kvm import Kvm

TIME_LIMIT = 3.0
"""Seconds after which a guest counts as hung: not what a measurement takes, which is TARGET."""
TARGET = 0.005
"""Seconds a loop should take to be measured well, where exits are quick."""
TOO_LONG = 0.5
"""Seconds after which a loop is long enough whatever it says."""
FIRST_COUNT = 2000
"""Passes of the first loop: 2 ms where they are interpreted."""
MAX_LOOPS = 16

# start: dec rcx; jnz start; out 0xf4, al; jmp start
LOOP = bytes.fromhex("48ffc9 75fb e6f4 ebf7")
INSTRUCTIONS_A_PASS = 2

# syscall; mov eax, cs; out 0xf6, al; jmp .
SYSCALL = bytes.fromhex("0f05 8cc8 e6f6 ebfe")
# mov eax, cs; out 0xf4, al; mov rdx, cr3; mov eax, cs; out 0xf5, al; sysretq
HANDLER = bytes.fromhex("8cc8 e6f4 0f20da 8cc8 e6f5 480f07")


def loop_mips(kvm: Kvm, cpl: int) -> float:
    """Million instructions a second of a dec/jnz loop at privilege level `cpl` (0 or 3).

    Takes about 50 ms. The exit that ends a loop is not counted: where KVM itself runs on an
    emulator, one takes as long as a million instructions. Raises `GuestFailed`.
    """
    with TinyGuest(kvm, LOOP, cpl=cpl) as guest:

        def seconds(count: int) -> float:
            guest.set_rcx(count)
            start = time.perf_counter()
            guest.run(TIME_LIMIT)
            return time.perf_counter() - start

        seconds(1)  # brings code and page tables in
        exit_time = min(*(seconds(1) for _ in range(3)), TOO_LONG / 5)
        target = max(TARGET, 2 * exit_time)
        count = FIRST_COUNT
        before = mips = 0.0
        for _ in range(MAX_LOOPS):
            net = max(seconds(count) - exit_time, 1e-6)
            if net >= target / 2:
                net = max(min(net, seconds(count) - exit_time), 1e-6)
            mips = INSTRUCTIONS_A_PASS * count / net / 1e6
            if net < target / 2:
                before = 0.0
                count = int(count * min(max(target / net, 3), 10))
                continue
            # The host may have done something else for a while: believe the better of two loops,
            # and only if ones of three times the length are not much quicker.
            if before and (mips < 2 * before or net > TOO_LONG):
                break
            before = mips
            count *= 3
    return max(before, mips)


def syscall_fault(kvm: Kvm, handler: bytes = HANDLER) -> str:
    """How `syscall` from CPL3 fails to enter CPL0 and come back; "" if it does all that."""
    reached = "before the handler"
    try:
        with TinyGuest(kvm, SYSCALL, cpl=3, handler=handler) as guest:
            # What each step must report: its port, and CS then.
            for port, cs, step in (
                (0xF4, KERNEL_CS, "at the handler's first instruction"),
                (0xF5, KERNEL_CS, "after a privileged instruction in the handler"),
                (0xF6, USER_CS, "back from the handler"),
            ):
                got_port, got_cs = guest.run(TIME_LIMIT)
                if (got_port, got_cs) != (port, cs):
                    return f"{step} CS is {got_cs:#x} instead of {cs:#x}"
                reached = step
    except GuestFailed as err:
        return f"the guest failed {reached}: {err}"
    return ""
