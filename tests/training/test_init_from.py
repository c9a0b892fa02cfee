"""Training that starts from the weights of another model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import MODERN, prepare_text, read_metrics, some_text, tiny_settings
from glyphgpt.cli import parse
from glyphgpt.errors import UsageError, UserError
from glyphgpt.settings import TrainSettings

NETWORK = ("n_layer", "n_head", "n_embd", "block_size", *MODERN)


def settings(data_dir: Path, out_dir: Path, named: str = "", **changes: Any) -> TrainSettings:
    """Return settings without those of the network, except the one named `named`."""
    values = tiny_settings(data_dir, out_dir, **changes).model_dump(exclude_unset=True)
    return TrainSettings.model_validate({key: values[key] for key in values if key not in NETWORK or key == named})


SINUSOIDAL = {"position": "sinusoidal", "init": "zero", "tie_embeddings": False}  # init determines embedding_scale


@pytest.mark.parametrize("network", [{}, MODERN, SINUSOIDAL], ids=["gpt2", "modern", "sinusoidal"])
def test_first_loss_is_best_loss_of_init_run(data_dir: Path, tmp_path: Path, network: dict[str, object]) -> None:
    train.main(tiny_settings(data_dir, tmp_path / "one", max_steps=40, learning_rate=0.01, **network))
    best = min(row["loss"] for row in read_metrics(tmp_path / "one") if row["kind"] == "val")
    train.main(settings(data_dir, tmp_path / "other", init_from=str(tmp_path / "one")))
    rows = [row["loss"] for row in read_metrics(tmp_path / "other") if row["kind"] == "val"]
    assert rows[0] == pytest.approx(best, abs=1e-6)
    assert rows[-1] != rows[0]
    saved = load_file(tmp_path / "other" / "last.safetensors")
    assert saved["model.token_embedding.weight"].shape == (saved["model.token_embedding.weight"].size(0), 16)


def test_resume_uses_own_checkpoint(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path / "one"))
    changes = {"init_from": str(tmp_path / "one"), "schedule": "constant", "named": "block_size"}
    for name, steps in (("straight", 20), ("resumed", 10)):
        train.main(settings(data_dir, tmp_path / name, max_steps=steps, **changes))
    (tmp_path / "one" / "best.safetensors").unlink()
    words = [str(tmp_path / "resumed" / "config.toml"), "--resume", "--max_steps=20"]
    resume_settings, _ = parse(TrainSettings, words, "", "", files=True)
    train.main(resume_settings)
    straight, resumed = (load_file(tmp_path / name / "last.safetensors") for name in ("straight", "resumed"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_block_size_may_be_smaller(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path / "one"))
    train.main(settings(data_dir, tmp_path / "two", named="block_size", block_size=8, init_from=str(tmp_path / "one")))
    one, two = (load_file(tmp_path / name / "best.safetensors") for name in ("one", "two"))
    assert (one["model.position.embedding.weight"].size(0), two["model.position.embedding.weight"].size(0)) == (16, 8)


@pytest.mark.parametrize(("name", "value"), [("block_size", 17), ("n_layer", 3), ("norm", "rmsnorm")])
def test_other_network_is_refused(data_dir: Path, tmp_path: Path, name: str, value: object) -> None:
    train.main(tiny_settings(data_dir, tmp_path / "one"))
    other = settings(data_dir, tmp_path / "two", named=name, init_from=str(tmp_path / "one"), **{name: value})
    with pytest.raises(UsageError, match=rf"^{name} = {value} differs from .* in .*; leave it out$"):
        train.main(other)
    assert not (tmp_path / "two").exists()


def test_other_vocabulary_and_missing_run_are_refused(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path / "one"))
    prepare_text(some_text(3000) + "é", tmp_path / "data")
    with pytest.raises(UserError, match="have different vocabularies"):
        train.main(settings(tmp_path / "data", tmp_path / "two", init_from=str(tmp_path / "one")))
    with pytest.raises(UserError, match=r"no such run or checkpoint$"):
        train.main(settings(data_dir, tmp_path / "two", init_from=str(tmp_path / "nothing")))
    assert not (tmp_path / "two").exists()


def test_run_can_restart_from_its_own_weights(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path, max_steps=40, learning_rate=0.01))
    best = min(row["loss"] for row in read_metrics(tmp_path) if row["kind"] == "val")
    train.main(settings(data_dir, tmp_path, init_from=str(tmp_path), overwrite=True))
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(best, abs=1e-6)


def test_resume_takes_network_from_run_and_not_from_init_model(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path / "one", **MODERN))
    started = settings(data_dir, tmp_path / "other", init_from=str(tmp_path / "one"), max_steps=10)
    train.main(started)
    shutil.rmtree(tmp_path / "one")
    train.main(started.model_copy(update={"resume": True, "max_steps": 20}))
    assert read_metrics(tmp_path / "other")[-1]["step"] == 20


def test_nanogpt_model_name_is_explained(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UsageError, match=r"^init_from = 'gpt2-xl' is nanoGPT's; .*openai-community/gpt2-xl --local-dir"
    ):
        train.main(settings(data_dir, tmp_path / "run", init_from="gpt2-xl"))
    train.main(tiny_settings(data_dir, tmp_path / "gpt2"))
    monkeypatch.chdir(tmp_path)
    train.main(settings(data_dir, tmp_path / "run", init_from="gpt2"))
