"""Checkpoints are exact, verified, never executed and never partially written."""

import errno
import hashlib
import json
import math
import os
import pickle
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from conftest import MODERN, SWITCHES, tiny_config, tiny_model
from glyphgpt.checkpoint import (
    Arrays,
    Checkpoint,
    Metadata,
    TrainState,
    check_weights,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    weight_shapes,
)
from glyphgpt.errors import UserError
from glyphgpt.files import BEST, LAST, META
from glyphgpt.settings import ModelConfig
from glyphgpt.training.torch_state import model_arrays

METADATA = Metadata(
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
    state=TrainState(step=10**12 - 1, seconds=5e-324, best_loss=2 / 3, evaluations_since_improvement=2),
    scaler={"scale": 65536.0, "growth_factor": 2.1},
)
ARRAYS: Arrays = {"weight": np.array([[1.5, -2.0], [0.0, 3e-39]], dtype=np.float32), "bias": np.array([7, 8, 9])}
SMALL = Checkpoint(METADATA, ARRAYS)
NETWORKS = [dict(zip(SWITCHES, values, strict=True)) for values in product(*SWITCHES.values())]
ONE_LINE = r"^.*\.safetensors: [^\n]*$"
"""An error message of one line that names the file."""


def checkpoint_bytes(metadata: dict[str, str], tensors: dict[str, Any] | None = None, data: bytes = b"") -> bytes:
    """Return the bytes of a file as the format's description says, with a correct checksum."""
    zeros = "0" * 64
    header = {"__metadata__": {"sha256": zeros, **metadata}, **(tensors or {})}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = len(text).to_bytes(8, "little") + text + data
    return content.replace(zeros.encode(), hashlib.sha256(content).hexdigest().encode(), 1)


def assert_same(arrays: Arrays, expected: Arrays) -> None:
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
        assert arrays[name].tobytes() == array.tobytes()


def test_round_trip_is_exact(tmp_path: Path) -> None:
    checkpoint = Checkpoint(METADATA, ARRAYS, {"AdamW.weight.step": np.array(3, np.float32)})
    save_checkpoint(checkpoint, tmp_path / LAST)
    loaded = load_checkpoint(tmp_path / LAST)
    assert loaded.metadata == METADATA
    assert loaded.path == tmp_path / LAST
    assert_same(loaded.model, checkpoint.model)
    assert_same(loaded.optimizer, checkpoint.optimizer)
    assert load_checkpoint(tmp_path / LAST, with_optimizer=False).optimizer == {}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "uint8", "bool"])
def test_every_dtype_and_layout_is_kept(tmp_path: Path, dtype: str) -> None:
    values = np.random.default_rng(0).normal(size=(3, 4)).astype(dtype)
    arrays = {"values": values, "not contiguous": values.T, "empty": values[:0], "scalar": values[0, 0]}
    save_checkpoint(Checkpoint(METADATA, arrays), tmp_path / BEST)
    assert_same(load_checkpoint(tmp_path / BEST).model, arrays)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_are_kept(tmp_path: Path, number: float) -> None:
    metadata = METADATA.model_copy(update={"val_loss": number, "state": TrainState(best_loss=number)})
    save_checkpoint(Checkpoint(metadata, ARRAYS), tmp_path / LAST)
    loaded = load_checkpoint(tmp_path / LAST).metadata
    assert (loaded.val_loss, loaded.state.best_loss) == pytest.approx((number, number), nan_ok=True)


@pytest.mark.parametrize(
    "change", [{"step": -1}, {"step": 10**13}, {"seconds": -1.0}, {"evaluations_since_improvement": -1}], ids=str
)
def test_invalid_state_is_rejected(tmp_path: Path, change: dict[str, Any]) -> None:
    metadata = METADATA.model_copy(update={"state": METADATA.state.model_copy(update=change)})
    save_checkpoint(Checkpoint(metadata, {}), tmp_path / BEST)
    with pytest.raises(UserError, match="its header does not describe a model"):
        load_checkpoint(tmp_path / BEST)


LOSSES = st.floats(0, 10, width=16)  # few enough values that some are equal


@given(st.lists(st.tuples(LOSSES, st.floats(0, 1, width=16))))
def test_recorded_losses_count_towards_patience_unless_they_improve_by_more_than_their_error(
    evaluations: list[tuple[float, float]],
) -> None:
    state, losses = TrainState(), [loss for loss, _ in evaluations]
    improvements = [(-1, math.inf)]
    for number, (loss, standard_error) in enumerate(evaluations):
        best = state.record(loss, standard_error)
        assert best == (loss < min(losses[:number], default=math.inf))
        if improvements[-1][1] - loss > standard_error:
            improvements.append((number, loss))
        assert state.evaluations_since_improvement == number - improvements[-1][0]
        assert state.improved_loss == improvements[-1][1]
    assert state.best_loss == min(losses, default=math.inf)
    assert TrainState.model_validate_json(state.model_dump_json()) == state


@given(st.lists(LOSSES))
def test_without_an_error_every_best_loss_is_an_improvement(losses: list[float]) -> None:
    state = TrainState()
    for loss in losses:
        assert state.record(loss, 0.0) == (state.evaluations_since_improvement == 0)
        assert state.improved_loss == state.best_loss


def test_many_small_improvements_add_up() -> None:
    """Losses are compared with the last improvement, not with the best loss so far."""
    state = TrainState()
    counts = []
    for loss in (3.0, 2.95, 2.91, 2.89, 2.95, 2.88):
        state.record(loss, 0.1)
        counts.append(state.evaluations_since_improvement)
    assert counts == [0, 1, 2, 0, 1, 2]
    assert (state.best_loss, state.improved_loss) == (2.88, 2.89)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: "-".join(map(str, network.values())))
def test_weight_shapes_are_those_of_the_model(network: dict[str, Any]) -> None:
    model = tiny_model(**network)
    config = ModelConfig(**asdict(model.config))
    assert weight_shapes(config) == {name: tensor.shape for name, tensor in model.state_dict().items()}


GPT2_CHANGES: list[dict[str, Any]] = [
    {"n_embd": 32}, {"n_embd": 10**30}, {"n_embd": "16"}, {"n_embd": None}, {"n_embd": 16.0}, {"n_layer": 3},
    {"n_layer": 1}, {"n_head": 0}, {"n_head": 3}, {"vocab_size": 12}, {"vocab_size": -1}, {"block_size": 9},
    {"dropout": 2.0}, {"dropout": []}, {"tie_embeddings": False}, {"tie_embeddings": 1}, {"bias": False},
    {"position": "rotary"}, {"position": "unknown"}, {"norm": "rmsnorm"}, {"extra": 1},
]  # fmt: skip
MODERN_CHANGES: list[dict[str, Any]] = [
    {"n_embd": 10**30}, {"n_layer": 3}, {"n_head": 3}, {"vocab_size": 12}, {"norm": "layernorm"}, {"ngram": 2},
    {"token_shift": False},
]  # fmt: skip


@pytest.mark.parametrize(
    ("network", "change"),
    [({}, change) for change in GPT2_CHANGES] + [(MODERN, change) for change in MODERN_CHANGES],
    ids=str,
)
def test_config_that_does_not_match_the_weights_is_rejected(network: dict[str, Any], change: dict[str, Any]) -> None:
    model = tiny_model(**network)
    metadata = METADATA.model_copy(update={"model": {**asdict(model.config), **change}})
    with pytest.raises(UserError, match=r"^x/best: [^\n]*$"):
        _ = Checkpoint(metadata, model_arrays(model), path=Path("x/best")).config


@pytest.mark.parametrize("key", METADATA.model)
def test_config_without_a_key_is_rejected(key: str) -> None:
    config = {name: value for name, value in METADATA.model.items() if name != key}
    with pytest.raises(UserError):
        _ = Checkpoint(METADATA.model_copy(update={"model": config}), model_arrays(tiny_model())).config


def test_weights_of_another_dtype_are_rejected() -> None:
    model = tiny_model()
    weights = {name: array.astype(np.float16) for name, array in model_arrays(model).items()}
    with pytest.raises(ValueError, match="float32"):
        check_weights(asdict(model.config), weights)


def test_any_changed_byte_is_detected(tmp_path: Path) -> None:
    path = tmp_path / LAST
    save_checkpoint(SMALL, path)
    content = path.read_bytes()
    rng = random.Random(0)
    for offset, byte in enumerate(content):
        for mask in (0xFF, 1 << rng.randrange(8)):
            path.write_bytes(content[:offset] + bytes([byte ^ mask]) + content[offset + 1 :])
            with pytest.raises(UserError, match=ONE_LINE):
                load_checkpoint(path)
    path.write_bytes(content)
    load_checkpoint(path)


def test_any_other_length_is_detected(tmp_path: Path) -> None:
    path = tmp_path / LAST
    save_checkpoint(SMALL, path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=ONE_LINE):
            load_checkpoint(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(path)


class CreatesFile:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_pickles_are_never_executed(tmp_path: Path, kind: str) -> None:
    path, created = tmp_path / BEST, tmp_path / "created"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(CreatesFile(created)))
    else:
        torch.save({"model": CreatesFile(created)}, path)
    with pytest.raises(UserError, match="not a checkpoint of glyphgpt"):
        load_checkpoint(path)
    assert not created.exists()


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
        safetensors.numpy.save({"weight": np.zeros(3)}),
        safetensors.numpy.save({"weight": np.zeros(3)}, {"sha256": "0" * 64}),
        checkpoint_bytes({}),
        checkpoint_bytes({}, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
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
        "no metadata of glyphgpt",
        "a tensor without metadata of glyphgpt",
    ],
)
def test_other_files_are_rejected(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / BEST
    path.write_bytes(content)
    with pytest.raises(UserError, match=ONE_LINE):
        load_checkpoint(path)


def test_missing_file_and_folder_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing: no such run or checkpoint$"):
        load_checkpoint(tmp_path / "missing")
    with pytest.raises(UserError, match=r"cannot be read: \S"):
        load_checkpoint(tmp_path)


def test_what_is_not_a_run_is_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^mine: no such run or checkpoint; did you mean out/mine\?$"):
        load_checkpoint(Path("mine"))
    (tmp_path / "texts" / "mine").mkdir(parents=True)
    (tmp_path / "texts" / "mine" / META).touch()
    with pytest.raises(
        UserError,
        match=r"^texts/mine is a dataset, not a run; .* --dataset=texts/mine --out_dir=out/mine ",
    ):
        find_checkpoint(Path("texts/mine"))


def test_format_is_as_documented(tmp_path: Path) -> None:
    path = tmp_path / BEST
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path.write_bytes(checkpoint_bytes({"glyphgpt": METADATA.model_dump_json()}, {"model.x": tensor}, b"\0\0\x80\x3f"))
    assert load_checkpoint(path).metadata == METADATA
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
def test_invalid_tensors_are_rejected(tmp_path: Path, tensors: dict[str, Any]) -> None:
    path = tmp_path / BEST
    path.write_bytes(checkpoint_bytes({"glyphgpt": METADATA.model_dump_json()}, tensors, bytes(4)))
    with pytest.raises(UserError, match=ONE_LINE):
        load_checkpoint(path)


def metadata_with(**changes: object) -> str:
    return json.dumps({**METADATA.model_dump(), **changes})


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
        metadata_with(format="1"),
        metadata_with(format=None),
        metadata_with(format=True),
        metadata_with(model=[]),
        metadata_with(model={"n_layer": 1}, extra=1),
        metadata_with(tokenizer="char"),
        metadata_with(state={"step": "3"}),
        metadata_with(state={"step": 1.5}),
        metadata_with(state={"steps": 1}),
        metadata_with(scaler={"scale": "big"}),
        metadata_with(val_loss="low"),
        metadata_with(state=None),
        metadata_with(data=None),
        metadata_with().replace(str(METADATA.state.step), "9" * 5000),
        *(
            json.dumps({k: v for k, v in METADATA.model_dump().items() if k not in (key, "format")})
            for key in ("data", "state")
        ),
    ],
    ids=lambda text: text[:30],
)
def test_invalid_metadata_is_rejected(tmp_path: Path, text: str) -> None:
    path = tmp_path / BEST
    path.write_bytes(checkpoint_bytes({"glyphgpt": text}))
    with pytest.raises(UserError, match=ONE_LINE):
        load_checkpoint(path)


@pytest.mark.parametrize("depth", [50, 400, 900, 5000])
def test_deeply_nested_metadata_is_rejected(tmp_path: Path, depth: int) -> None:
    path = tmp_path / BEST
    nested = '{"a":' * depth + "1" + "}" * depth
    path.write_bytes(checkpoint_bytes({"glyphgpt": metadata_with(model="NESTED").replace('"NESTED"', nested)}))
    with pytest.raises(UserError):
        _ = load_checkpoint(path).config


def test_newer_format_asks_for_an_update(tmp_path: Path) -> None:
    save_checkpoint(Checkpoint(METADATA.model_copy(update={"format": 99}), ARRAYS), tmp_path / BEST)
    with pytest.raises(UserError, match=r"format 99\); update glyphgpt"):
        load_checkpoint(tmp_path / BEST)


def test_newer_format_may_have_other_metadata(tmp_path: Path) -> None:
    (tmp_path / BEST).write_bytes(checkpoint_bytes({"glyphgpt": '{"format": 2, "new": {}}'}))
    with pytest.raises(UserError, match="update glyphgpt"):
        load_checkpoint(tmp_path / BEST)


@contextmanager
def full_disk_for_safetensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("glyphgpt.checkpoint.save_file", fail)
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


@pytest.mark.parametrize("fault", [full_disk_for_safetensors, full_disk_at_flush, small_file_limit])
@pytest.mark.parametrize("exists", [True, False])
def test_failed_write_leaves_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, exists: bool
) -> None:
    path = tmp_path / LAST
    if exists:
        save_checkpoint(SMALL, path)
    newer = Checkpoint(METADATA.model_copy(update={"data": "another"}), {"weight": np.ones(1000)})
    with pytest.raises(UserError, match=r"^.*last\.safetensors: could not be written: [^\n]*$"), fault(monkeypatch):
        save_checkpoint(newer, path)
    assert [file.name for file in tmp_path.iterdir()] == ([LAST] if exists else [])
    if exists:
        assert load_checkpoint(path).metadata == METADATA
    save_checkpoint(newer, path)
    assert load_checkpoint(path).metadata == newer.metadata


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing.*last\.safetensors: could not be written"):
        save_checkpoint(SMALL, tmp_path / "missing" / LAST)


@pytest.mark.skipif(os.name != "posix", reason="folders are synced on POSIX only")
def test_failed_folder_sync_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems return EINVAL. The file is complete and in place by then."""
    sync = os.fsync

    def fail_for_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fail_for_folders)
    save_checkpoint(SMALL, tmp_path / LAST)
    assert load_checkpoint(tmp_path / LAST).metadata == METADATA


def test_file_is_flushed_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, renamed = os.fsync, []

    def record(handle: int) -> None:
        renamed.append((tmp_path / LAST).exists())
        sync(handle)

    monkeypatch.setattr(os, "fsync", record)
    save_checkpoint(SMALL, tmp_path / LAST)
    assert renamed[0] is False


@pytest.mark.skipif(os.name != "posix", reason="permissions exist on POSIX only")
@pytest.mark.parametrize(("folder", "file"), [(0o700, 0o600), (0o750, 0o640), (0o755, 0o644), (0o775, 0o664)])
def test_files_have_the_permissions_of_their_folder(tmp_path: Path, folder: int, file: int) -> None:
    tmp_path.chmod(folder)
    save_checkpoint(SMALL, tmp_path / LAST)
    assert stat.S_IMODE((tmp_path / LAST).stat().st_mode) == file


def test_find_checkpoint_prefers_the_best(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint in this folder; train first"):
        find_checkpoint(tmp_path)
    (tmp_path / LAST).touch()
    assert find_checkpoint(tmp_path) == tmp_path / LAST
    (tmp_path / BEST).touch()
    assert find_checkpoint(tmp_path) == tmp_path / BEST
    assert find_checkpoint(tmp_path / LAST) == tmp_path / LAST
    assert find_checkpoint(tmp_path / "other.safetensors") == tmp_path / "other.safetensors"


@pytest.mark.parametrize("change", [{"n_layer": 10**6}, {"ngram": 10**6}], ids=str)
def test_config_with_huge_counts_is_rejected_at_once(change: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes of a million blocks or tables would take seconds and gigabytes."""
    monkeypatch.setattr("glyphgpt.checkpoint.weight_shapes", None)
    with pytest.raises(ValueError, match="the weights are not those of the config"):
        check_weights({**asdict(tiny_config()), **change}, model_arrays(tiny_model()))
