"""Two machines on a network of their own."""

from collections.abc import Callable

from vmm import Machine


def test_they_hear_each_other(lan: Callable[..., list[Machine]]) -> None:
    one, two = lan(2)
    one.run(["ping", "-c", "2", "-W", "60", "10.0.0.2"], check=True, timeout=200)
    two.run(["ping", "-c", "2", "-W", "60", "10.0.0.1"], check=True, timeout=200)
