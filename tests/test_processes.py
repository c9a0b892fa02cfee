"""Several processes, with copies or shards of the model, do what one does alone, and go on with each other's runs."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import MODERN, ROOT, as_flags, read_metrics, same_tensors, tiny_settings, torchrun
from faults import children
from glyphgpt import checkpoint as checkpoints
from glyphgpt.checkpoint import LAST
from glyphgpt.settings import TrainSettings

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without processes")

FORMS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "modern": {
        **MODERN, "optimizer": "muon", "n_embd": 12,  # 12, 50 rows and 25 characters: shards of unlike size
        "gradient_accumulation_steps": 3, "activation_checkpointing": True,  # 12 sequences, so 6 or 3 for each
    },
}  # fmt: skip
TRAIN_EACH = """
import json, os, sys
from pathlib import Path
import torch.distributed as dist
import train
from glyphgpt.settings import TrainSettings

rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
for number, settings in enumerate(json.loads(sys.argv[1])):  # torchrun's own store is good for one meeting
    store = dist.FileStore(str(Path(__file__).with_name(f"meeting-{world_size}-{number}")), world_size)
    dist.rendezvous = lambda _: iter([(store, rank, world_size)])
    train.main(TrainSettings.model_validate(settings))
"""


def run_train(processes: int, settings: TrainSettings) -> tuple[int, str, str]:
    """Train with several processes; return the exit status and what they said."""
    with torchrun(processes, str(ROOT / "train.py"), *as_flags(settings)) as process:
        said, errors = process.communicate(timeout=120)
    return process.returncode, said, errors


class Runs:
    """Runs of one to four processes, each of 12 steps, some of them handed from one to another."""

    def __init__(self, data_dir: Path, folder: Path) -> None:
        self.data_dir, self.folder = data_dir, folder

    def settings(self, form: str, name: str, steps: int = 12, **changes: object) -> TrainSettings:
        """Settings of one stretch of a run; a run that is there already is gone on with."""
        shape = {"eval_every": 3, "schedule": "constant", "weight_decay": 0.3, **FORMS[form], **changes}
        out_dir = self.folder / f"{form}-{name}"
        return tiny_settings(self.data_dir, out_dir, max_steps=steps, **shape)

    def stretches(self, processes: int, form: str) -> list[TrainSettings]:
        """All that so many processes do, in turn."""
        if processes == 1:
            return [self.settings(form, "one"), self.settings(form, "a", 3), self.settings(form, "b", 3)]
        both: list[dict[str, Any]] = [{"parallel": "ddp"}, {"parallel": "fsdp"}]
        straight = [self.settings(form, f"{kind['parallel']}{processes}", **kind) for kind in both]
        broken = [self.settings(form, f"resumed{processes}", n, **both[1], resume=n > 5) for n in (5, 12)]
        if processes == 4:
            both.reverse()
        handed = zip("ab", both, strict=True)
        return (
            straight + broken + [self.settings(form, run, 3 * processes, resume=True, **kind) for run, kind in handed]
        )

    def all_with(self, processes: int) -> None:
        """Do all that so many processes do, for every form."""
        work = [settings for form in FORMS for settings in self.stretches(processes, form)]
        plain = json.dumps([settings.model_dump() for settings in work])
        script = self.folder / "train_each.py"
        script.write_text(TRAIN_EACH)
        with torchrun(processes, str(script), plain) as process:
            _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def runs(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All runs; those named a and b went from one process to two and then four, by way of copies and of shards."""
    made = Runs(data_dir, tmp_path_factory.mktemp("runs"))
    for form in FORMS:
        for settings in made.stretches(1, form):
            train.main(settings)
    made.all_with(2)
    made.all_with(4)
    return made


def losses(out_dir: Path) -> dict[tuple[str, int], float]:
    return {(row["kind"], row["step"]): row["loss"] for row in read_metrics(out_dir)}


def assert_close_runs(one: Path, other: Path) -> None:
    for name in ("best.safetensors", "last.safetensors"):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        for key in first:
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-5, msg=f"{name}: {key}")
    assert losses(one) == pytest.approx(losses(other), abs=1e-6)
    steps = [checkpoints.load(folder / LAST).info.progress.step for folder in (one, other)]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("run", ["ddp2", "fsdp2", "ddp4", "fsdp4", "a", "b"])
def test_several_processes_follow_one(runs: Runs, form: str, run: str) -> None:
    assert_close_runs(runs.folder / f"{form}-one", runs.folder / f"{form}-{run}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("processes", [2, 4])
def test_a_sharded_run_resumes_exactly(runs: Runs, form: str, processes: int) -> None:
    straight, resumed = (runs.folder / f"{form}-{name}{processes}" for name in ("fsdp", "resumed"))
    assert same_tensors(straight, resumed)
    assert losses(resumed).items() >= losses(straight).items(), "and has a line of validation more, of step 5"


@pytest.mark.parametrize("form", FORMS)
def test_one_process_goes_on_with_shards_of_four(runs: Runs, form: str) -> None:
    train.main(runs.settings(form, "one", 15, resume=True))
    train.main(runs.settings(form, "fsdp4", 15, resume=True))
    assert_close_runs(runs.folder / f"{form}-one", runs.folder / f"{form}-fsdp4")


def test_one_process_speaks_for_all_in_bfloat16_too(data_dir: Path, tmp_path: Path) -> None:
    def settings(name: str) -> TrainSettings:
        return tiny_settings(data_dir, tmp_path / name, dtype="bfloat16", parallel="fsdp")

    train.main(settings("one"))
    status, said, errors = run_train(2, settings("two"))
    assert status == 0, errors
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=3e-3)
    assert said.count("step 0: validation") == 1
    assert "bfloat16, 2 processes; 64 tokens a step" in said
    assert not [line for line in errors.splitlines() if line.startswith("warning")]


def test_a_lost_process_is_replaced_and_the_run_goes_on_from_its_last_checkpoint(
    data_dir: Path, tmp_path: Path
) -> None:
    def settings(name: str) -> TrainSettings:
        return tiny_settings(data_dir, tmp_path / name, max_steps=300, eval_every=100, save_every=1)

    status, _, errors = run_train(2, settings("straight"))
    assert status == 0, errors
    metrics, patience = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 60
    with torchrun(2, str(ROOT / "train.py"), *as_flags(settings("killed")), flags=("--max-restarts=1",)) as process:
        while not (metrics.exists() and metrics.read_text().count("\n") > 30) and time.monotonic() < patience:
            time.sleep(0.01)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert said.count("step 0: validation") == 1, "it did not begin anew"
    assert same_tensors(tmp_path / "straight", tmp_path / "killed")
    assert losses(tmp_path / "straight") == losses(tmp_path / "killed")


def test_a_batch_that_cannot_be_shared_evenly_is_refused(data_dir: Path, tmp_path: Path) -> None:
    status, _, errors = run_train(2, tiny_settings(data_dir, tmp_path / "run", batch_size=3))
    assert status != 0
    assert (
        "error: 2 processes cannot share 3 sequences evenly; change batch_size or gradient_accumulation_steps "
        "so that their product is a multiple of 2"
    ) in errors
    assert not (tmp_path / "run").exists()
