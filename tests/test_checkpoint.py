"""Checkpoints: exact, verified, never executed, never half-written."""

import errno
import hashlib
import json
import os
import pickle
import random
import stat
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from conftest import tiny_config, tiny_model
from glyphgpt import checkpoint as checkpoints
from glyphgpt.checkpoint import (
    Arrays,
    Checkpoint,
    Metadata,
    TrainState,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from glyphgpt.errors import UserError
from glyphgpt.files import BEST, LAST
from glyphgpt.training.optimizers import AdamW, Muon, Optimizer, set_learning_rate
from glyphgpt.training.torch_state import build_model, load_weights, model_arrays, optimizer_arrays, restore_optimizers
from model import GPT

INFO = Metadata(
    model=asdict(tiny_config()),
    tokenizer={"kind": "char", "characters": '\x00\n "\\abé\u2028\ufeff中🙂'},
    settings={
        "learning_rate": 0.1 + 0.2,
        "out_dir": "out/ü",
        "resume": True,
        "stop": None,
        "huge": 1.7976931348623157e308,
    },
    data="f" * 64,
    val_loss=1 / 3,
    state=TrainState(step=10**12 - 1, seconds=5e-324, best_loss=2 / 3, evaluations_since_best=2),
    scaler={"scale": 65536.0, "growth_factor": 2.1},
)
SMALL = Checkpoint(
    INFO, {"weight": np.array([[1.5, -2.0], [0.0, 3e-39]], dtype=np.float32), "bias": np.array([7, 8, 9])}
)


def seal(metadata: dict[str, str], tensors: dict[str, Any] | None = None, data: bytes = b"") -> bytes:
    """Build a file as the format's description says, byte by byte, with a correct checksum."""
    zeros = "0" * 64
    header = {"__metadata__": {"sha256": zeros, **metadata}, **(tensors or {})}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    whole = len(text).to_bytes(8, "little") + text + data
    return whole.replace(zeros.encode(), hashlib.sha256(whole).hexdigest().encode(), 1)


def assert_same(seen: Arrays, wanted: Arrays) -> None:
    assert seen.keys() == wanted.keys()
    for name, value in wanted.items():
        assert seen[name].dtype == value.dtype and seen[name].shape == value.shape
        assert seen[name].tobytes() == value.tobytes()


def train(model: GPT, optimizers: list[Optimizer], steps: range) -> None:
    for step in steps:
        tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(step))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def group(parameters: Iterable[nn.Parameter], weight_decay: float = 0.1) -> dict[str, Any]:
    return {"params": list(parameters), "weight_decay": weight_decay, "lr_scale": 1.0, "lr": 0.01}


def adamw(model: nn.Module) -> list[Optimizer]:
    return [AdamW([group(model.parameters())], (0.9, 0.99))]


def two_kinds(model: nn.Module) -> list[Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [Muon([group(matrices)]), AdamW([group(vectors[:3], 0.0), group([]), group(vectors[3:])], (0.9, 0.99))]


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = tiny_model()
    optimizers = adamw(model)
    train(model, optimizers, range(2))
    before = Checkpoint(INFO, model_arrays(model), optimizer_arrays(model, optimizers))
    save_checkpoint(before, tmp_path / LAST)
    after = load_checkpoint(tmp_path / LAST)
    assert after.metadata == INFO
    assert after.path == tmp_path / LAST
    assert_same(after.model, before.model)
    assert_same(after.optimizer, before.optimizer)
    assert len(after.optimizer) == 3 * len(before.model)  # AdamW: step and two means
    assert load_checkpoint(tmp_path / LAST, with_optimizer=False).optimizer == {}


@pytest.mark.parametrize("bits", ["float32", "float64", "float16", "int64", "uint8", "bool"])
def test_every_type_of_number_survives(tmp_path: Path, bits: str) -> None:
    values = np.random.default_rng(0).normal(size=(3, 4)).astype(bits)
    turned = values.T  # not contiguous
    save_checkpoint(
        Checkpoint(INFO, {"values": values, "turned": turned, "none": values[:0], "one": values[0, 0]}), tmp_path / BEST
    )
    assert_same(
        load_checkpoint(tmp_path / BEST).model,
        {"values": values, "turned": turned, "none": values[:0], "one": values[0, 0]},
    )


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_come_back(tmp_path: Path, number: float) -> None:
    info = INFO.model_copy(update={"val_loss": number, "state": TrainState(best_loss=number)})
    save_checkpoint(Checkpoint(info, SMALL.model), tmp_path / LAST)
    after = load_checkpoint(tmp_path / LAST).metadata
    assert (after.val_loss, after.state.best_loss) == pytest.approx((number, number), nan_ok=True)


def test_the_gradient_scaler_goes_on_from_its_state(tmp_path: Path) -> None:
    first, second = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.amp.GradScaler("cpu")
    info = Metadata.model_validate({**INFO.model_dump(), "scaler": first.state_dict()})
    save_checkpoint(Checkpoint(info, SMALL.model), tmp_path / LAST)
    second.load_state_dict(load_checkpoint(tmp_path / LAST).metadata.scaler)
    assert second.state_dict() == first.state_dict()

    model = nn.Linear(2, 1)
    (optimizer,) = adamw(model)
    second.scale(model(torch.ones(1, 2)).sum()).backward()
    second.step(optimizer)  # type: ignore[arg-type]
    second.update()
    assert second.state_dict()["_growth_tracker"] == 1


@pytest.mark.parametrize("make", [adamw, two_kinds])
def test_training_goes_on_bit_for_bit(tmp_path: Path, make: Callable[[nn.Module], list[Optimizer]]) -> None:
    straight = tiny_model(seed=1)
    train(straight, make(straight), range(6))

    first = tiny_model(seed=1)
    optimizers = make(first)
    train(first, optimizers, range(3))
    save_checkpoint(Checkpoint(INFO, model_arrays(first), optimizer_arrays(first, optimizers)), tmp_path / LAST)

    second = tiny_model(seed=2)
    optimizers = make(second)
    checkpoint = load_checkpoint(tmp_path / LAST)
    load_weights(second, checkpoint)
    restore_optimizers(second, optimizers, checkpoint)
    train(second, optimizers, range(3, 6))
    assert_same(model_arrays(second), model_arrays(straight))


def test_restoring_keeps_the_settings_of_the_optimizer() -> None:
    model = tiny_model()
    saved = adamw(model)
    train(model, saved, range(1))
    checkpoint = Checkpoint(INFO, model_arrays(model), optimizer_arrays(model, saved))
    optimizer = AdamW([group(model.parameters(), 0.25)], (0.5, 0.75))
    set_learning_rate([optimizer], 0.5)
    restore_optimizers(model, [optimizer], checkpoint)
    (kept,) = optimizer.param_groups
    assert (kept["lr"], kept["weight_decay"], optimizer.beta1, optimizer.beta2) == (0.5, 0.25, 0.5, 0.75)


def test_optimizer_state_of_something_else_is_refused() -> None:
    model = tiny_model()
    other = two_kinds(model)
    train(model, other, range(1))
    checkpoint = Checkpoint(INFO, model_arrays(model), optimizer_arrays(model, other), Path("x/last"))
    for state in (checkpoint, Checkpoint(INFO, model.state_dict(), {}, Path("x/last"))):
        with pytest.raises(UserError, match=r"x/last: .*optimizer"):
            restore_optimizers(model, adamw(model), state)


@pytest.mark.parametrize("change", [lambda array: array.astype(np.float64), lambda array: array[None], np.int32])
def test_optimizer_state_of_another_type_or_shape_is_refused(change: Callable[[Any], Any]) -> None:
    model = tiny_model()
    optimizer = adamw(model)
    train(model, optimizer, range(1))
    state = optimizer_arrays(model, optimizer)
    name = next(name for name in state if name.endswith("exp_avg_sq"))
    state[name] = change(state[name])
    with pytest.raises(UserError, match=r"x/last: .*optimizer"):
        restore_optimizers(model, adamw(model), Checkpoint(INFO, model_arrays(model), state, Path("x/last")))


@pytest.mark.parametrize(
    "change", [{"n_layer": 10**6}, {"ngram": 10**6}, {"block_size": 131_072, "position": "rotary"}], ids=str
)
def test_a_config_costs_nothing_that_its_weights_do_not_vouch_for(change: dict[str, Any]) -> None:
    info = INFO.model_copy(update={"model": {**INFO.model, **change}})
    checkpoint = Checkpoint(info, model_arrays(tiny_model()), path=Path("x/best"))
    tracemalloc.start()
    with pytest.raises(UserError):
        build_model(checkpoint)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


@pytest.mark.parametrize(
    "change", [{"step": -1}, {"step": 10**13}, {"seconds": -1.0}, {"evaluations_since_best": -1}], ids=str
)
def test_a_progress_that_cannot_be_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    info = INFO.model_copy(update={"state": INFO.state.model_copy(update=change)})
    save_checkpoint(Checkpoint(info, {}), tmp_path / BEST)
    with pytest.raises(UserError, match="its header does not describe a model"):
        load_checkpoint(tmp_path / BEST)


def test_the_model_alone_is_complete(tmp_path: Path) -> None:
    model = tiny_model(seed=5)
    save_checkpoint(Checkpoint(INFO, model_arrays(model)), tmp_path / BEST)
    made = build_model(load_checkpoint(tmp_path / BEST))
    assert made.config == model.config
    assert_same(model_arrays(made), model_arrays(model))


@pytest.mark.parametrize(
    "change",
    [
        {"n_embd": 32},
        {"n_layer": 3},
        {"n_layer": 1},
        {"n_head": 0},
        {"n_head": 3},
        {"vocab_size": 12},
        {"vocab_size": -1},
        {"block_size": 9},
        {"n_embd": 10**30},
        {"n_embd": "16"},
        {"n_embd": None},
        {"n_embd": 16.0},
        {"dropout": 2.0},
        {"dropout": []},
        {"tie_embeddings": False},
        {"tie_embeddings": 1},
        {"bias": False},
        {"position": "rotary"},
        {"position": "elsewhere"},
        {"norm": "rmsnorm"},
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_weights_is_refused(change: dict[str, Any]) -> None:
    info = INFO.model_copy(update={"model": {**INFO.model, **change}})
    with pytest.raises(UserError, match=r"^x/best: [^\n]*$"):
        build_model(Checkpoint(info, model_arrays(tiny_model()), path=Path("x/best")))


@pytest.mark.parametrize("key", INFO.model)
def test_a_config_without_one_of_its_keys_is_refused(key: str) -> None:
    config = {name: value for name, value in INFO.model.items() if name != key}
    with pytest.raises(UserError):
        build_model(Checkpoint(INFO.model_copy(update={"model": config}), model_arrays(tiny_model())))


def test_a_flipped_byte_anywhere_is_found(tmp_path: Path) -> None:
    path = tmp_path / LAST
    save_checkpoint(SMALL, path)
    whole = path.read_bytes()
    random_bits = random.Random(0)
    for place, byte in enumerate(whole):
        for mask in (0xFF, 1 << random_bits.randrange(8)):
            path.write_bytes(whole[:place] + bytes([byte ^ mask]) + whole[place + 1 :])
            with pytest.raises(UserError, match=r"^.*last\.safetensors: [^\n]*$"):
                load_checkpoint(path)
    path.write_bytes(whole)
    load_checkpoint(path)


def test_a_cut_at_any_length_is_found(tmp_path: Path) -> None:
    path = tmp_path / LAST
    save_checkpoint(SMALL, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"^.*last\.safetensors: [^\n]*$"):
            load_checkpoint(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_pickles_are_never_executed(tmp_path: Path, kind: str) -> None:
    path, sprung = tmp_path / BEST, tmp_path / "sprung"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Trap(sprung)))
    else:
        torch.save({"model": Trap(sprung)}, path)
    with pytest.raises(UserError, match="not a checkpoint of glyphgpt"):
        load_checkpoint(path)
    assert not sprung.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"To be, or not to be, that is the question.\n",
        b"\xff" * 8 + b"{}",
        (2**62).to_bytes(8, "little") + b'{"sha256":"' + b"0" * 64,
        (2).to_bytes(8, "little") + b"{}",
        (11).to_bytes(8, "little") + b'{"sha256":"',
        (15).to_bytes(8, "little") + b'{"sha256":"0"} ',
        safetensors.torch.save({"weight": torch.zeros(3)}),
        safetensors.torch.save({"weight": torch.zeros(3)}, {"sha256": "0" * 64}),
        seal({}),
        seal({}, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    ],
    ids=[
        "empty",
        "one byte",
        "text",
        "longest header",
        "header of exabytes",
        "no metadata",
        "header ends at the checksum",
        "short checksum",
        "foreign",
        "foreign with a wrong checksum",
        "sealed without info",
        "sealed tensor without info",
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / BEST
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^.*best\.safetensors: [^\n]*$"):
        load_checkpoint(path)


def test_a_folder_or_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such checkpoint$"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"cannot be read: \S"):
        load_checkpoint(tmp_path)


def test_the_format_is_as_described(tmp_path: Path) -> None:
    path = tmp_path / BEST
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path.write_bytes(seal({"glyphgpt": INFO.model_dump_json()}, {"model.x": tensor}, b"\0\0\x80\x3f"))
    assert load_checkpoint(path).metadata == INFO
    assert_same(load_checkpoint(path).model, {"x": np.array([1.0], dtype=np.float32)})


@pytest.mark.parametrize(
    "tensors",
    [
        {"model.x": {"dtype": "F32", "shape": [2**61], "data_offsets": [0, 2**63]}},
        {"model.x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        {"model.x": {"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 4]}},
        {"model.x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"model.x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"model.x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"model.x": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}},
        {"rng.x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
        {"model.x": "weights"},
    ],
    ids=lambda tensors: str(*tensors.values()),
)
def test_impossible_tensors_are_refused(tmp_path: Path, tensors: dict[str, Any]) -> None:
    path = tmp_path / BEST
    path.write_bytes(seal({"glyphgpt": INFO.model_dump_json()}, tensors, bytes(4)))
    with pytest.raises(UserError, match=r"^.*best\.safetensors: [^\n]*$"):
        load_checkpoint(path)


def info_with(**changes: object) -> str:
    return json.dumps({**INFO.model_dump(), **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "7",
        "{}",
        '{"format": 1}',
        "{" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        info_with(format="1"),
        info_with(format=None),
        info_with(format=True),
        info_with(model=[]),
        info_with(model={"n_layer": 1}, extra=1),
        info_with(tokenizer="char"),
        info_with(state={"step": "3"}),
        info_with(state={"step": 1.5}),
        info_with(state={"steps": 1}),
        info_with(scaler={"scale": "big"}),
        info_with(val_loss="low"),
        info_with(state=None),
        info_with(data=None),
        info_with().replace(str(INFO.state.step), "9" * 5000),
        *(
            json.dumps({k: v for k, v in INFO.model_dump().items() if k not in (key, "format")})
            for key in ("data", "state")
        ),
    ],
    ids=lambda text: text[:30],
)
def test_hostile_info_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / BEST
    path.write_bytes(seal({"glyphgpt": text}))
    with pytest.raises(UserError, match=r"^.*best\.safetensors: [^\n]*$"):
        load_checkpoint(path)


@pytest.mark.parametrize("depth", [50, 400, 900, 5000])
def test_deep_nesting_is_no_crash(tmp_path: Path, depth: int) -> None:
    path = tmp_path / BEST
    deep = '{"a":' * depth + "1" + "}" * depth
    path.write_bytes(seal({"glyphgpt": info_with(model="DEEP").replace('"DEEP"', deep)}))
    with pytest.raises(UserError):
        build_model(load_checkpoint(path))


def test_a_newer_format_says_to_update(tmp_path: Path) -> None:
    save_checkpoint(Checkpoint(INFO.model_copy(update={"format": 99}), SMALL.model), tmp_path / BEST)
    with pytest.raises(UserError, match=r"format 99\); update glyphgpt"):
        load_checkpoint(tmp_path / BEST)


def test_a_newer_format_may_hold_anything(tmp_path: Path) -> None:
    (tmp_path / BEST).write_bytes(seal({"glyphgpt": '{"format": 2, "new": {}}'}))
    with pytest.raises(UserError, match="update glyphgpt"):
        load_checkpoint(tmp_path / BEST)


@contextmanager
def full_disk_for_safetensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", fail)
        yield


@contextmanager
def full_disk_at_flush(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        yield


@contextmanager
def small_file_limit(_: pytest.MonkeyPatch) -> Iterator[None]:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("trouble", [full_disk_for_safetensors, full_disk_at_flush, small_file_limit])
@pytest.mark.parametrize("replacing", [True, False])
def test_a_failed_write_leaves_things_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Any, replacing: bool
) -> None:
    path = tmp_path / LAST
    if replacing:
        save_checkpoint(SMALL, path)
    newer = Checkpoint(INFO.model_copy(update={"data": "another"}), {"weight": np.ones(1000)})
    with pytest.raises(UserError, match=r"^.*last\.safetensors: could not be written: [^\n]*$"), trouble(monkeypatch):
        save_checkpoint(newer, path)
    assert [file.name for file in tmp_path.iterdir()] == ([LAST] if replacing else [])
    if replacing:
        assert load_checkpoint(path).metadata == INFO
    save_checkpoint(newer, path)
    assert load_checkpoint(path).metadata == newer.metadata


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.*last\.safetensors: could not be written"):
        save_checkpoint(SMALL, tmp_path / "gone" / LAST)


@pytest.mark.skipif(os.name != "posix", reason="folders are synced on POSIX only")
def test_a_folder_that_cannot_be_synced_is_no_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems answer EINVAL; the file is complete and in place by then."""
    sync = os.fsync

    def refuse_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    save_checkpoint(SMALL, tmp_path / LAST)
    assert load_checkpoint(tmp_path / LAST).metadata == INFO


def test_the_file_is_flushed_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, seen = os.fsync, []

    def watch(handle: int) -> None:
        seen.append((tmp_path / LAST).exists())
        sync(handle)

    monkeypatch.setattr(os, "fsync", watch)
    save_checkpoint(SMALL, tmp_path / LAST)
    assert seen[0] is False


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
@pytest.mark.parametrize(("folder", "file"), [(0o700, 0o600), (0o750, 0o640), (0o755, 0o644), (0o775, 0o664)])
def test_files_are_as_open_as_their_folder(tmp_path: Path, folder: int, file: int) -> None:
    tmp_path.chmod(folder)
    save_checkpoint(SMALL, tmp_path / LAST)
    assert stat.S_IMODE((tmp_path / LAST).stat().st_mode) == file


def test_find_prefers_the_best(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint in this folder; train first"):
        find_checkpoint(tmp_path)
    (tmp_path / LAST).touch()
    assert find_checkpoint(tmp_path) == tmp_path / LAST
    (tmp_path / BEST).touch()
    assert find_checkpoint(tmp_path) == tmp_path / BEST
    assert find_checkpoint(tmp_path / LAST) == tmp_path / LAST
    assert find_checkpoint(tmp_path / "else.safetensors") == tmp_path / "else.safetensors"
