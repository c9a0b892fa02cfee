"""How processes share one model, as far as a single process can tell; tests/training/test_processes.py has several."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import train
from conftest import tiny_settings
from glyphgpt import runtime as runtimes
from glyphgpt.data.dataset import load_dataset
from glyphgpt.errors import UserError
from glyphgpt.runtime import Runtime, compile_or_eager
from glyphgpt.training.distributed import full, gather, gradient_sync, is_sharded, local, replicate_model, scatter

CPU = Runtime(torch.device("cpu"), torch.float32)

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without processes")


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


class Sharded(nn.Linear):
    """Has FSDP2's switch, and notes how it stood at each call."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.sync, self.seen = True, list[bool]()

    def set_requires_gradient_sync(self, sync: bool) -> None:
        self.sync = sync

    def unshard(self) -> None:
        """Mark it as FSDP2 does."""

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.sync)
        return self.weight.sum()


def test_gradients_are_exchanged_once_an_update(data_dir: Path, tmp_path: Path) -> None:
    settings = tiny_settings(data_dir, tmp_path, gradient_accumulation_steps=3)
    trainer = train.Trainer(settings, load_dataset(data_dir / "small", data_dir), CPU)
    trainer.forward = model = Sharded()
    for _ in range(2):
        trainer.backward(trainer.next_batch())
    assert model.seen == [False, False, True] * 2


@pytest.mark.usefixtures("alone")
def test_copies_are_exchanged_only_when_it_is_time() -> None:
    model: Any = replicate_model(nn.Linear(1, 1), CPU)
    with gradient_sync(model, now=False):
        assert not model.require_backward_grad_sync
    with gradient_sync(model, now=True):
        assert model.require_backward_grad_sync


def test_what_is_not_sharded_stays_as_it_is() -> None:
    tensor = torch.ones(3)
    assert not is_sharded(tensor)
    assert local(tensor) is full(tensor) is scatter(tensor, tensor) is gather(tensor, tensor) is tensor


def test_a_sharded_model_that_cannot_be_compiled_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"^torch.compile failed \(no C\+\+ compiler found\); add --compile=False$"):
        compile_or_eager(Sharded(), True, CPU, (torch.ones(1), torch.ones(1)))


def test_a_restart_does_not_see_what_processes_left_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(store, 0, 2)]))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    runtimes.rendezvous_store().set("address", "of a process that is lost")
    assert runtimes.rendezvous_store().check(["address"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not runtimes.rendezvous_store().check(["address"])
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")  # machines, which count restarts differently
    runtimes.rendezvous_store().set("address", "of mine")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "5")
    assert runtimes.rendezvous_store().check(["address"])
