"""The targets that are written in Python; those of the C path are in tests/fuzz/native.py."""

from __future__ import annotations

import importlib

from tests.fuzz.target import Target

MODULES = ("boot", "images", "agent", "peers", "data", "devices", "control")


def every() -> list[Target]:
    """All of them."""
    found: list[Target] = []
    for name in MODULES:
        found += importlib.import_module(f"tests.fuzz.targets.{name}").TARGETS
    return found


def names() -> list[str]:
    """Their names."""
    return [target.name for target in every()]


def find(name: str) -> Target:
    """The target of this name."""
    return next(target for target in every() if target.name == name)
