"""Exits that end a machine, made readable."""

from __future__ import annotations

import os

from vmm.errors import KvmError
from vmm.kvm import constants
from vmm.kvm.ffi import ffi
from vmm.machine import exits
from vmm.machine.exits import MachineExit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.kvm import Vcpu
    from vmm.machine.machine import Machine
