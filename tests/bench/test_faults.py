"""A few trials of each fault of bench/faults.py."""

from pathlib import Path

import pytest

from faults import FAULTS
from harness import Workspace

TRIALS = {
    "kill": 2, "signals": 4, "early-signals": 1, "failed-writes": 6, "full-disk": 2, "overwrite": 1, "move-run": 1,
    "closed-streams": 1, "optional-calls": 1, "concurrent-runs": 1, "concurrent-prepare": 1, "corruption": 100,
    "forged-checkpoints": 100, "forged-datasets": 100, "random-bytes": 50, "random-unicode": 200, "random-links": 20,
    "random-toml": 200, "random-command-lines": 200, "unusual-prompts": 12,
}  # fmt: skip
"""Without the long ones, and without lost processes, which tests/training/test_processes.py tests."""


def test_every_fault_has_trials_here_or_takes_too_long() -> None:
    assert FAULTS.keys() - TRIALS.keys() == {"long-run", "random-sequences", "configs", "lost-process"}


@pytest.mark.parametrize("name", TRIALS)
def test_every_trial_of_a_fault_passes(name: str, tmp_path: Path) -> None:
    tally = FAULTS[name].run(Workspace(tmp_path, seed=1), TRIALS[name])
    assert tally.failures == []
    assert tally.trials >= TRIALS[name]
