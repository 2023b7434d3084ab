"""Whether a guest that resets its machine does so because its kernel panicked.

A kernel whose pvpanic driver is not loaded reboots on a panic as on any other occasion (panic=-1);
what it printed tells the difference. But a guest also prints such text of old: a log, a record of
pstore, a test's output. A panic is the last thing a kernel does: after its line only the kernel
speaks, and it never says that it restarts the system.
"""

from __future__ import annotations

PANIC = b"Kernel panic - not syncing"
"""What Linux's panic() prints first (kernel/panic.c)."""
SHOWN = 200
"""Bytes of a line that are looked at."""
LINE_MAX = 1000
"""Bytes of the panic's line that are kept."""

_STAMP = rb"\[ *\d+\.\d{6}\](?:\[ *[TC] *\d+\])? ?"
"""What printk puts before a line (CONFIG_PRINTK_TIME, CONFIG_PRINTK_CALLER)."""
_HEAD = rb"(?P<level><\d+>)?(?P<stamp>" + _STAMP + rb")?$"
_RESTART = (
    rb"(?:reboot: (?:Restarting system|machine restart)|sysrq: Resetting|kexec_core: Starting)"
)
"""The kernel was asked to (kernel/reboot.c, drivers/tty/sysrq.c)."""
_KERNEL = (
    rb"^(?:[^\[]*" + _STAMP + rb".*|---\[ .*|Rebooting in .*|Kernel Offset: .*|CPU: \d.*"
    rb"|Call Trace:.*|Hardware name: .*|(?:[RE]?[A-Z][A-Z0-9]{1,2}|CR\d|PKRU|Code): ?[0-9a-f(<?].*"
    rb"|Modules linked in:.*|Dumping ftrace buffer:.*"
    rb"|(?:Shutting down|Sending NMI|NMI backtrace) .*"
    rb"|\s*</?[A-Z]+>|\s+\??\s*\S+\+0x[0-9a-f]+/0x[0-9a-f]+.*|Memory Limit: .*"
    rb"|Wakeup Device: .*|\d+ pages [a-z]+|   +\S.*|-{10,}|={10,})$"  # panic_print=
)
"""Lines of a kernel that is about to die, where it prints no time."""


class PanicWatch:
    """What of a console's output tells of a panic, however much comes after it.

    `cut` is given output that is about to be forgotten, and LINE_MAX bytes after it.
    """

    def __init__(self) -> None:
        self._cut: tuple[str, bool] | None = None
        self.since = 0
        """The position in the output before which nothing counts: the machine went back in time."""

    def cut(self, data: bytes) -> None:
        """Most of `data` will not be among what `judge` gets; it ends anywhere in a line."""
        found = _last(data)
        if found is not None:
            self._cut = found[0], found[1]

    def forget(self, position: int) -> None:
        """The guest was put back to a moment before all output so far."""
        self._cut = None
        self.since = position

    def judge(self, data: bytes) -> str:
        """The panic's line, for a message, where the guest has panicked by all it printed; else an
        empty string.

        `data` is the end of its output.
        """
        found = _last(data)
        if found is not None:
            line, sure, end = found
            if self._cut is not None and self._cut[0] == line:  # how its line began may be cut off
                sure = sure or self._cut[1]
        elif self._cut is not None:
            (line, sure), end = self._cut, 0
        else:
            return ""
        if not _is_the_end(data[end:], sure):
            return ""
        from vmm.guest_text import visible

        return visible(line)


def _last(data: bytes) -> tuple[str, bool, int] | None:
    """The last line of a panic: its text, whether the kernel wrote it for sure, its end."""
    at = data.rfind(PANIC)
    if at < 0:
        return None
    import re

    begin = data.rfind(b"\n", 0, at) + 1
    end = data.find(b"\n", at)
    end = len(data) if end < 0 else end
    head = re.search(_HEAD, data[max(begin, at - 64) : at])
    assert head is not None  # it may be empty
    if head["level"]:  # as in /dev/kmsg and pstore: no console shows it
        return None
    first = not data[begin:at].strip(b"\r") or bool(head["stamp"])
    text = data[at : min(end, at + LINE_MAX)].decode("utf-8", "replace").strip()
    return text, first, end


def _is_the_end(after: bytes, sure: bool) -> bool:
    """Whether `after` is what a kernel prints between its panic and the machine's reset."""
    import re

    if re.search(_RESTART, after):
        return False
    lines = [line.strip(b"\r") for line in after[-4 * LINE_MAX :].split(b"\n") if line.strip()]
    if not lines:
        return sure
    if re.match(_KERNEL, lines[-1][:SHOWN]):
        return True
    # Somebody else speaks: unless it is no text (one character over and over).
    return sure and len(set(lines[-1])) < 2
