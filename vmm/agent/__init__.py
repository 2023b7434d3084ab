"""Commands and files in a running guest, through a small agent that goes in with the kernel.

The agent (the C files here, compiled by `binary`) is process 1 for a moment: an initrd of its own
(`archive`) has it insert the modules that sockets need, start itself as a daemon, and go on as the
guest's own init. The host connects to it over the socket device (`link`), one connection a command:
`wire` is the protocol, `process` a running command, `pipes` its input and output, `copy` files
both ways.
"""
