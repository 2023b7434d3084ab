"""Stop a machine when it prints TEXT, and look into it.

python examples/inspect_memory.py TEXT KERNEL [INITRD ...]
"""

import sys

from vmm import Machine, MachineConfig

text, kernel, *initrds = sys.argv[1:]
with Machine(MachineConfig(kernel, initrds=initrds, cpus=2)) as m:
    m.start()
    m.wait_for(text, timeout=300)
    m.pause()
    for vcpu in m.vcpus:
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
        print(f"vCPU {vcpu.number}: rip {regs.rip:#x} rsp {regs.rsp:#x} cr3 {sregs.cr3:#x}")
        gpa = vcpu.translate(sregs.cs.base + regs.rip)  # through the guest's page tables
        if gpa is not None and m.memory.contains(gpa, 16):
            print(f"    code at GPA {gpa:#x}: {m.memory.read(gpa, 16).hex(' ')}")
