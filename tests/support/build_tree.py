"""A tree as a kernel build leaves it, made of Debian's: the real kernel and modules, where `make`
puts them."""

from __future__ import annotations

import shutil
from pathlib import Path

from vmm.testing.kernels import Kernel


def make(top: Path, kernel: Kernel, *, order: str = ".o", modules: bool = True) -> Path:
    """`order` is how names in modules.order end: .o since Linux 6.3, .ko before."""
    (top / "arch/x86/boot").mkdir(parents=True)
    (top / "arch/x86_64/boot").mkdir(parents=True)
    shutil.copy(kernel.vmlinuz, top / "arch/x86/boot/bzImage")
    (top / "arch/x86_64/boot/bzImage").symlink_to("../../x86/boot/bzImage")
    (top / "include/config").mkdir(parents=True)
    (top / "include/config/kernel.release").write_text(f"{kernel.release}\n")
    shutil.copy(kernel.directory / "boot" / f"config-{kernel.release}", top / ".config")
    shutil.copy(kernel.modules / "modules.builtin", top)
    for name in ("Makefile", "Kconfig"):
        (top / name).write_text("# of Linux\n")
    for name in ("kernel", "scripts", "tools/testing/selftests"):  # `kernel` is sources here
        (top / name).mkdir(parents=True)
    lines = []
    for path in sorted((kernel.modules / "kernel").rglob("*.ko")):
        inside = path.relative_to(kernel.modules / "kernel")
        lines.append(str(inside.with_suffix(order)))
        if modules:
            (top / inside).parent.mkdir(parents=True, exist_ok=True)
            (top / inside).symlink_to(path)
    (top / "modules.order").write_text("\n".join(lines) + "\n")
    return top
