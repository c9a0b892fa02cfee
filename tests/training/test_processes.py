"""Several processes, with replicas or shards of the model, train as one process does and resume each other's runs."""

import os
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import train
from conftest import MODERN, ROOT, as_flags, count_rows, read_metrics, same_tensors, saved_step, tiny_settings, torchrun
from faults import child_pids
from glyphgpt import runtime
from glyphgpt.checkpoint import load_checkpoint
from glyphgpt.data.dataset import load_dataset
from glyphgpt.errors import UsageError, UserError, print_error
from glyphgpt.files import BEST, LAST
from glyphgpt.runtime import Runtime
from glyphgpt.settings import TrainSettings
from glyphgpt.training.metrics import METRICS
from harness import FORKSERVER

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

NETWORKS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "modern": {
        **MODERN, "optimizer": "muon", "n_embd": 12,  # 12, 50 rows and 25 characters: unequal shards
        "gradient_accumulation_steps": 3, "activation_checkpointing": True,  # 12 sequences are 6 or 3 for each process
    },
}  # fmt: skip


def train_runs(rank: int, world_size: int, log: Path, runs: list[TrainSettings]) -> None:
    """Train several runs in turn as one of several processes, as if torchrun had started it."""
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "GLOO_SECONDS", 0)
        for number, settings in enumerate(runs):
            store = dist.FileStore(f"{log}.store-{number}", world_size)  # type: ignore[attr-defined]
            rendezvous = store, rank, world_size
            patch.setattr(dist, "rendezvous", lambda _, rendezvous=rendezvous: iter([rendezvous]))
            try:
                train.main(settings)
            except UserError as error:
                os._exit(print_error(error))  # multiprocessing's own exit sometimes hangs after a lost process
    time.sleep(runtime.GLOO_SECONDS)


def start_processes(world_size: int, log: Path, runs: list[TrainSettings]) -> list[ForkServerProcess]:
    """Start processes that train these runs and write to `log`.out and `log`.err."""
    processes = []
    for rank in range(world_size):
        processes.append(FORKSERVER.Process(target=train_runs, args=(rank, world_size, log, runs), daemon=True))
        processes[-1].start()
    return processes


class Runs:
    """Runs of 12 steps. "a" and "b" are trained by one, then two, then four processes, with replicas or shards."""

    def __init__(self, data_dir: Path, folder: Path) -> None:
        self.data_dir, self.folder = data_dir, folder
        self.output: dict[int, tuple[str, str]] = {}
        """Standard output and error, by the number of processes."""

    def settings(self, network: str, name: str, max_steps: int = 12, **changes: object) -> TrainSettings:
        """Return the settings of a run up to `max_steps`."""
        values = {"eval_every": 3, "schedule": "constant", "weight_decay": 0.3, **NETWORKS[network], **changes}
        return tiny_settings(self.data_dir, self.folder / f"{network}-{name}", max_steps=max_steps, **values)

    def settings_for(self, world_size: int, network: str) -> list[TrainSettings]:
        """Return the settings of the runs that `world_size` processes train, in order."""
        if world_size == 1:
            return [self.settings(network, "one"), self.settings(network, "a", 3), self.settings(network, "b", 3)]
        kinds = ["ddp", "fsdp"] if world_size == 2 else ["fsdp", "ddp"]
        runs = [
            self.settings(network, name, 3 * world_size, resume=True, parallel=kind)
            for name, kind in zip("ab", kinds, strict=True)
        ]
        if world_size == 2:
            runs.append(self.settings(network, "fsdp2", parallel="fsdp"))
            runs += [self.settings(network, "resumed2", n, parallel="fsdp", resume=n > 5) for n in (5, 12)]
        return runs

    def long(self, name: str) -> TrainSettings:
        """Return the settings of a run that lasts long enough to be killed."""
        return tiny_settings(self.data_dir, self.folder / name, max_steps=100, eval_every=50, save_every=1)

    def bfloat16(self, name: str) -> TrainSettings:
        """Return the settings of a run in bfloat16."""
        return tiny_settings(self.data_dir, self.folder / name, dtype="bfloat16", parallel="fsdp")

    def timed(self, name: str) -> TrainSettings:
        """Return the settings of a run whose other settings the dial chooses."""
        folders = {"dataset": "small", "data_dir": str(self.data_dir), "out_dir": str(self.folder / name)}
        sizes = {"n_layer": 2, "n_embd": 16, "block_size": 16, "ngram_rows": 100}
        return TrainSettings.model_validate(
            {**folders, **sizes, "minutes": 10, "compile": False, "device": "cpu", "report": False}
        )

    def sampled(self, name: str, parallel: str = "ddp") -> TrainSettings:
        """Return the settings of a run that evaluates on samples, and on the whole split at the end."""
        sampling = {"eval_tokens": "auto", "max_steps": 60, "eval_every": 20}
        return tiny_settings(self.data_dir, self.folder / name, parallel=parallel, **sampling)

    def train(self, world_size: int) -> None:
        """Train the runs of `world_size` processes, and record their output."""
        runs = [settings for network in NETWORKS for settings in self.settings_for(world_size, network)]
        if world_size == 2:
            runs += [self.bfloat16("bfloat16-two"), self.timed("timed"), self.long("uninterrupted")]
            runs += [self.sampled(f"sampled-{parallel}", parallel) for parallel in ("ddp", "fsdp")]
        log = self.folder / f"log-{world_size}"
        processes = start_processes(world_size, log, runs)
        for process in processes:
            process.join(240)
        out, err = (Path(f"{log}.{name}").read_text(encoding="utf-8") for name in ("out", "err"))
        assert [process.exitcode for process in processes] == [0] * world_size, err
        self.output[world_size] = out, err


@pytest.fixture(scope="module")
def runs(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Train all runs."""
    runs = Runs(data_dir, tmp_path_factory.mktemp("runs"))
    for network in NETWORKS:
        for settings in runs.settings_for(1, network):
            train.main(settings)
    runs.train(2)
    runs.train(4)
    return runs


def wait_for_rows(out_dir: Path, rows: int, is_running: Callable[[], bool]) -> None:
    """Wait until a run has written `rows` rows of metrics, at most two minutes."""
    deadline = time.monotonic() + 120
    while count_rows(out_dir) < rows and is_running() and time.monotonic() < deadline:
        time.sleep(0.01)


def losses(out_dir: Path) -> dict[tuple[str, int], float]:
    return {(row["kind"], row["step"]): row["loss"] for row in read_metrics(out_dir)}


def assert_close_runs(one: Path, other: Path) -> None:
    for name in (BEST, LAST):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        for key in first:
            torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-5, msg=f"{name}: {key}")
    assert losses(one) == pytest.approx(losses(other), abs=1e-6)
    assert saved_step(one) == saved_step(other)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("run", ["fsdp2", "a", "b"])
def test_several_processes_train_as_one(runs: Runs, network: str, run: str) -> None:
    assert_close_runs(runs.folder / f"{network}-one", runs.folder / f"{network}-{run}")


@pytest.mark.parametrize("network", NETWORKS)
def test_sharded_run_resumes_exactly(runs: Runs, network: str) -> None:
    uninterrupted, resumed = (runs.folder / f"{network}-{name}" for name in ("fsdp2", "resumed2"))
    assert same_tensors(uninterrupted, resumed)
    assert losses(resumed).items() - losses(uninterrupted).items() == {(("val", 5), losses(resumed)["val", 5])}


@pytest.mark.parametrize("network", NETWORKS)
def test_one_process_resumes_a_sharded_run_of_four(runs: Runs, network: str) -> None:
    for name in ("one", "a"):
        train.main(runs.settings(network, name, 15, resume=True))
    assert_close_runs(runs.folder / f"{network}-one", runs.folder / f"{network}-a")


def test_bfloat16_differs_only_by_rounding(runs: Runs) -> None:
    train.main(runs.bfloat16("bfloat16-one"))
    assert losses(runs.folder / "bfloat16-one") == pytest.approx(losses(runs.folder / "bfloat16-two"), abs=3e-3)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_evaluate_the_sample_and_the_split_of_one(runs: Runs, parallel: str, tmp_path: Path) -> None:
    train.main(runs.sampled("one").model_copy(update={"out_dir": str(tmp_path)}))
    one, two = (
        [row for row in read_metrics(folder) if row["kind"] != "train"]
        for folder in (tmp_path, runs.folder / f"sampled-{parallel}")
    )
    assert [(row["kind"], row["step"]) for row in one] == [("val", 20), ("val", 40), ("val", 60), ("best", 60)]
    assert [row["kind"] for row in two] == [row["kind"] for row in one]
    for first, second in zip(one, two, strict=True):
        assert {**second, "kind": 0, "seconds": 0} == pytest.approx({**first, "kind": 0, "seconds": 0}, rel=1e-4)


def test_only_the_main_process_prints(runs: Runs) -> None:
    output, errors = runs.output[2]
    assert output.count(f"{runs.folder / 'bfloat16-two'}: ") == 1
    assert "bfloat16, 2 processes; 64 tokens a step" in output
    assert output.count("best validation loss") == len(NETWORKS) * 5 + 5
    assert not [line for line in errors.splitlines() if line.startswith("warning")]


def test_torchrun_restart_resumes_from_the_last_checkpoint(runs: Runs) -> None:
    killed, uninterrupted = runs.folder / "killed", runs.folder / "uninterrupted"
    flags = as_flags(runs.long("killed"))
    with torchrun(2, str(ROOT / "train.py"), *flags, flags=("--max-restarts=1",)) as process:
        wait_for_rows(killed, 20, lambda: process.poll() is None)
        rows = (killed / METRICS).read_bytes().splitlines()[:10]
        os.kill(child_pids(process.pid)[-1], signal.SIGKILL)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.count("all 100 steps done") == 1
    assert (killed / METRICS).read_bytes().splitlines()[:10] == rows, "the restart must not start a new run"
    assert same_tensors(uninterrupted, killed)
    assert losses(uninterrupted) == losses(killed)


def test_lost_process_is_an_error_of_the_others(data_dir: Path, tmp_path: Path) -> None:
    log, out_dir = tmp_path / "log", tmp_path / "run"
    settings = tiny_settings(data_dir, out_dir, max_steps=10**6, eval_every=50, save_every=1)
    first, second = start_processes(2, log, [settings])
    wait_for_rows(out_dir, 20, first.is_alive)
    second.kill()
    first.join(60)
    errors = Path(f"{log}.err").read_text(encoding="utf-8")
    assert first.exitcode == 1, errors
    assert "error: lost another process of this run, which ended or hangs; " in errors
    assert saved_step(out_dir) > 0


def test_batch_that_processes_cannot_divide_is_rejected(data_dir: Path, tmp_path: Path) -> None:
    settings = tiny_settings(data_dir, tmp_path / "run", batch_size=3)
    second = Runtime(torch.device("cpu"), torch.float32, rank=1, world_size=2)
    message = (
        "^2 processes cannot share 3 sequences evenly; change batch_size or gradient_accumulation_steps "
        "so that their product is a multiple of 2$"
    )
    with pytest.raises(UsageError, match=message):
        train.Trainer(settings, load_dataset(data_dir / "small", data_dir), second)
    assert not (tmp_path / "run").exists()


def test_processes_agree_on_the_settings_of_a_timed_run(runs: Runs) -> None:
    """Otherwise they would wait for each other for ever."""
    settings = load_checkpoint(runs.folder / "timed" / LAST).metadata.settings
    assert saved_step(runs.folder / "timed") == settings["max_steps"]
    assert settings["batch_size"] % 2 == 0
    assert "10 minutes for 5,400 tokens" in runs.output[2][0]
