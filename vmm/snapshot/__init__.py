"""Snapshots: a machine's state and memory, taken, kept in a directory, and brought back."""

from __future__ import annotations
