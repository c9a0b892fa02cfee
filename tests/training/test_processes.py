"""Several processes, with copies or shards of the model, do what one does alone, and go on with each other's runs."""

import os
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import train
from conftest import MODERN, ROOT, as_flags, read_metrics, same_tensors, tiny_settings, torchrun
from faults import child_pids
from glyphgpt import checkpoint as checkpoints
from glyphgpt import runtime
from glyphgpt.data.dataset import load_dataset
from glyphgpt.errors import UsageError
from glyphgpt.files import LAST
from glyphgpt.runtime import Runtime
from glyphgpt.settings import TrainSettings
from harness import FORKSERVER

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without processes")

FORMS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "modern": {
        **MODERN, "optimizer": "muon", "n_embd": 12,  # 12, 50 rows and 25 characters: shards of unlike size
        "gradient_accumulation_steps": 3, "activation_checkpointing": True,  # 12 sequences, so 6 or 3 for each
    },
}  # fmt: skip


def train_each(rank: int, world_size: int, log: Path, work: list[TrainSettings]) -> None:
    """Do one run after another as one of several processes, as if torchrun had started it."""
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "GLOO_SECONDS", 0)
        for number, settings in enumerate(work):
            store = dist.FileStore(f"{log}.store-{number}", world_size)  # type: ignore[attr-defined]
            meeting = store, rank, world_size
            patch.setattr(dist, "rendezvous", lambda _, meeting=meeting: iter([meeting]))
            train.main(settings)
    time.sleep(runtime.GLOO_SECONDS)


def start_each(processes: int, log: Path, work: list[TrainSettings]) -> list[ForkServerProcess]:
    """Start so many of them, which write to `log`.out and `log`.err."""
    started = [FORKSERVER.Process(target=train_each, args=(rank, processes, log, work)) for rank in range(processes)]
    for process in started:
        process.start()
    return started


class Runs:
    """Runs of one to four processes, each of 12 steps, some of them handed from one to another."""

    def __init__(self, data_dir: Path, folder: Path) -> None:
        self.data_dir, self.folder = data_dir, folder
        self.said: dict[int, tuple[str, str]] = {}
        """What so many processes said, and what they complained of."""

    def settings(self, form: str, name: str, steps: int = 12, **changes: object) -> TrainSettings:
        """Settings of one stretch of a run; a run that is there already is gone on with."""
        shape = {"eval_every": 3, "schedule": "constant", "weight_decay": 0.3, **FORMS[form], **changes}
        out_dir = self.folder / f"{form}-{name}"
        return tiny_settings(self.data_dir, out_dir, max_steps=steps, **shape)

    def stretches(self, processes: int, form: str) -> list[TrainSettings]:
        """All that so many processes do, in turn."""
        if processes == 1:
            return [self.settings(form, "one"), self.settings(form, "a", 3), self.settings(form, "b", 3)]
        kinds = ("ddp", "fsdp")
        straight = [self.settings(form, f"{kind}{processes}", parallel=kind) for kind in kinds]
        handed = zip("ab", kinds if processes == 2 else reversed(kinds), strict=True)
        straight += [self.settings(form, run, 3 * processes, resume=True, parallel=kind) for run, kind in handed]
        if processes == 4:
            return straight
        broken = [self.settings(form, "resumed2", n, parallel="fsdp", resume=n > 5) for n in (5, 12)]
        return straight + broken

    def long(self, name: str) -> TrainSettings:
        """Settings of a run that is long enough to be killed within."""
        return tiny_settings(self.data_dir, self.folder / name, max_steps=100, eval_every=50, save_every=1)

    def half_precise(self, name: str) -> TrainSettings:
        """Settings of a run in bfloat16."""
        return tiny_settings(self.data_dir, self.folder / name, dtype="bfloat16", parallel="fsdp")

    def all_with(self, processes: int) -> None:
        """Do all that so many processes do, for every form."""
        work = [settings for form in FORMS for settings in self.stretches(processes, form)]
        if processes == 2:
            work += [self.half_precise("bfloat16-two"), self.long("undisturbed")]
        log = self.folder / f"log-{processes}"
        started = start_each(processes, log, work)
        for process in started:
            process.join(240)
        out, err = (Path(f"{log}.{name}").read_text(encoding="utf-8") for name in ("out", "err"))
        assert [process.exitcode for process in started] == [0] * processes, err
        self.said[processes] = out, err


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


def rows_written(out_dir: Path) -> int:
    metrics = out_dir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def losses(out_dir: Path) -> dict[tuple[str, int], float]:
    return {(row["kind"], row["step"]): row["loss"] for row in read_metrics(out_dir)}


def assert_close_runs(one: Path, other: Path) -> None:
    for name in ("best.safetensors", "last.safetensors"):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        for key in first:
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-5, msg=f"{name}: {key}")
    assert losses(one) == pytest.approx(losses(other), abs=1e-6)
    steps = [checkpoints.load_checkpoint(folder / LAST).metadata.state.step for folder in (one, other)]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("run", ["ddp2", "fsdp2", "ddp4", "fsdp4", "a", "b"])
def test_several_processes_follow_one(runs: Runs, form: str, run: str) -> None:
    assert_close_runs(runs.folder / f"{form}-one", runs.folder / f"{form}-{run}")


@pytest.mark.parametrize("form", FORMS)
def test_a_sharded_run_resumes_exactly(runs: Runs, form: str) -> None:
    straight, resumed = (runs.folder / f"{form}-{name}" for name in ("fsdp2", "resumed2"))
    assert same_tensors(straight, resumed)
    assert losses(resumed).items() >= losses(straight).items(), "and has a line of validation more, of step 5"


@pytest.mark.parametrize("form", FORMS)
def test_one_process_goes_on_with_shards_of_four(runs: Runs, form: str) -> None:
    train.main(runs.settings(form, "one", 15, resume=True))
    train.main(runs.settings(form, "fsdp4", 15, resume=True))
    assert_close_runs(runs.folder / f"{form}-one", runs.folder / f"{form}-fsdp4")


def test_bfloat16_differs_by_its_rounding(runs: Runs) -> None:
    train.main(runs.half_precise("bfloat16-one"))
    assert losses(runs.folder / "bfloat16-one") == pytest.approx(losses(runs.folder / "bfloat16-two"), abs=3e-3)


def test_one_process_speaks_for_all(runs: Runs) -> None:
    said, errors = runs.said[2]
    assert said.count(f"{runs.folder / 'bfloat16-two'}: ") == 1
    assert "bfloat16, 2 processes; 64 tokens a step" in said
    assert said.count("best validation loss") == len(FORMS) * 6 + 2
    assert not [line for line in errors.splitlines() if line.startswith("warning")]


def test_a_lost_process_is_replaced_and_the_run_goes_on_from_its_last_checkpoint(runs: Runs) -> None:
    killed, undisturbed = runs.folder / "killed", runs.folder / "undisturbed"
    patience = time.monotonic() + 120
    flags = as_flags(runs.long("killed"))
    with torchrun(2, str(ROOT / "train.py"), *flags, flags=("--max-restarts=1",)) as process:
        while rows_written(killed) < 20 and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.01)
        os.kill(child_pids(process.pid)[-1], signal.SIGKILL)
        said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert said.count("step 0: validation") == 1, "it did not begin anew"
    assert same_tensors(undisturbed, killed)
    assert losses(undisturbed) == losses(killed)


def test_the_others_end_when_a_process_is_lost_and_name_the_reason(runs: Runs) -> None:
    settings = runs.long("lost").model_copy(update={"max_steps": 10**6})
    log, out_dir, patience = runs.folder / "log-lost", Path(settings.out_dir), time.monotonic() + 120
    first, second = start_each(2, log, [settings])
    while rows_written(out_dir) < 20 and first.is_alive() and time.monotonic() < patience:
        time.sleep(0.01)
    second.kill()
    first.join(60)
    said = Path(f"{log}.err").read_text(encoding="utf-8")
    assert first.exitcode == 1, said
    assert "lost another process of this run, which ended or hangs; continue with --resume" in said
    assert checkpoints.load_checkpoint(out_dir / LAST).metadata.state.step > 0


def test_a_batch_that_cannot_be_shared_evenly_is_refused(data_dir: Path, tmp_path: Path) -> None:
    settings = tiny_settings(data_dir, tmp_path / "run", batch_size=3)
    second = Runtime(torch.device("cpu"), torch.float32, rank=1, world_size=2)
    said = (
        "^2 processes cannot share 3 sequences evenly; change batch_size or gradient_accumulation_steps "
        "so that their product is a multiple of 2$"
    )
    with pytest.raises(UsageError, match=said):
        train.Trainer(settings, load_dataset(data_dir / "small", data_dir), second)
    assert not (tmp_path / "run").exists()
