"""Boot a kernel from Python: `python examples/boot.py KERNEL INITRD`."""

import sys

from vmm import Machine, MachineConfig

config = MachineConfig(sys.argv[1], initrds=sys.argv[2:], cpus=2, append="quiet", timeout=120)
with Machine(config) as m:
    m.start()
    print("the guest says:", m.wait_for("facts: ", timeout=120))
    m.wait()
    print("ended:", m.exit)
