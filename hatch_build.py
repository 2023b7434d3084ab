"""Build hook: write vmm/kvm/_abi.py from the C declarations in vmm/kvm/abi_build.py."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class AbiHook(BuildHookInterface):  # type: ignore[type-arg]
    """Generates the out-of-line cffi module, for wheels and editable installs alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Run before the files are collected."""
        script = Path(self.root) / "vmm" / "kvm" / "abi_build.py"
        runpy.run_path(str(script), run_name="__main__")
