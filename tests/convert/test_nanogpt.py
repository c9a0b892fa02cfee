"""Import from nanoGPT: checkpoints, datasets and configs, without executing anything in them."""

import os
import pickle
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from conftest import decoder_of, script, some_text
from glyphgpt import checkpoint as checkpoints
from glyphgpt.cli import resolve
from glyphgpt.convert import nanogpt
from glyphgpt.data.dataset import load_dataset
from glyphgpt.data.tokenizers import decode
from glyphgpt.errors import UsageError, UserError
from glyphgpt.settings import ConvertSettings, TrainSettings
from glyphgpt.training.torch_state import build_model

CHARACTERS = "\n !abcdefgé🙂"
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 12, "block_size": 8, "dropout": 0.0}


def make_reference(vocab_size: int, *, bias: bool) -> Any:
    """Return Hugging Face's GPT-2 with nanoGPT's activation, an independent implementation of the same network."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415  (takes seconds)

    torch.manual_seed(0)
    sizes: Any = {"n_layer": 2, "n_head": 2, "n_embd": 12, "n_positions": 8}
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, activation_function="gelu", **sizes))
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if name.endswith("bias") and not bias:
                parameter.zero_()
    return model


def write_checkpoint(model: Any, path: Path, *, bias: bool, prefix: str = "", vocab_size: int = 0) -> Path:
    """Save a model as nanoGPT does, which does not transpose linear layers as Hugging Face does."""
    transposed = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = {name: tensor.T if name.endswith(transposed) else tensor for name, tensor in model.state_dict().items()}
    if not bias:
        weights = {name: tensor for name, tensor in weights.items() if not name.endswith(".bias")}
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    arguments = {**SIZES, "bias": bias, "vocab_size": vocab_size or model.config.vocab_size}
    saved = {
        "model": {prefix + name: tensor.contiguous() for name, tensor in weights.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]},
        "model_args": arguments, "iter_num": 250, "best_val_loss": torch.tensor(1.5), "config": {"dataset": "x"},
    }  # fmt: skip
    torch.save(saved, path)
    return path


def write_meta(path: Path, characters: str = CHARACTERS, protocol: int = pickle.DEFAULT_PROTOCOL) -> Path:
    itos = dict(enumerate(characters))
    stoi = {character: token for token, character in itos.items()}
    path.write_bytes(pickle.dumps({"vocab_size": len(itos), "itos": itos, "stoi": stoi}, protocol))
    return path


def settings(**changes: object) -> ConvertSettings:
    return ConvertSettings.model_validate({key: str(value) for key, value in changes.items()})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_converted_checkpoint_has_same_logits(tmp_path: Path, prefix: str, bias: bool) -> None:
    model = make_reference(len(CHARACTERS), bias=bias)
    out = tmp_path / "out" / "best.safetensors"
    path = write_checkpoint(model, tmp_path / "ckpt.pt", bias=bias, prefix=prefix)
    message = nanogpt.convert_checkpoint(path, settings(meta=write_meta(tmp_path / "meta.pkl"), out=out))
    assert message.endswith(f"sample it: python sample.py {out}")
    converted = build_model(checkpoints.load_checkpoint(out)).eval()
    tokens = torch.randint(len(CHARACTERS), (3, 8))
    with torch.no_grad():
        expected = model(tokens).logits
        torch.testing.assert_close(converted(tokens), expected, rtol=0, atol=1e-5)
    decoder = decoder_of(converted)
    np.testing.assert_allclose(decoder.next_logits(tokens.numpy(), decoder.new_cache(3)), expected[:, -1], atol=1e-4)
    assert checkpoints.load_checkpoint(out).metadata.state.step == 250
    assert checkpoints.load_checkpoint(out).metadata.tokenizer == {"kind": "char", "characters": CHARACTERS}


def test_sample_reads_converted_checkpoint(tmp_path: Path) -> None:
    path = write_checkpoint(make_reference(len(CHARACTERS), bias=False), tmp_path / "ckpt.pt", bias=False)
    meta = write_meta(tmp_path / "meta.pkl")
    nanogpt.convert_checkpoint(path, settings(meta=meta, out=tmp_path / "best.safetensors"))
    done = script("sample.py", str(tmp_path / "best.safetensors"), "--max_new_tokens=20", "--device=cpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout) <= set(CHARACTERS + "-\n")


def test_padding_of_bpe_vocabulary_is_dropped(tmp_path: Path) -> None:
    model = make_reference(50304, bias=False)
    out = tmp_path / "best.safetensors"
    nanogpt.convert_checkpoint(write_checkpoint(model, tmp_path / "ckpt.pt", bias=False), settings(out=out))
    converted = build_model(checkpoints.load_checkpoint(out)).eval()
    tokens = torch.randint(50257, (1, 8))
    with torch.no_grad():
        torch.testing.assert_close(converted(tokens), model(tokens).logits[..., :50257], rtol=0, atol=1e-5)
    assert checkpoints.load_checkpoint(out).metadata.tokenizer == {"kind": "gpt2"}


class Evil:
    """An object that creates a file if it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("file", ["checkpoint", "meta"])
def test_pickles_are_not_executed(tmp_path: Path, file: str) -> None:
    path = write_checkpoint(make_reference(len(CHARACTERS), bias=False), tmp_path / "ckpt.pt", bias=False)
    meta, witness = write_meta(tmp_path / "meta.pkl"), tmp_path / "witness"
    if file == "checkpoint":
        saved = torch.load(path, weights_only=True)
        torch.save({**saved, "config": Evil(witness)}, path)
    else:
        meta.write_bytes(pickle.dumps({"itos": dict(enumerate(CHARACTERS)), "more": Evil(witness)}))
    with pytest.raises(UserError) as caught:
        nanogpt.convert_checkpoint(path, settings(meta=meta, out=tmp_path / "best.safetensors"))
    assert "\n" not in str(caught.value)
    assert not witness.exists()
    assert not (tmp_path / "best.safetensors").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("characters", [CHARACTERS, "".join(map(chr, range(32, 700)))], ids=len)
def test_vocabulary_of_any_pickle_protocol_is_read(tmp_path: Path, characters: str, protocol: int) -> None:
    assert nanogpt.read_meta_pickle(write_meta(tmp_path / "meta.pkl", characters, protocol)).characters == characters


@hypothesis_settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_vocabulary_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = write_meta(tmp_path_factory.getbasetemp() / "meta.pkl", protocol=data.draw(st.sampled_from([2, 4])))
    content = bytearray(path.read_bytes())
    for offset, byte in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)))):
        content[offset] = byte
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        nanogpt.read_meta_pickle(path)
    except UserError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: saved.update(model=[torch.ones(3)]), "not a nanoGPT checkpoint"),
        (lambda saved: saved.pop("model_args"), "not a nanoGPT checkpoint"),
        (lambda saved: saved["model"].pop("lm_head.weight"), "not a nanoGPT checkpoint"),
        (lambda saved: saved["model"].update({"other.weight": torch.ones(3)}), "not a nanoGPT checkpoint"),
        (lambda saved: saved["model_args"].update(n_layer=10**9), "not a nanoGPT checkpoint"),
        (lambda saved: saved["model_args"].update(n_embd="12"), "not a nanoGPT checkpoint"),
        (lambda saved: saved.update(iter_num=float("inf")), "not a nanoGPT checkpoint"),
        (lambda saved: saved.update(iter_num=-1), "not a nanoGPT checkpoint"),
        (lambda saved: saved["model_args"].update(vocab_size=11), "12 characters, but the model has 11 tokens"),
    ],
)
def test_inconsistent_checkpoint_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = write_checkpoint(make_reference(len(CHARACTERS), bias=False), tmp_path / "ckpt.pt", bias=False)
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)
    with pytest.raises(UserError, match=message):
        nanogpt.convert_checkpoint(
            path, settings(meta=write_meta(tmp_path / "meta.pkl"), out=tmp_path / "x.safetensors")
        )
    assert not (tmp_path / "x.safetensors").exists()


def test_missing_and_existing_files_are_reported(tmp_path: Path) -> None:
    path = write_checkpoint(make_reference(len(CHARACTERS), bias=False), tmp_path / "ckpt.pt", bias=False)
    with pytest.raises(UsageError, match=r"^the output has no path; add one, for example --out="):
        nanogpt.convert_checkpoint(path, settings())
    with pytest.raises(UserError, match=r"^a model of 12 tokens needs its vocabulary; add --meta="):
        nanogpt.convert_checkpoint(path, settings(out=tmp_path / "best.safetensors"))
    with pytest.raises(UsageError, match="exists already"):
        nanogpt.convert_checkpoint(path, settings(out=path))
    for name in ("missing.pt", "meta.pkl"):
        write_meta(tmp_path / "meta.pkl")
        with pytest.raises(UserError, match=rf"^{tmp_path / name}: "):
            nanogpt.convert_checkpoint(tmp_path / name, settings(out=tmp_path / "best.safetensors"))


def write_nanogpt_data(folder: Path, text: str) -> None:
    folder.mkdir()
    characters = "".join(sorted(set(text)))
    write_meta(folder / "meta.pkl", characters)
    ids = np.array([characters.index(character) for character in text], dtype="<u2")
    ids[: len(ids) * 9 // 10].tofile(folder / "train.bin")
    ids[len(ids) * 9 // 10 :].tofile(folder / "val.bin")


def test_character_dataset_decodes_to_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nanogpt, "CHUNK_TOKENS", 100)
    text = some_text(1000) + "é🙂"
    write_nanogpt_data(tmp_path / "mine", text)
    nanogpt.convert_dataset(tmp_path / "mine", settings(data_dir=tmp_path / "data"))
    dataset = load_dataset(tmp_path / "data" / "mine", tmp_path / "data")
    texts = [decode(dataset.tokenizer, split.slice(0, split.tokens)) for split in (dataset.train, dataset.val)]
    assert "".join(texts) == text
    assert (dataset.train.characters, dataset.val.characters) == (len(texts[0]), len(texts[1]))
    assert dataset.train.dtype == np.uint8


def test_bpe_dataset_counts_characters(gpt2_data_dir: Path, tmp_path: Path) -> None:
    from glyphgpt.data.tokenizers import GPT2Tokenizer  # noqa: PLC0415

    text = some_text(1000) + "é🙂字"
    (tmp_path / "mine").mkdir()
    for name in ("train", "val"):
        GPT2Tokenizer(gpt2_data_dir).encode(text).tofile(tmp_path / "mine" / f"{name}.bin")
    nanogpt.convert_dataset(tmp_path / "mine", settings(data_dir=gpt2_data_dir, name="nanogpt"))
    dataset = load_dataset(gpt2_data_dir / "nanogpt", gpt2_data_dir)
    assert decode(dataset.tokenizer, dataset.train.slice(0, dataset.train.tokens)) == text
    assert dataset.train.characters == len(text)


@pytest.mark.parametrize("name", ["..", "../x", "downloads", "a/b"])
def test_dataset_name_cannot_leave_data_folder(tmp_path: Path, name: str) -> None:
    write_nanogpt_data(tmp_path / "mine", some_text(1000))
    with pytest.raises(UsageError, match="--name="):
        nanogpt.convert_dataset(tmp_path / "mine", settings(data_dir=tmp_path / "data", name=name))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("val.bin", None, "val.bin: no such file"),
        ("val.bin", b"\0\0\0", "3 bytes are not two or more ids"),
        ("val.bin", b"\0\0", "2 bytes are not two or more ids"),
        ("train.bin", b"\0\0\xff\0", "id 255 is not in the vocabulary of"),
        ("meta.pkl", b"", "not a nanoGPT character vocabulary"),
    ],
)
def test_invalid_dataset_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    write_nanogpt_data(tmp_path / "mine", some_text(1000))
    if content is None:
        (tmp_path / "mine" / name).unlink()
    else:
        (tmp_path / "mine" / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        nanogpt.convert_dataset(tmp_path / "mine", settings(data_dir=tmp_path / "data"))
    assert not list((tmp_path / "data").glob("*"))


CONFIG = '''
"""A config."""
import time
out_dir = 'out-mine'
eval_interval = 250  # a comment
eval_iters = 20
batch_size = 4 * 3
block_size = 64
max_iters = 2_000
lr_decay_iters = max_iters
learning_rate = 1e-3
min_lr = learning_rate / 10
weight_decay = -1 * -0.5
compile = False
wandb_log = False
wandb_run_name = 'mine' + str(time.time())
eval_only = True
n_layer = 4
'''


def convert_config(folder: Path, text: str, **changes: object) -> tuple[TrainSettings, str]:
    (folder / "mine.py").write_text(text)
    out = folder / "out.toml"
    nanogpt.convert_config(folder / "mine.py", settings(out=out, **changes))
    toml = out.read_text(encoding="utf-8")
    return resolve(TrainSettings, [("out.toml", tomllib.loads(toml))]), toml


def test_config_is_converted_to_toml(tmp_path: Path) -> None:
    result, toml = convert_config(tmp_path, CONFIG)
    assert (result.out_dir, result.eval_every, result.batch_size, result.max_steps) == ("out-mine", 250, 12, 2000)
    assert (result.learning_rate, result.min_lr, result.weight_decay) == (1e-3, 1e-4, 0.5)
    assert (result.compile, result.wandb, result.activation, result.schedule) == (False, False, "gelu_erf", "cosine")
    assert result.eval_tokens == 20 * 12 * 64
    assert (result.n_layer, result.n_head, result.beta2) == (4, 12, 0.95), "other settings have nanoGPT's defaults"
    assert "# not converted: eval_only: use --eval_only\n" in toml
    assert "# not converted: wandb_run_name: there is no such setting\n" in toml


def test_constant_learning_rate_is_converted(tmp_path: Path) -> None:
    result, toml = convert_config(tmp_path, "decay_lr = False\nlr_decay_iters = 5\nlearning_rate = 3e-5\n")
    assert (result.schedule, result.min_lr, result.warmup_steps) == ("constant", 3e-5, 0)
    assert "lr_decay_iters" not in toml
    _, toml = convert_config(tmp_path, "max_iters = 10\n", overwrite=True)
    assert "# not converted: lr_decay_iters: " in toml, "nanoGPT's default is 600,000 for any max_iters"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_layer = ", "not a Python file"),
        ("n_layer = open('x')", "line 1: neither a number, text nor arithmetic with numbers; write the value itself"),
        ("import os\nos.remove('x')", "line 2 is not a setting; write it as key = value"),
        ("n_layer = 'six' * 3", "line 1: six is not a number"),
        ("n_layer = 1 / 0", "line 1: division by zero"),
        ("n_layer = " + "1 + " * 900 + "1", "an expression is nested too deeply"),
        ("n_layer = " + "-" * 100_000 + "1", "an expression is nested too deeply"),
        ("n_layer = 10**9", "line 1: neither a number"),
        ("n_layer = 9999999999999999999 * 9999999999999999999", "is not a number within 10^18"),
        ("n_layer = -1", "'n_layer' must be a whole number, at least 1, not -1"),
        ("n_layer = unknown", "line 1: neither a number"),
        ("batch_size = 'x'", "batch_size: x is not a number"),
        ("learning_rate = 1" + "0" * 400, "is not a number within 10^18"),
        ("n_layer = 'x'", "'n_layer' must be a whole number"),
    ],
)
def test_invalid_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        convert_config(tmp_path, text)
    assert message in str(caught.value)
    assert not (tmp_path / "out.toml").exists()
