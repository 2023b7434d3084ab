"""What a kernel has of what vmm's guests need: `vmm doctor --kernel FILE`, `--config .config`.

    kernel = look_at_kernel("arch/x86/boot/bzImage")
    print(render(kernel))

Drivers as modules are as good as built in where the modules are found (docs/exec.md).
"""

from __future__ import annotations

from vmm.agent import needs
from vmm.agent.modules import find_tree
from vmm.boot import kconfig
from vmm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple

    class Row(NamedTuple):
        """A symbol: what asks for it, and `y`, `m`, `n` or `?`."""

        symbol: str
        purpose: str
        state: str

else:
    from collections import namedtuple

    Row = namedtuple("Row", "symbol purpose state")

DRIVERS = (
    (needs.MMIO, "virtio devices (or VIRTIO_PCI, with --transport pci)"),
    (needs.PCI, "--transport pci"),
    (needs.VSOCK, "vmm exec, --vsock"),
    (needs.FS, "vmm exec --root DIR, --rw, --overlay, --fs"),
    (needs.OVERLAY, "vmm exec --root DIR, --overlay"),
    (needs.BLK, "--drive, vmm exec --root IMAGE"),
    (needs.NET, "--net"),
    (needs.RNG, "--rng"),
    (needs.CONSOLE, "--console hvc, --port"),
    (needs.BALLOON, "--balloon"),
)
ALWAYS = (
    ("CONFIG_ACPI", "virtio devices over MMIO (else VIRTIO_MMIO_CMDLINE_DEVICES)"),
    *needs.BUILT_IN,
)
"""Symbols that cannot be modules: only a configuration tells."""
EXEC = (needs.VSOCK[1], needs.FS[1], needs.OVERLAY[1])
"""Besides a bus, what the first command of docs/exec.md takes."""
STATES = {"y": "built in", "m": "module", "n": "no", "?": "unknown"}


class KernelReport:
    """What was found.

    Attributes:
        path: the file looked at.
        release: the kernel's; empty where that is not known.
        source: where the symbols are from: a configuration, or the names in the image.
        modules: the tree of its modules, where that was found.
        rows: the symbols.
    """

    def __init__(
        self, path: str, release: str, source: str, modules: str | None, rows: list[Row]
    ) -> None:
        self.path = path
        self.release = release
        self.source = source
        self.modules = modules
        self.rows = rows

    @property
    def missing(self) -> list[str]:
        """Symbols without which `vmm exec KERNEL --root DIR` does not work."""
        state = {row.symbol: row.state for row in self.rows}
        lacks = [symbol for symbol in EXEC if state[symbol] == "n"]
        bus = (needs.MMIO[1], needs.PCI[1])
        lacks += bus[:1] if all(state[symbol] == "n" for symbol in bus) else ()
        return lacks + [name for name, _ in needs.BUILT_IN[:5] if state.get(name) == "n"]

    @property
    def apart(self) -> list[str]:
        """Symbols that `vmm exec KERNEL --root DIR` takes from its modules."""
        wanted = (*EXEC, needs.MMIO[1])
        return [row.symbol for row in self.rows if row.symbol in wanted and row.state in "m?"]

    def as_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return {
            "path": self.path,
            "release": self.release,
            "source": self.source,
            "modules": self.modules,
            "symbols": {row.symbol: row.state for row in self.rows},
            "missing": self.missing,
        }


def look_at_config(path: str) -> KernelReport:
    """What a .config has. Raises UsageError."""
    return KernelReport(path, "", path, None, _rows(None, kconfig.read(path)))


def look_at_kernel(path: str) -> KernelReport:
    """What a bzImage or an ELF vmlinux has. Raises BootError (UsageError where it is not there)."""
    kernel = kconfig.KernelFile(path)
    release = kernel.release
    symbols, source = kernel.config()
    if not symbols and kernel.names("") is None:
        raise BootError(f"kernel {path} is no Linux that could be looked into")
    tree = find_tree(path)
    rows = _rows(kernel, symbols)
    if tree is not None:
        from vmm.initramfs.modules import ModuleTree

        found = ModuleTree(tree)
        there = {row[1]: row[0] for row, _ in DRIVERS}
        rows = [
            Row(row.symbol, row.purpose, "m")
            if row.state in ("n", "?") and found.has(there.get(row.symbol, ""))
            else row
            for row in rows
        ]
    return KernelReport(path, release, source or f"the names in {path}", tree, rows)


def _rows(kernel: kconfig.KernelFile | None, symbols: dict[str, str]) -> list[Row]:
    rows = []
    for row, purpose in DRIVERS:
        need = needs.Need(purpose, *row)
        state = symbols.get(need.symbol, "n")
        if not symbols and kernel is not None:
            state = "y" if kernel.names(need.text) else "?"  # a module, or none
        rows.append(Row(need.symbol, purpose, state))
    for symbol, purpose in ALWAYS:
        rows.append(Row(symbol, purpose, symbols.get(symbol, "n") if symbols else "?"))
    return rows


def render(report: KernelReport, width: int = 80) -> str:
    """The report as text, in `width` columns where the values allow."""
    import textwrap

    lines = [f"kernel   {report.path}" + (f", {report.release}" if report.release else "")]
    lines.append(f"from     {report.source}")
    if report.modules:
        lines.append(f"modules  {report.modules}")
    lines.append("")
    longest = max(len(row.symbol) for row in report.rows)
    indent = longest + 12
    for row in report.rows:
        left = f"{row.symbol:{longest}}  {STATES[row.state]:8}  "
        lines += textwrap.wrap(
            row.purpose, max(width, indent + 20), initial_indent=left,
            subsequent_indent=" " * indent,
        )  # fmt: skip
    lines.append("")
    if report.missing:
        verdict = (
            f"vmm exec --root DIR does not work with it: build it with {', '.join(report.missing)}"
        )
    elif report.apart and report.modules is None:
        verdict = (
            f"{', '.join(report.apart)}: not built in; vmm exec works with it where its modules "
            "are, and have that: beside it as packages have them, or given with --modules"
        )
    else:
        verdict = "vmm exec --root DIR works with it"
    lines += textwrap.wrap(verdict, width)
    return "\n".join(lines) + "\n"
