"""Build hook: write vmm/kvm/_abi.py from the C declarations in vmm/kvm/abi_build.py; where there is
a C compiler, make vmm/virtio/kernel and the guest's agent (else compiled when first needed)."""

from __future__ import annotations

import runpy
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class AbiHook(BuildHookInterface):  # type: ignore[type-arg]
    """Generates the out-of-line cffi modules, for wheels and editable installs alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Run before the files are collected."""
        package = Path(self.root) / "vmm"
        runpy.run_path(str(package / "kvm" / "abi_build.py"), run_name="__main__")
        kernel = runpy.run_path(str(package / "virtio" / "kernel" / "build.py"))
        if kernel["build"]():
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform}"
        self._compile_agent()

    def _compile_agent(self) -> None:
        sys.path.insert(0, self.root)
        try:
            from vmm.agent import binary
            from vmm.errors import HostError

            binary.ship()
        except HostError as err:
            self.app.display_warning(str(err))
        finally:
            sys.path.remove(self.root)
