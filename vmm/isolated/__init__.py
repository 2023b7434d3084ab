"""Machines in child processes of their own: `Machine(config, isolate=True)`.

    program                              zygote                    machine's process
    IsolatedMachine (machine.py)  ---->  forks (zygote.py)  ---->  Machine, served (server.py)
         |        a call a connection: wire.py                          |
         +--------------------------------------------------------------+
         |        events and console output: stream.py                  |
         +--------------------------------------------------------------+

The program's side trusts nothing that comes from the machine's process: frames are bounded, every
answer's shape is checked, every wait has an end. No pickle: see `wire`.
"""
