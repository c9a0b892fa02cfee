"""Loading a trained model: unusable checkpoints are one error that names the file, and the device decides the model."""

import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

import train
from conftest import tiny_settings
from glyphgpt.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from glyphgpt.errors import UsageError, UserError
from glyphgpt.files import BEST, LAST
from glyphgpt.inference.loading import language_model, open_checkpoint
from glyphgpt.inference.numpy_gpt import NumpyGPT
from glyphgpt.inference.torch_lm import TorchLM
from glyphgpt.runtime import Runtime
from glyphgpt.training.torch_state import build_model


@pytest.fixture(scope="module")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out_dir = tmp_path_factory.mktemp("run")
    train.main(tiny_settings(data_dir, out_dir, max_steps=2))
    return out_dir


@pytest.fixture(scope="module")
def checkpoint(run: Path) -> Checkpoint:
    return load_checkpoint(run / BEST)


def test_run_is_opened_at_its_best_checkpoint(run: Path, data_dir: Path) -> None:
    checkpoint, tokenizer = open_checkpoint(run, data_dir)
    assert checkpoint.path == run / BEST
    assert tokenizer.vocab_size == checkpoint.config.vocab_size
    checkpoint, _ = open_checkpoint(run / LAST, data_dir)
    assert (checkpoint.path, checkpoint.optimizer) == (run / LAST, {})


def damaged_files(content: bytes) -> dict[str, tuple[bytes, str]]:
    """Return unusable files by name: the bytes of each, and a part of the error message."""
    changed = bytearray(content)
    changed[-7] ^= 4
    return {
        "empty": (b"", "not a checkpoint of glyphgpt, or truncated"),
        "text": (b"Who's there?\n" * 100, "not a checkpoint of glyphgpt, or truncated"),
        "pickle": (b"\x80\x04\x95" + b"a" * 5000, "not a checkpoint of glyphgpt, or truncated"),
        "truncated header": (content[:300], "not a checkpoint of glyphgpt, or truncated"),
        "truncated weights": (content[:-1000], "damaged"),
        "changed": (bytes(changed), "damaged"),
        "longer": (content + b"more", "damaged"),
        "foreign": (save({"weight": np.ones(3)}), "not a checkpoint of glyphgpt"),
    }


def test_unusable_files_are_rejected(run: Path, data_dir: Path, tmp_path: Path) -> None:
    messages = {"missing": "no such run or checkpoint", "folder": "no checkpoint in this folder; train first"}
    (tmp_path / "folder").mkdir()
    for name, (content, message) in damaged_files((run / BEST).read_bytes()).items():
        (tmp_path / name).write_bytes(content)
        messages[name] = message
    for name, message in messages.items():
        with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path / name))}: [^\n]*{message}[^\n]*$") as caught:
            open_checkpoint(tmp_path / name, data_dir)
        assert caught.value.status == 1


def test_weights_that_are_not_finite_are_rejected(run: Path, data_dir: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(run / BEST)
    checkpoint.model["norm.weight"][3] = np.nan
    save_checkpoint(checkpoint, tmp_path / "nan")
    with pytest.raises(UserError, match=r"nan: some weights are not finite; use an earlier checkpoint$"):
        open_checkpoint(tmp_path / "nan", data_dir)


def test_tokenizer_of_another_size_is_rejected(run: Path, data_dir: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(run / BEST)
    checkpoint.metadata.tokenizer["characters"] = "abc"
    save_checkpoint(checkpoint, tmp_path / "other")
    with pytest.raises(UserError, match=r"other: its tokenizer and its network differ in vocabulary size$"):
        open_checkpoint(tmp_path / "other", data_dir)


@pytest.mark.parametrize(
    ("device", "driver", "expected"),
    [
        ("cpu", True, NumpyGPT),
        ("auto", False, NumpyGPT),
        pytest.param("auto", True, TorchLM, marks=pytest.mark.gpu),
        pytest.param("cuda", True, TorchLM, marks=pytest.mark.gpu),
    ],
)
def test_device_decides_the_model(
    checkpoint: Checkpoint, device: str, driver: bool, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glyphgpt.inference.loading.has_gpu_driver", lambda: driver)
    with language_model(checkpoint, device, "auto", "num_samples") as model:
        assert isinstance(model, expected)


def test_a_gpu_gets_converted_weights(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model, runtime = build_model(checkpoint), Runtime(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr("glyphgpt.inference.loading.torch_model", lambda *_: nullcontext((model, runtime)))
    with language_model(checkpoint, "cuda", "auto", "num_samples") as lm:
        assert isinstance(lm, TorchLM)
        assert lm.model.blocks[0].mlp.up.weight.dtype == lm.model.head.weight.dtype == torch.bfloat16
        assert lm.model.token_embedding.weight.dtype == torch.float32


@pytest.mark.parametrize(("tokens", "uses_gpu"), [(500, False), (10**9, True), (None, True)])
def test_auto_uses_a_gpu_unless_there_is_little_to_generate(
    checkpoint: Checkpoint, tokens: int | None, uses_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torch_model(*_: object) -> None:
        raise UserError("a GPU")

    monkeypatch.setattr("glyphgpt.inference.loading.has_gpu_driver", lambda: True)
    monkeypatch.setattr("glyphgpt.inference.loading.torch_model", torch_model)
    expected = pytest.raises(UserError, match="a GPU") if uses_gpu else nullcontext()
    with expected, language_model(checkpoint, "auto", "auto", "num_samples", tokens) as model:
        assert isinstance(model, NumpyGPT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_driver_without_a_gpu_uses_the_numpy_model(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glyphgpt.inference.loading.has_gpu_driver", lambda: True)
    with language_model(checkpoint, "auto", "auto", "num_samples") as model:
        assert isinstance(model, NumpyGPT)
    with (
        pytest.raises(UsageError, match=r"^device = 'cuda' is not on this machine; .*: auto, cpu"),
        language_model(checkpoint, "cuda", "auto", "num_samples"),
    ):
        pass


def test_out_of_memory_names_what_to_lower(checkpoint: Checkpoint) -> None:
    with (
        pytest.raises(UserError, match=r"^out of memory; lower num_samples$"),
        language_model(checkpoint, "cpu", "auto", "num_samples"),
    ):
        raise MemoryError
