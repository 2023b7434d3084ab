"""`python -m vmm` is the same as `vmm`."""

from __future__ import annotations

from vmm.cli import command

command()
