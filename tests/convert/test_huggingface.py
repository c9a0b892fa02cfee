"""Import from and export to Hugging Face's transformers, with the same logits and ids."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import train
from conftest import contents, decoder_of, prepare_text, read_metrics, script, some_text, tiny_model
from glyphgpt import checkpoint as checkpoints
from glyphgpt.convert import from_huggingface, to_huggingface
from glyphgpt.convert.common import make_checkpoint
from glyphgpt.data.bpe import learn_bpe
from glyphgpt.data.dataset import load_dataset
from glyphgpt.data.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, RecordTokenizer, Tokenizer
from glyphgpt.errors import UsageError, UserError
from glyphgpt.inference.generate import SamplingParams, generate
from glyphgpt.settings import ConvertSettings, TrainSettings
from glyphgpt.training.torch_state import build_model, model_arrays
from model import GPT

os.environ["HF_HUB_OFFLINE"] = "1"  # set before transformers is imported; the tests download nothing

CHARACTERS = "".join(sorted("\0\t\n\r '<>abcdé\u0301\u200d\u2028字🙂👩"))
SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 12, "n_positions": 16}
GREEDY = SamplingParams(temperature=0)


def settings(**changes: object) -> ConvertSettings:
    return ConvertSettings.model_validate({key: str(value) for key, value in changes.items()})


def randomize(model: Any, std: float = 0.3) -> Any:
    """Set every parameter to random values, because zeros and ones hide mistakes."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model.eval()


def make_hf_model(**changes: Any) -> Any:
    """Return transformers' GPT-2 with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415  (takes seconds)

    return randomize(GPT2LMHeadModel(GPT2Config(**{**SIZES, "vocab_size": 256, **changes})))


def save_byte_model(folder: Path, **changes: Any) -> Any:
    """Save transformers' GPT-2 with a byte tokenizer; return the model."""
    model = make_hf_model(**changes)
    model.save_pretrained(folder)
    to_huggingface.write_json(folder / "tokenizer.json", to_huggingface.tokenizer_json(ByteTokenizer(), Path()))
    return model


def save_our_model(path: Path, tokenizer: Tokenizer, **changes: Any) -> GPT:
    """Save a checkpoint of ours with random weights; return the model."""
    model: GPT = randomize(tiny_model(**{"vocab_size": tokenizer.vocab_size, "block_size": 16, **changes}))
    checkpoint = make_checkpoint(asdict(model.config), model_arrays(model), tokenizer.to_dict())
    checkpoints.save_checkpoint(checkpoint, path)
    return model


def load_hf(folder: Path) -> tuple[Any, Any]:
    """Load a model and its tokenizer as users of transformers do."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def assert_same_logits(model: Any, hf_model: Any, vocab_size: int, T: int = 16) -> None:
    tokens = torch.randint(vocab_size, (3, T))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf_model(tokens).logits, rtol=0, atol=1e-5)


ACTIVATIONS = [("gelu_new", "gelu"), ("gelu_pytorch_tanh", "gelu"), ("gelu", "gelu_erf"), ("relu2", "relu2")]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("activation", "ours"), ACTIVATIONS)
def test_imported_model_has_same_logits(tmp_path: Path, activation: str, ours: str, tied: bool) -> None:
    model = save_byte_model(tmp_path / "hf", activation_function=activation, tie_word_embeddings=tied)
    out = tmp_path / "out" / "best.safetensors"
    message = from_huggingface.convert_model(tmp_path / "hf", settings(out=out))
    assert message.endswith(f"byte tokens; sample it: python sample.py {out}")
    converted = build_model(checkpoints.load_checkpoint(out)).eval()
    assert (converted.config.activation, converted.config.tie_embeddings) == (ours, tied)
    assert_same_logits(converted, model, 256)


def save_shards(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    names = list(weights)
    shards = {"model-1.safetensors": names[:10], "model-2.safetensors": names[10:]}
    for file, shard in shards.items():
        save_file({name: weights[name] for name in shard}, folder / file)
    index = {"weight_map": {name: file for file, shard in shards.items() for name in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def change_weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")

    return apply


def without_prefix(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename weights as in the published gpt2, and add its causal masks."""
    masks = {f"h.{i}.attn.{name}": torch.ones(1, 1, 16, 16) for i in range(2) for name in ("bias", "masked_bias")}
    return {name.removeprefix("transformer."): weight for name, weight in weights.items()} | masks


@pytest.mark.parametrize(
    "change",
    [
        change_weights(without_prefix),
        change_weights(lambda weights: weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()}),
        lambda folder: save_shards(folder, load_file(folder / "model.safetensors")),
    ],
    ids=["published", "duplicate head", "sharded"],
)
def test_other_file_layouts_are_read(tmp_path: Path, change: Callable[[Path], None]) -> None:
    model = save_byte_model(tmp_path)
    change(tmp_path)
    imported = from_huggingface.read_model(tmp_path, tmp_path)
    assert imported.metadata.model["tie_embeddings"] is True
    assert_same_logits(build_model(imported).eval(), model, 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_to_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = save_byte_model(tmp_path)
    model.to(dtype).save_pretrained(tmp_path)
    imported = build_model(from_huggingface.read_model(tmp_path / "model.safetensors", tmp_path)).eval()
    assert_same_logits(imported, model.float(), 256)


NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("GPT2", {}),
    ("GPT2", {"bias": False, "activation": "gelu_erf", "tie_embeddings": False, "n_head": 1, "n_layer": 1}),
    ("GPT2", {"activation": "relu2", "n_embd": 48, "n_head": 4, "dropout": 0.2}),
    ("GPT2", {"position": "sinusoidal"}),
    ("GPT2", {"position": "sinusoidal", "tie_embeddings": False, "bias": False}),
    ("GPT2", {"position": "sinusoidal", "tie_embeddings": False, "init": "zero"}),
    ("GPTNeoX", {"position": "rotary"}),
    ("GPTNeoX", {"position": "rotary", "bias": False, "activation": "relu2", "tie_embeddings": False, "n_embd": 48}),
    ("Arcee", {"position": "rotary", "norm": "rmsnorm", "activation": "relu2"}),
    ("Arcee", {"position": "rotary", "norm": "rmsnorm", "bias": False, "tie_embeddings": False, "n_head": 4}),
    ("Apertus", {"position": "rotary", "norm": "rmsnorm", "qk_norm": True, "bias": False, "activation": "relu2"}),
    ("Apertus", {"position": "rotary", "norm": "rmsnorm", "qk_norm": True, "bias": False, "tie_embeddings": False,
                 "activation": "gelu_erf", "n_head": 4, "n_layer": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "network"), NETWORKS)
def test_exported_model_has_same_logits_and_samples(tmp_path: Path, architecture: str, network: dict[str, Any]) -> None:
    model = save_our_model(tmp_path / "best.safetensors", CharTokenizer(CHARACTERS), **network)
    message = to_huggingface.export_folder(tmp_path, settings(out=tmp_path / "out"))
    assert f"{architecture}ForCausalLM" in message or f"{architecture}LMHeadModel" in message
    hf_model, hf_tokenizer = load_hf(tmp_path / "out")
    assert type(hf_model).__name__.startswith(architecture)
    assert hf_model.config.eos_token_id is hf_model.generation_config.eos_token_id is None
    assert_same_logits(model, hf_model, len(CHARACTERS))
    prompt = hf_tokenizer("abc", return_tensors="pt")
    ids = hf_model.generate(**prompt, do_sample=False, max_new_tokens=13)[0].tolist()
    tokens = generate(
        decoder_of(model), np.array(ids[:3]), block_size=16, num_samples=1, max_new_tokens=13, params=GREEDY, seed=0
    )
    assert ids[3:] == [int(token[0]) for token in tokens]
    assert all(character in CHARACTERS for character in hf_tokenizer.decode(ids))


@pytest.mark.parametrize(
    "network", [network for architecture, network in NETWORKS if architecture == "GPT2" and "position" not in network]
)
@pytest.mark.parametrize("kind", ["char", "byte", "records"])
def test_export_and_import_restore_checkpoint(tmp_path: Path, kind: str, network: dict[str, Any]) -> None:
    tokenizer: Tokenizer = ByteTokenizer() if kind == "byte" else CharTokenizer(CHARACTERS)
    if kind == "records":
        tokenizer = RecordTokenizer(tokenizer, "\n\n")
    save_our_model(tmp_path / "best.safetensors", tokenizer, **network)
    to_huggingface.export_folder(tmp_path, settings(out=tmp_path / "out"))
    hf_model, hf_tokenizer = load_hf(tmp_path / "out")
    hf_model.save_pretrained(tmp_path / "again")  # the import also reads what transformers saves
    hf_tokenizer.save_pretrained(tmp_path / "again")
    before = checkpoints.load_checkpoint(tmp_path / "best.safetensors")
    for folder in (tmp_path / "out", tmp_path / "again"):
        after = from_huggingface.read_model(folder, tmp_path)
        assert after.metadata.tokenizer == before.metadata.tokenizer
        assert after.metadata.model == before.metadata.model | {"ngram_rows": after.metadata.model["ngram_rows"]}
        assert after.model.keys() == before.model.keys()
        assert all(np.array_equal(after.model[name], before.model[name]) for name in before.model)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"ngram": 3}, "no architecture with n-gram tables (ngram = 3); train with ngram = 1 to export it"),
        ({"token_shift": True}, "no architecture with token_shift; train with token_shift = false"),
        ({"norm": "rmsnorm"}, "with norm = 'rmsnorm' and position = 'learned'; train with position = 'rotary'"),
        ({"qk_norm": True}, "with qk_norm and norm = 'layernorm'; train with qk_norm = false"),
        (
            {"qk_norm": True, "norm": "rmsnorm", "position": "rotary"},
            "with qk_norm and biases; train with bias = false",
        ),
    ],
)
def test_unsupported_network_is_refused(tmp_path: Path, network: dict[str, Any], message: str) -> None:
    save_our_model(tmp_path / "best.safetensors", ByteTokenizer(), **network)
    with pytest.raises(UserError) as caught:
        to_huggingface.export_folder(tmp_path, settings(out=tmp_path / "out"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, gpt2_data_dir: Path) -> dict[str, tuple[Tokenizer, Any]]:
    """Return our tokenizer of each kind, and AutoTokenizer's version of it."""
    result: dict[str, tuple[Tokenizer, Any]] = {}
    learned = learn_bpe([some_text(3000), CHARACTERS] * 2, 290)
    for tokenizer in (CharTokenizer(CHARACTERS), ByteTokenizer(), learned, GPT2Tokenizer(gpt2_data_dir)):
        folder = tmp_path_factory.mktemp(tokenizer.kind)
        save_our_model(folder / "best.safetensors", tokenizer, n_embd=4, n_layer=1)
        to_huggingface.export_folder(folder, settings(out=folder / "out", data_dir=gpt2_data_dir))
        result[tokenizer.kind] = tokenizer, load_hf(folder / "out")[1]
    return result


UNUSUAL_TEXTS = [
    "<|endoftext|>",
    "a <|endoftext|>b",
    "",
    "  ",
    "\r\n \r",
    "it's I'LL 's",
    "e\u0301👩\u200d👩",
    " a  b\n\n c ",
    "\x85\x1f\0",
]


@pytest.mark.parametrize("kind", ["byte", "bpe", "gpt2"])
@hypothesis_settings(deadline=None, max_examples=300)
@given(text=st.text() | st.sampled_from(UNUSUAL_TEXTS))
def test_any_text_has_same_ids(pairs: dict[str, tuple[Tokenizer, Any]], kind: str, text: str) -> None:
    ours, exported = pairs[kind]
    assert exported.encode(text) == ours.encode(text).tolist()
    assert exported.decode(exported.encode(text)) == text


@hypothesis_settings(deadline=None, max_examples=300)
@given(text=st.text(alphabet=CHARACTERS))
def test_any_characters_have_same_ids(pairs: dict[str, tuple[Tokenizer, Any]], text: str) -> None:
    ours, exported = pairs["char"]
    assert exported.encode(text) == ours.encode(text).tolist()
    assert exported.decode(exported.encode(text)) == text


def test_exported_tokenizer_refuses_unknown_character(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        pairs["char"][1].encode("abXc")


def test_exported_tokenizer_has_end_of_text_token(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    assert {kind: exported.eos_token_id for kind, (_, exported) in pairs.items()} == {
        "char": None,
        "byte": None,
        "bpe": 289,
        "gpt2": 50256,
    }
    assert pairs["gpt2"][1].decode([50256]) == "<|endoftext|>"


@pytest.mark.parametrize("base", [CharTokenizer(CHARACTERS), ByteTokenizer()], ids=["char", "byte"])
def test_exported_tokenizer_begins_records(tmp_path: Path, base: Tokenizer) -> None:
    tokenizer = RecordTokenizer(base, "\n")
    save_our_model(tmp_path / "best.safetensors", tokenizer, n_embd=4, n_layer=1)
    to_huggingface.export_folder(tmp_path, settings(out=tmp_path / "out"))
    model, exported = load_hf(tmp_path / "out")
    text = CHARACTERS[:5]
    assert exported.encode(text) == [tokenizer.end_of_text, *base.encode(text).tolist()]
    assert exported.decode(exported.encode(text), skip_special_tokens=True) == text
    assert exported.eos_token_id == model.generation_config.eos_token_id == tokenizer.end_of_text


def save_gpt2_model(folder: Path, gpt2_data_dir: Path, vocabulary_format: str) -> Path:
    """Save a tiny GPT-2 with GPT-2's vocabulary in one of several formats; return the folder."""
    make_hf_model(vocab_size=50257, n_embd=8).save_pretrained(folder)
    spec = to_huggingface.tokenizer_json(GPT2Tokenizer(gpt2_data_dir), gpt2_data_dir)
    if vocabulary_format == "tokenizer.json":
        to_huggingface.write_json(folder / vocabulary_format, spec)
    elif vocabulary_format == "as pairs":
        spec["model"]["merges"] = [merge.split(" ") for merge in spec["model"]["merges"]]
        to_huggingface.write_json(folder / "tokenizer.json", spec)
    elif vocabulary_format == "vocab.json":
        to_huggingface.write_json(folder / vocabulary_format, spec["model"]["vocab"])
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *spec["model"]["merges"], ""]), encoding="utf-8")
    return folder


@pytest.mark.parametrize("vocabulary_format", ["", "tokenizer.json", "as pairs", "vocab.json"])
def test_gpt2_vocabulary_is_recognized(tmp_path: Path, gpt2_data_dir: Path, vocabulary_format: str) -> None:
    folder = save_gpt2_model(tmp_path / "hf", gpt2_data_dir, vocabulary_format)
    assert from_huggingface.read_model(folder, gpt2_data_dir).metadata.tokenizer == {"kind": "gpt2"}


def test_other_vocabulary_of_same_size_is_refused(tmp_path: Path, gpt2_data_dir: Path) -> None:
    folder = save_gpt2_model(tmp_path / "hf", gpt2_data_dir, "tokenizer.json")
    spec = json.loads((folder / "tokenizer.json").read_bytes())
    vocab = spec["model"]["vocab"]
    vocab["the"], vocab["and"] = vocab["and"], vocab["the"]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"its 50,257 tokens are neither GPT-2's, nor BPE, bytes or characters"):
        from_huggingface.read_model(folder, gpt2_data_dir)


def train_settings(data_dir: Path, out_dir: Path, **changes: Any) -> TrainSettings:
    """Return the settings of a short run, without those of the network."""
    chosen = {
        "dataset": "bpe", "data_dir": data_dir, "out_dir": out_dir, "batch_size": 4, "max_steps": 30,
        "eval_every": 15, "sample_tokens": 3, "warmup_steps": 2, "learning_rate": 0.01,
        "dtype": "float32", "device": "cpu", "compile": False,
    } | changes  # fmt: skip
    return TrainSettings.model_validate({key: str(value) for key, value in chosen.items()})


def test_fine_tuning_starts_from_same_loss(tmp_path: Path, gpt2_data_dir: Path) -> None:
    folder = save_gpt2_model(tmp_path / "hf", gpt2_data_dir, "tokenizer.json")
    prepare_text(some_text(3000), gpt2_data_dir, "bpe", tokenizer="gpt2")
    train.main(train_settings(gpt2_data_dir, tmp_path / "run", init_from=folder, block_size=8))
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if row["kind"] == "val"]
    val = load_dataset(gpt2_data_dir / "bpe", gpt2_data_dir).val
    tokens = torch.from_numpy(val.slice(0, val.tokens).astype(np.int64))
    hf_model, _ = load_hf(folder)
    total = 0.0
    for start in range(0, val.tokens - 1, 8):  # consecutive blocks, as in evaluation
        window = tokens[None, start : start + 9]
        with torch.no_grad():
            total += hf_model(window, labels=window).loss.item() * (window.size(1) - 1)
    assert losses[0] == pytest.approx(total / (val.tokens - 1), abs=1e-4)
    assert losses[-1] < losses[0] - 0.5
    saved = checkpoints.load_checkpoint(tmp_path / "run" / "best.safetensors")
    assert (saved.metadata.model["block_size"], saved.metadata.tokenizer) == (8, {"kind": "gpt2"})
    to_huggingface.export_folder(tmp_path / "run", settings(out=tmp_path / "back", data_dir=gpt2_data_dir))
    assert_same_logits(build_model(saved).eval(), load_hf(tmp_path / "back")[0], 50257, T=8)


def test_fine_tuning_with_other_vocabulary_is_refused(data_dir: Path, tmp_path: Path) -> None:
    save_byte_model(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    with pytest.raises(UserError, match=rf"^{path} and .* have different vocabularies; [^\n]*$"):
        train.main(train_settings(data_dir, tmp_path / "run", dataset="small", init_from=path))
    assert not (tmp_path / "run").exists()


MISMATCH = "its config and its weights do not belong together"
INVALID_FILES: list[tuple[str, Any, str]] = [
    ("config.json", b"{", "not valid JSON"),
    ("config.json", b"\xff", "not valid JSON"),
    ("config.json", b"[" * 100_000, "not valid JSON"),
    ("config.json", b"[]", "does not hold a JSON object"),
    ("config.json", b"9" * 5000, "not valid JSON"),
    ("config.json", {"model_type": "llama"}, "model_type is llama; only gpt2 can be converted"),
    ("config.json", {"model_type": "a\nb" * 999}, "model_type is a"),
    ("config.json", {"activation_function": ["gelu"]}, "activation_function is ['gelu']; only gelu_new and gelu and"),
    ("config.json", {"activation_function": "silu"}, "activation_function is silu; only"),
    ("config.json", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; only 1e-05"),
    ("config.json", {"scale_attn_weights": False}, "scale_attn_weights is False; only True"),
    ("config.json", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; only False"),
    ("config.json", {"add_cross_attention": True}, "add_cross_attention is True; only False"),
    ("config.json", {"n_inner": 13}, "n_inner is 13; only 4 x n_embd"),
    ("config.json", {"n_embd": "12", "n_layer": 1e300}, "cannot be converted: n_layer = 1e+300, n_embd = '12'"),
    ("config.json", {"n_layer": 10**30}, "cannot be converted: n_layer = 1"),
    ("config.json", {"n_layer": 10**6}, MISMATCH),
    ("config.json", {"n_head": 5}, "cannot be converted: n_embd = 12 is not a multiple of n_head = 5"),
    ("config.json", {"n_positions": 0, "resid_pdrop": 1}, "cannot be converted: n_positions = 0, resid_pdrop = 1"),
    ("config.json", {"n_positions": 17}, MISMATCH),
    ("config.json", {"tie_word_embeddings": False}, MISMATCH),
    ("config.json", {"bias": False}, MISMATCH),
    ("config.json", {"vocab_size": 257}, "its 257 tokens are neither GPT-2's"),
    ("config.json", {"vocab_size": 50257}, "its 50,257 tokens are neither GPT-2's"),
    ("config.json", None, "config.json: cannot be read: No such file"),
    ("tokenizer.json", None, "its 256 tokens are neither GPT-2's"),
    ("tokenizer.json", b"{}", "its tokenizer's files are damaged"),
    ("tokenizer.json", {"model": {"vocab": ["a"], "merges": []}}, "its 256 tokens are neither"),
    ("tokenizer.json", {"model": {"vocab": {"a": 0, "b": "c"}}}, "its 256 tokens are neither"),
    ("tokenizer.json", {"model": {"vocab": {"\ud800": 0}}}, "its tokenizer's files are damaged"),
    ("tokenizer.json", {"model": {"vocab": {"ab": 0}, "merges": 3}}, "its tokenizer's files are damaged"),
    ("model.safetensors", None, "model.safetensors: no such file; save the model with transformers"),
    ("model.safetensors", b"", "damaged or truncated"),
    ("model.safetensors", b"\xff" * 100, "damaged or truncated"),
    ("model.safetensors", {"wte.weight": torch.zeros(256, 12)}, MISMATCH),
    ("model.safetensors", {"x\ny": torch.zeros(1)}, "holds x\\ny, which is not a weight of a GPT-2"),
    ("model.safetensors", {"h.": torch.zeros(1)}, MISMATCH),
    ("model.safetensors", {"h.0.score.weight": torch.zeros(1)}, "holds h.0.score.weight, which is not a weight"),
    ("model.safetensors", {"wte.weight": torch.ones(256, 12).long()}, "holds wte.weight, which is not a weight"),
    ("model.safetensors", {"transformer.h.1.attn.c_attn.weight": torch.zeros(36)}, MISMATCH),
    ("model.safetensors", {"transformer.h.1.mlp.c_fc.weight": torch.zeros(2, 3, 4)}, MISMATCH),
    ("model.safetensors", {"transformer.ln_f.bias": torch.full((12,), torch.nan)}, "some weights are not finite"),
]


@pytest.mark.parametrize(("name", "content", "message"), INVALID_FILES)
def test_invalid_file_is_refused_in_one_line(
    tmp_path: Path, gpt2_data_dir: Path, name: str, content: Any, message: str
) -> None:
    save_byte_model(tmp_path)
    path = tmp_path / name
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif name == "model.safetensors":
        weights = load_file(path)
        save_file((weights if content.keys() & weights.keys() else {}) | content, path)
    else:
        path.write_text(json.dumps({**json.loads(path.read_bytes()), **content}))
    with pytest.raises(UserError) as caught:
        from_huggingface.read_model(tmp_path, gpt2_data_dir)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5)


@pytest.fixture(scope="module")
def byte_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    save_byte_model(folder)
    return folder


@hypothesis_settings(deadline=None, max_examples=200)
@given(
    changes=st.dictionaries(
        st.sampled_from([*from_huggingface.GPT2_DEFAULTS, *from_huggingface.REQUIRED, "n_inner"]), JSON
    )
)
def test_any_config_is_read_or_refused_in_one_line(byte_model_dir: Path, changes: dict[str, Any]) -> None:
    config = json.loads((byte_model_dir / "config.json").read_bytes())
    (byte_model_dir / "config.json").write_text(json.dumps(config | changes))
    try:
        from_huggingface.read_model(byte_model_dir, byte_model_dir)
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        (byte_model_dir / "config.json").write_text(json.dumps(config))


@hypothesis_settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_damaged_weights_are_read_or_refused_in_one_line(byte_model_dir: Path, data: st.DataObject) -> None:
    content = bytearray((byte_model_dir / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    original = bytes(content)
    for offset, byte in data.draw(st.lists(st.tuples(st.integers(0, header - 1), st.integers(0, 255)), max_size=5)):
        content[offset] = byte
    (byte_model_dir / "model.safetensors").write_bytes(
        content[: data.draw(st.sampled_from([len(content), header, 100]))]
    )
    try:
        from_huggingface.read_model(byte_model_dir, byte_model_dir)
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        (byte_model_dir / "model.safetensors").write_bytes(original)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.bool, torch.float64])
def test_weights_of_any_dtype_are_read_or_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    model = save_byte_model(tmp_path)
    change_weights(lambda weights: {name: weight.to(dtype) for name, weight in weights.items()})(tmp_path)
    if dtype.is_floating_point:
        imported = build_model(from_huggingface.read_model(tmp_path, tmp_path))
        if dtype == torch.float64:
            assert_same_logits(imported.eval(), model, 256)
    else:
        with pytest.raises(UserError, match="which is not a weight of a GPT-2"):
            from_huggingface.read_model(tmp_path, tmp_path)


@pytest.mark.parametrize("weight_map", [["a"], {"a": "../model.safetensors"}, {"a": 1}, {"a": ".."}])
def test_index_cannot_name_files_outside_its_folder(tmp_path: Path, weight_map: Any) -> None:
    save_byte_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path.parent / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"does not name the files|cannot be read"):
        from_huggingface.read_model(tmp_path, tmp_path)


def test_output_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    save_our_model(tmp_path / "best.safetensors", ByteTokenizer())
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"^the output has no path; add one, for example --out="):
        to_huggingface.export_folder(tmp_path, settings())
    to_huggingface.export_folder(tmp_path, settings(out=out))
    with pytest.raises(UsageError, match="add --overwrite to replace it"):
        to_huggingface.export_folder(tmp_path, settings(out=out))
    (out / "mine.txt").touch()
    to_huggingface.export_folder(tmp_path, settings(out=out, overwrite=True))
    assert not (out / "mine.txt").exists()
    with pytest.raises(UsageError, match="does not hold a Hugging Face model and is not replaced"):
        to_huggingface.export_folder(tmp_path, settings(out=tmp_path, overwrite=True))
    assert {path.name for path in tmp_path.iterdir()} == {"best.safetensors", "out"}


def test_failed_export_leaves_folder_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_our_model(tmp_path / "best.safetensors", ByteTokenizer())
    to_huggingface.export_folder(tmp_path, settings(out=tmp_path / "out"))
    before = contents(tmp_path / "out")

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_huggingface, "write_safetensors", disk_full)
    with pytest.raises(UserError, match="could not be written: No space left on device"):
        to_huggingface.export_folder(tmp_path, settings(out=tmp_path / "out", overwrite=True))
    assert contents(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} == {"best.safetensors", "out"}


def test_our_run_is_not_taken_for_huggingface_model(tmp_path: Path) -> None:
    save_byte_model(tmp_path)
    assert from_huggingface.is_huggingface_model(tmp_path)
    save_our_model(tmp_path / "best.safetensors", ByteTokenizer())
    assert not from_huggingface.is_huggingface_model(tmp_path)
    assert not from_huggingface.is_huggingface_model(tmp_path / "best.safetensors")
    with pytest.raises(UserError, match=rf"^{tmp_path / 'missing'}: no such file or folder$"):
        from_huggingface.read_model(tmp_path / "missing", tmp_path)


def test_command_line_exports_and_imports(tmp_path: Path) -> None:
    save_our_model(tmp_path / "best.safetensors", CharTokenizer(CHARACTERS))
    exported, imported = tmp_path / "hf", tmp_path / "back.safetensors"
    for words in (
        ["to-huggingface", str(tmp_path), f"--out={exported}"],
        ["huggingface", str(exported), f"--out={imported}"],
    ):
        done = script("glyphgpt/convert/__main__.py", *words)
        assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    before, after = (checkpoints.load_checkpoint(path).model for path in (tmp_path / "best.safetensors", imported))
    assert all(np.array_equal(before[name], after[name]) for name in before.keys() | after.keys())


def test_a_learned_bpe_is_exported_and_imported(tmp_path: Path) -> None:
    tokenizer = learn_bpe([some_text(3000)] * 2, 280)
    save_our_model(tmp_path / "best.safetensors", tokenizer)
    to_huggingface.export_folder(tmp_path, settings(out=tmp_path / "hf"))
    assert from_huggingface.read_model(tmp_path / "hf", tmp_path).metadata.tokenizer == tokenizer.to_dict()
    save_our_model(tmp_path / "best.safetensors", RecordTokenizer(tokenizer, ""))
    to_huggingface.export_folder(tmp_path, settings(out=tmp_path / "hf2"))
    read = from_huggingface.read_model(tmp_path / "hf2", tmp_path).metadata.tokenizer
    assert read == tokenizer.to_dict() | {"separator": ""}
