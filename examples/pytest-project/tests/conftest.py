"""What is in every machine before its snapshot is taken."""

from collections.abc import Callable
from pathlib import Path

import pytest

from vmm import Machine

HITS = Path(__file__).parents[1] / "appliance" / "hits"


@pytest.fixture
def vmm_prepare() -> Callable[[Machine], None]:
    return install


def install(machine: Machine) -> None:
    machine.put(HITS, "/bin/hits")
