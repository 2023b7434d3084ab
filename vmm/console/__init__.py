"""The host's end of a guest's serial console."""
