"""`make soak`: machines made, run and closed for half an hour, and two hundred alive at once.

See tests/soak/__main__.py.
"""

PATHS = ("raw", "throttled", "qcow2", "network", "vsock", "tree", "agent")
"""What data goes by in the soak under Linux."""
