"""Build hooks: what a wheel has that is not in the repository, and what PyPI is told.

For a wheel, `vmm/kvm/_abi.py` is written from the C declarations in vmm/kvm/abi_build.py,
`vmm/_libc.py` from those in vmm/libc_build.py, man page and completions from the tables of options;
where there is a C compiler, vmm/virtio/kernel and the guest's agent are compiled. The wheel's tag
says which C library the result needs.
"""

from __future__ import annotations

import re
import runpy
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

OLDEST_GLIBC = (2, 17)
"""manylinux2014: there is no older tag for which anybody still makes wheels."""
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)")
"""The end of a Markdown link to a file of the repository."""


class WheelHook(BuildHookInterface):  # type: ignore[type-arg]
    """Makes what is generated, for wheels and editable installs alike."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Run before the files are collected."""
        package = Path(self.root) / "vmm"
        runpy.run_path(str(package / "libc_build.py"), run_name="__main__")
        runpy.run_path(str(package / "kvm" / "abi_build.py"), run_name="__main__")
        kernel = runpy.run_path(str(package / "virtio" / "kernel" / "build.py"))
        sys.path.insert(0, self.root)
        try:
            self._compile_filters()
            if kernel["build"]():
                library = package / "virtio" / "kernel" / kernel["LIBRARY"]
                build_data["pure_python"] = False
                build_data["tag"] = f"py3-none-{platform_tag(library.read_bytes())}"
            elif version != "editable":
                self.app.display_warning("without a C compiler: a wheel for any platform")
            self._compile_agent()
            self._write_share()
        finally:
            sys.path.remove(self.root)

    def _compile_filters(self) -> None:
        from vmm.sandbox import filter_build

        filter_build.build()

    def _compile_agent(self) -> None:
        from vmm.agent import binary
        from vmm.errors import HostError

        try:
            binary.ship()
        except HostError as err:
            self.app.display_warning(str(err))

    def _write_share(self) -> None:
        from vmm.cli.tables import share

        for name, text in share().items():
            path = Path(self.root) / "build" / "share" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


class Metadata(MetadataHookInterface):
    """The README as PyPI shows it, and the addresses beside it."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in the dynamic fields."""
        home = str(self.config.get("home", "")).rstrip("/")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": linked_readme(text, home),
        }
        metadata["urls"] = project_urls(metadata["name"], home)


def platform_tag(library: bytes) -> str:
    """The wheel's platform: manylinux of the C library that `library`, an ELF file, needs."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    versions = [
        tuple(map(int, found.split(b"."))) for found in re.findall(rb"GLIBC_([\d.]+)\0", library)
    ]
    if not versions or not platform.startswith("linux_"):
        return platform  # another C library
    newest = max(*versions, OLDEST_GLIBC)[:2]
    return platform.replace("linux", "manylinux_{}_{}".format(*newest), 1)


def linked_readme(text: str, home: str) -> str:
    """`text` without links that are good in the repository alone.

    With `home`, the repository's address, they lead there; else the file's name is in words: PyPI
    shows no files, and the wheel installs docs/ in share/doc/vmm.
    """
    if home:
        return LINK.sub(lambda link: f"]({home}/blob/HEAD/{link[1]})", text)
    return re.sub(r"\[([^\]]*)" + LINK.pattern, r"\1", text)


def project_urls(name: str, home: str) -> dict[str, str]:
    """The project's addresses; PyPI's page is one that is there wherever the repository is."""
    page = f"https://pypi.org/project/{name}/"
    if not home:
        return {"Homepage": page, "Download": f"{page}#files"}
    return {
        "Homepage": home,
        "Documentation": f"{home}/tree/HEAD/docs",
        "Changelog": f"{home}/blob/HEAD/CHANGELOG.md",
        "Download": page,
    }
