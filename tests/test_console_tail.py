"""vmm.console.tail: the last output, and waiting for a line."""

from __future__ import annotations

import re
import threading

import pytest

from vmm.console.tail import ConsoleClosed, ConsoleTail


def later(action: object, *args: object) -> threading.Timer:
    timer = threading.Timer(0.05, action, args)  # type: ignore[arg-type]
    timer.start()
    return timer


def test_only_the_last_is_kept() -> None:
    tail = ConsoleTail(limit=100)
    for number in range(1000):
        tail.write(b"%04d\n" % number)
    assert tail.bytes() == b"".join(b"%04d\n" % number for number in range(980, 1000))
    assert tail.position == 5000
    assert len(tail._data) <= 200


def test_what_is_there_is_found_at_once_with_its_line() -> None:
    tail = ConsoleTail()
    tail.write(b"one\r\ncpus: 4 online\r\nthree")
    assert tail.wait_for("4 onl", timeout=0) == "cpus: 4 online"
    assert tail.wait_for("three", timeout=0) == "three"


@pytest.mark.parametrize(
    "pattern", ["log", b"log", re.compile(r"l.g\w+:"), re.compile(rb"^login", re.MULTILINE)]
)
def test_kinds_of_patterns(pattern: str | bytes | re.Pattern[str] | re.Pattern[bytes]) -> None:
    tail = ConsoleTail()
    tail.write("Grüße\nlogin: ".encode())
    assert tail.wait_for(pattern, timeout=0) == "login: "


def test_a_text_pattern_is_literal() -> None:
    tail = ConsoleTail()
    tail.write(b"a.b")
    with pytest.raises(TimeoutError):
        tail.wait_for("a..", timeout=0)


def test_a_dialogue_waits_after_the_last_match() -> None:
    tail = ConsoleTail()
    tail.write(b"# ")
    tail.wait_for("# ", timeout=0)
    with pytest.raises(TimeoutError):
        tail.wait_for("# ", timeout=0)
    assert tail.wait_for("# ", timeout=0, since=0) == "# "


def test_a_waiter_is_woken_by_output_in_pieces() -> None:
    tail = ConsoleTail()
    timers = [
        later(tail.write, b"rea"),
        later(tail.write, b""),
        threading.Timer(0.1, tail.write, (b"dy",)),
    ]
    timers[-1].start()
    assert tail.wait_for("ready", timeout=30) == "ready"
    for timer in timers:
        timer.join()


def test_several_waiters_all_wake() -> None:
    tail = ConsoleTail()
    got: list[str] = []
    threads = [
        threading.Thread(target=lambda word=word: got.append(tail.wait_for(word, 30, since=0)))
        for word in ("alpha", "beta", "gamma")
    ]
    for thread in threads:
        thread.start()
    for word in (b"gamma\n", b"alpha\n", b"beta\n"):
        tail.write(word)
    for thread in threads:
        thread.join()
    assert sorted(got) == ["alpha", "beta", "gamma"]


def test_a_time_out_tells_the_last_output() -> None:
    tail = ConsoleTail()
    tail.write(b"Kernel panic\n")
    with pytest.raises(TimeoutError, match=r"0.01 s passed without 'login' .*Kernel panic"):
        tail.wait_for("login", timeout=0.01)
    assert tail._waiters == []


def test_close_wakes_waiters() -> None:
    tail = ConsoleTail()
    timer = later(tail.close)
    with pytest.raises(ConsoleClosed, match="closed without 'never'"):
        tail.wait_for("never", timeout=30)
    timer.join()
    tail.write(b"the end")
    assert tail.wait_for("the end", timeout=0) == "the end", "found also after it closed"


def test_before_wait_lets_held_back_output_out() -> None:
    tail = ConsoleTail()
    held = [b"", b"", b"prompt$ "]
    tail.before_wait = lambda: tail.write(held.pop(0)) if held else None
    assert tail.wait_for("$ ", timeout=30) == "prompt$ "


def test_a_match_further_back_than_the_limit_does_not_break_waiting() -> None:
    tail = ConsoleTail(limit=16)
    tail.write(b"mark")
    tail.wait_for("mark", timeout=0)
    tail.write(b"x" * 100)
    tail.write(b"end")
    assert tail.wait_for("end", timeout=0).endswith("end")
