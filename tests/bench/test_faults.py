"""A few tries of each attack of bench/faults.py, where its long runs make hundreds."""

from pathlib import Path

import pytest

from attack import Arena
from faults import ATTACKS

FEW = {
    "kill": 4, "signals": 9, "early-signals": 2, "failed-writes": 24, "full-disks": 4, "overwriting": 2, "copies": 2,
    "streams": 2, "cosmetic-calls": 2, "rivals": 2, "moving-data": 2, "cuts": 100, "checkpoints": 100,
    "data-sets": 100, "bytes": 100, "unicode": 200, "links": 20, "toml": 200, "command-lines": 200, "prompts": 12,
}  # fmt: skip
"""Tries of each; long ones are left to bench/faults.py, and lost processes to tests/training/test_processes.py."""


def test_every_attack_has_its_few_tries() -> None:
    assert ATTACKS.keys() - FEW.keys() == {"long-run", "day", "configs", "lost-process"}


@pytest.mark.parametrize("name", FEW)
def test_a_few_tries_of_each_attack_are_withstood(name: str, tmp_path: Path) -> None:
    tally = ATTACKS[name].run(Arena(tmp_path, seed=1), FEW[name])
    assert tally.troubles == []
    assert tally.tried >= FEW[name]
