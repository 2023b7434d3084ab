"""Helper programs in tests."""

from __future__ import annotations

from vmm.sandbox.helper import Confinement
from vmm.sandbox.landlock import handled

LOOSE = Confinement(
    [("/", handled(99))], programs=True, sockets=True, tcp=True, signals=True, environment=["HOME"]
)
"""For programs that are no helpers: what they do to files and processes is of no concern."""
