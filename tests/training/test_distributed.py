"""Sharing a model among processes, tested in one process; tests/training/test_processes.py starts several."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import train
from conftest import tiny_settings
from glyphgpt.data.dataset import load_dataset
from glyphgpt.errors import UserError
from glyphgpt.runtime import Runtime, compile_or_eager, rendezvous_store
from glyphgpt.training.distributed import full, gather, gradient_sync, is_sharded, local, replicate_model, scatter

CPU = Runtime(torch.device("cpu"), torch.float32)

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


@pytest.fixture
def process_group() -> Iterator[None]:
    """Initialize a process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


class Sharded(nn.Linear):
    """A module with FSDP2's methods that records at each call whether gradients would be synchronized."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.sync, self.calls = True, list[bool]()

    def set_requires_gradient_sync(self, sync: bool) -> None:
        self.sync = sync

    def unshard(self) -> None:
        """Exist, as in models that FSDP2 shards."""

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        self.calls.append(self.sync)
        return self.weight.sum()


def test_gradients_are_synchronized_once_per_update(data_dir: Path, tmp_path: Path) -> None:
    settings = tiny_settings(data_dir, tmp_path, gradient_accumulation_steps=3)
    trainer = train.Trainer(settings, load_dataset(data_dir / "small", data_dir), CPU)
    trainer.forward = model = Sharded()
    for _ in range(2):
        trainer.backward(trainer.next_batch())
    assert model.calls == [False, False, True] * 2


@pytest.mark.usefixtures("process_group")
def test_replicas_synchronize_gradients_only_when_asked() -> None:
    model: Any = replicate_model(nn.Linear(1, 1), CPU)
    with gradient_sync(model, now=False):
        assert not model.require_backward_grad_sync
    with gradient_sync(model, now=True):
        assert model.require_backward_grad_sync


def test_unsharded_tensors_are_returned_unchanged() -> None:
    tensor = torch.ones(3)
    assert not is_sharded(tensor)
    assert local(tensor) is full(tensor) is scatter(tensor, tensor) is gather(tensor, tensor) is tensor


def test_failed_compilation_of_a_sharded_model_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UserError, match=r"^torch.compile failed \(no C\+\+ compiler found\); add --compile=False$"):
        compile_or_eager(Sharded(), CPU, (torch.ones(1), torch.ones(1)))


def test_store_entries_of_each_restart_are_separate(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    monkeypatch.setattr(dist, "rendezvous", lambda _: iter([(store, 0, 2)]))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    rendezvous_store().set("address", "of a lost process")
    assert rendezvous_store().check(["address"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not rendezvous_store().check(["address"])
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")  # several machines count restarts differently
    rendezvous_store().set("address", "of this process")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "5")
    assert rendezvous_store().check(["address"])
