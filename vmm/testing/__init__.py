"""Helpers for tests that boot guests: kernels to boot, and where to find them."""
