"""What happens to a machine, a JSON object a line: `python examples/events.py KERNEL [INITRD ...]`.

Or of a file: `python examples/events.py machine.toml`.
"""

import json
import sys

from vmm import Machine, MachineConfig
from vmm.events import ConsoleLine, Panicked

kernel, *initrds = sys.argv[1:]
if kernel.endswith((".toml", ".json")):
    config = MachineConfig.load(kernel)
else:
    config = MachineConfig(kernel, initrds=initrds, append="quiet", timeout=300)
with Machine(config) as m:
    m.subscribe(lambda event: print("the guest panicked", file=sys.stderr), Panicked)
    events = m.events()
    m.start()
    begin = m.event_log[0].time
    for event in events:
        data = event.to_dict()
        data["time"] = round(event.time - begin, 6)
        print(json.dumps(data), flush=True)
        if isinstance(event, ConsoleLine) and "login:" in event.line:
            m.press_power_button()
sys.exit(m.wait().status)
