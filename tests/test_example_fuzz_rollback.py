"""examples/fuzz_rollback.py: it finds the input that crashes the guest."""

from __future__ import annotations

import pytest

from examples import fuzz_rollback

pytestmark = [pytest.mark.needs_kvm, pytest.mark.one_lane, pytest.mark.timeout(180)]


@pytest.mark.parametrize("seed", [1, 2])
def test_it_finds_the_crash(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz_rollback.main(seed) == fuzz_rollback.SECRET
    said = capsys.readouterr().out
    assert "reached 4: 'fuzz" in said
    assert "crash: 'fuzz!' after" in said
