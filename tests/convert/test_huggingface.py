"""Hugging Face's GPT-2 becomes ours, and ours become folders that transformers loads, with the same logits and ids."""

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
from hypothesis import settings as tries
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import train
from conftest import contents, decoder_of, prepare_text, read_metrics, script, some_text, tiny_model
from glyphgpt import checkpoint as checkpoints
from glyphgpt.checkpoint import Checkpoint, Metadata, TrainState
from glyphgpt.convert import from_huggingface, to_huggingface
from glyphgpt.data.dataset import load_dataset
from glyphgpt.data.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer
from glyphgpt.errors import UsageError, UserError
from glyphgpt.inference.generate import SamplingParams, generate
from glyphgpt.settings import ConvertSettings, TrainSettings
from glyphgpt.training.torch_state import build_model, model_arrays
from model import GPT

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here is to come from elsewhere

CHARACTERS = "".join(sorted("\0\t\n\r '<>abcdé\u0301\u200d\u2028字🙂👩"))
SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 12, "n_positions": 16}
GREEDY = SamplingParams(temperature=0)


def settings(**changes: object) -> ConvertSettings:
    return ConvertSettings.model_validate({key: str(value) for key, value in changes.items()})


def randomize(model: Any, std: float = 0.3) -> Any:
    """Give every parameter random values, lest a mistake hide behind zeros and ones."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model.eval()


def theirs(**changes: Any) -> Any:
    """Return a GPT-2 of transformers' with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415  (seconds)

    return randomize(GPT2LMHeadModel(GPT2Config(**{**SIZES, "vocab_size": 256, **changes})))


def byte_folder(folder: Path, **changes: Any) -> Any:
    """Save a GPT-2 of bytes as transformers does; return it."""
    model = theirs(**changes)
    model.save_pretrained(folder)
    to_huggingface.write_json(folder / "tokenizer.json", to_huggingface.tokenizer_json(ByteTokenizer(), Path()))
    return model


def ours(path: Path, tokenizer: Tokenizer, **changes: Any) -> GPT:
    """Save a checkpoint of ours with random weights; return its model."""
    model: GPT = randomize(tiny_model(**{"vocab_size": tokenizer.vocab_size, "block_size": 16, **changes}))
    info = Metadata(
        model=asdict(model.config), tokenizer=tokenizer.to_dict(), settings={}, data="", val_loss=None,
        state=TrainState(), scaler={},
    )  # fmt: skip
    checkpoints.save_checkpoint(Checkpoint(info, model_arrays(model)), path)
    return model


def load(folder: Path) -> tuple[Any, Any]:
    """Load model and tokenizer as its users do."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def assert_same_logits(one: Any, other: Any, vocab_size: int, T: int = 16) -> None:
    tokens = torch.randint(vocab_size, (3, T))
    with torch.no_grad():
        torch.testing.assert_close(one(tokens), other(tokens).logits, rtol=0, atol=1e-5)


ACTIVATIONS = [("gelu_new", "gelu"), ("gelu_pytorch_tanh", "gelu"), ("gelu", "gelu_erf"), ("relu2", "relu2")]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("activation", "ours"), ACTIVATIONS)
def test_their_model_gives_the_same_logits_here(tmp_path: Path, activation: str, ours: str, tied: bool) -> None:
    model = byte_folder(tmp_path / "theirs", activation_function=activation, tie_word_embeddings=tied)
    out = tmp_path / "out" / "best.safetensors"
    said = from_huggingface.checkpoint(tmp_path / "theirs", settings(out=out))
    assert said.endswith(f"byte tokens; sample it: python sample.py {out}")
    converted = build_model(checkpoints.load_checkpoint(out)).eval()
    assert (converted.config.activation, converted.config.tie_embeddings) == (ours, tied)
    assert_same_logits(converted, model, 256)


def shard(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    names = list(weights)
    parts = {"model-1.safetensors": names[:10], "model-2.safetensors": names[10:]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def resave(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")

    return apply


def without_prefix(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name weights as the published gpt2 does, with its masks."""
    masks = {f"h.{i}.attn.{name}": torch.ones(1, 1, 16, 16) for i in range(2) for name in ("bias", "masked_bias")}
    return {name.removeprefix("transformer."): weight for name, weight in weights.items()} | masks


@pytest.mark.parametrize(
    "change",
    [
        resave(without_prefix),
        resave(lambda weights: weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()}),
        lambda folder: shard(folder, load_file(folder / "model.safetensors")),
    ],
    ids=["published", "doubled", "sharded"],
)
def test_other_ways_to_save_the_same(tmp_path: Path, change: Callable[[Path], None]) -> None:
    model = byte_folder(tmp_path)
    change(tmp_path)
    found = from_huggingface.read(tmp_path, tmp_path)
    assert found.metadata.model["tie_embeddings"] is True
    assert_same_logits(build_model(found).eval(), model, 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = byte_folder(tmp_path)
    model.to(dtype).save_pretrained(tmp_path)
    found = build_model(from_huggingface.read(tmp_path / "model.safetensors", tmp_path)).eval()
    assert_same_logits(found, model.float(), 256)


FORMS: list[tuple[str, dict[str, Any]]] = [
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


@pytest.mark.parametrize(("architecture", "form"), FORMS)
def test_our_model_gives_the_same_logits_there(tmp_path: Path, architecture: str, form: dict[str, Any]) -> None:
    model = ours(tmp_path / "best.safetensors", CharTokenizer(CHARACTERS), **form)
    said = to_huggingface.folder(tmp_path, settings(out=tmp_path / "out"))
    assert f"{architecture}ForCausalLM" in said or f"{architecture}LMHeadModel" in said
    there, tokenizer = load(tmp_path / "out")
    assert type(there).__name__.startswith(architecture)
    assert there.config.eos_token_id is there.generation_config.eos_token_id is None, "no id beyond the vocabulary"
    assert_same_logits(model, there, len(CHARACTERS))
    prompt = tokenizer("abc", return_tensors="pt")
    text = there.generate(**prompt, do_sample=False, max_new_tokens=13)[0].tolist()
    tokens = generate(
        decoder_of(model), np.array(text[:3]), block_size=16, num_samples=1, max_new_tokens=13, params=GREEDY, seed=0
    )
    assert text[3:] == [int(token[0]) for token in tokens]
    assert all(character in CHARACTERS for character in tokenizer.decode(text))


@pytest.mark.parametrize("form", [form for kind, form in FORMS if kind == "GPT2" and "position" not in form])
@pytest.mark.parametrize("kind", ["char", "byte"])
def test_there_and_back_again(tmp_path: Path, kind: str, form: dict[str, Any]) -> None:
    tokenizer: Tokenizer = CharTokenizer(CHARACTERS) if kind == "char" else ByteTokenizer()
    ours(tmp_path / "best.safetensors", tokenizer, **form)
    to_huggingface.folder(tmp_path, settings(out=tmp_path / "out"))
    there, written = load(tmp_path / "out")
    there.save_pretrained(tmp_path / "again")  # what transformers makes of it is read as well
    written.save_pretrained(tmp_path / "again")
    before = checkpoints.load_checkpoint(tmp_path / "best.safetensors")
    for folder in (tmp_path / "out", tmp_path / "again"):
        after = from_huggingface.read(folder, tmp_path)
        assert after.metadata.tokenizer == before.metadata.tokenizer
        assert after.metadata.model == before.metadata.model | {"ngram_rows": after.metadata.model["ngram_rows"]}
        assert after.model.keys() == before.model.keys()
        assert all(np.array_equal(after.model[name], before.model[name]) for name in before.model)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"ngram": 3}, "no architecture with n-gram tables (ngram = 3); train with ngram = 1 to write it"),
        ({"token_shift": True}, "no architecture with token_shift; train with token_shift = false"),
        ({"norm": "rmsnorm"}, "with norm = 'rmsnorm' and position = 'learned'; train with position = 'rotary'"),
        ({"qk_norm": True}, "with qk_norm and norm = 'layernorm'; train with qk_norm = false"),
        (
            {"qk_norm": True, "norm": "rmsnorm", "position": "rotary"},
            "with qk_norm and biases; train with bias = false",
        ),
    ],
)
def test_what_no_architecture_can_compute_is_refused(tmp_path: Path, form: dict[str, Any], said: str) -> None:
    ours(tmp_path / "best.safetensors", ByteTokenizer(), **form)
    with pytest.raises(UserError) as caught:
        to_huggingface.folder(tmp_path, settings(out=tmp_path / "out"))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, gpt2_data_dir: Path) -> dict[str, tuple[Tokenizer, Any]]:
    """Give our tokenizer of each kind, and what AutoTokenizer makes of it."""
    found: dict[str, tuple[Tokenizer, Any]] = {}
    for tokenizer in (CharTokenizer(CHARACTERS), ByteTokenizer(), GPT2Tokenizer(gpt2_data_dir)):
        folder = tmp_path_factory.mktemp(tokenizer.kind)
        ours(folder / "best.safetensors", tokenizer, n_embd=4, n_layer=1)
        to_huggingface.folder(folder, settings(out=folder / "out", data_dir=gpt2_data_dir))
        found[tokenizer.kind] = tokenizer, load(folder / "out")[1]
    return found


ODD = [
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


@pytest.mark.parametrize("kind", ["byte", "gpt2"])
@tries(deadline=None, max_examples=300)
@given(text=st.text() | st.sampled_from(ODD))
def test_any_text_has_the_same_ids(pairs: dict[str, tuple[Tokenizer, Any]], kind: str, text: str) -> None:
    here, there = pairs[kind]
    assert there.encode(text) == here.encode(text).tolist()
    assert there.decode(there.encode(text)) == text


@tries(deadline=None, max_examples=300)
@given(text=st.text(alphabet=CHARACTERS))
def test_any_characters_have_the_same_ids(pairs: dict[str, tuple[Tokenizer, Any]], text: str) -> None:
    here, there = pairs["char"]
    assert there.encode(text) == here.encode(text).tolist()
    assert there.decode(there.encode(text)) == text


def test_an_unknown_character_is_an_error_there_too(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        pairs["char"][1].encode("abXc")


def test_the_end_of_a_text_is_told(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    assert {kind: there.eos_token_id for kind, (_, there) in pairs.items()} == {
        "char": None,
        "byte": None,
        "gpt2": 50256,
    }
    assert pairs["gpt2"][1].decode([50256]) == "<|endoftext|>"


def gpt2_folder(folder: Path, gpt2_data_dir: Path, written: str) -> Path:
    """Make a tiny GPT-2 of word pieces, with its vocabulary in one of the ways there are."""
    theirs(vocab_size=50257, n_embd=8).save_pretrained(folder)
    spec = to_huggingface.tokenizer_json(GPT2Tokenizer(gpt2_data_dir), gpt2_data_dir)
    if written == "tokenizer.json":
        to_huggingface.write_json(folder / written, spec)
    elif written == "as pairs":
        spec["model"]["merges"] = [merge.split(" ") for merge in spec["model"]["merges"]]
        to_huggingface.write_json(folder / "tokenizer.json", spec)
    elif written == "vocab.json":
        to_huggingface.write_json(folder / written, spec["model"]["vocab"])
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *spec["model"]["merges"], ""]), encoding="utf-8")
    return folder


@pytest.mark.parametrize("written", ["", "tokenizer.json", "as pairs", "vocab.json"])
def test_the_vocabulary_of_word_pieces_is_known(tmp_path: Path, gpt2_data_dir: Path, written: str) -> None:
    folder = gpt2_folder(tmp_path / "theirs", gpt2_data_dir, written)
    assert from_huggingface.read(folder, gpt2_data_dir).metadata.tokenizer == {"kind": "gpt2"}


def test_another_vocabulary_of_as_many_word_pieces_is_refused(tmp_path: Path, gpt2_data_dir: Path) -> None:
    folder = gpt2_folder(tmp_path / "theirs", gpt2_data_dir, "tokenizer.json")
    spec = json.loads((folder / "tokenizer.json").read_bytes())
    vocab = spec["model"]["vocab"]
    vocab["the"], vocab["and"] = vocab["and"], vocab["the"]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"its 50,257 tokens are neither GPT-2's, nor characters or bytes"):
        from_huggingface.read(folder, gpt2_data_dir)


def training(data_dir: Path, out_dir: Path, **changes: Any) -> TrainSettings:
    """Settings of a run of seconds that say nothing of the network."""
    chosen = {
        "dataset": "told", "data_dir": data_dir, "out_dir": out_dir, "batch_size": 4, "max_steps": 30,
        "eval_every": 15, "sample_tokens": 3, "warmup_steps": 2, "learning_rate": 0.01, "plot": False,
        "dtype": "float32", "device": "cpu", "compile": False,
    } | changes  # fmt: skip
    return TrainSettings.model_validate({key: str(value) for key, value in chosen.items()})


def test_fine_tuning(tmp_path: Path, gpt2_data_dir: Path) -> None:
    folder = gpt2_folder(tmp_path / "theirs", gpt2_data_dir, "tokenizer.json")
    prepare_text(some_text(3000), gpt2_data_dir, "told", tokenizer="gpt2")
    train.main(training(gpt2_data_dir, tmp_path / "run", init_from=folder, block_size=8))
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if row["kind"] == "val"]
    val = load_dataset(gpt2_data_dir / "told", gpt2_data_dir).val
    tokens = torch.from_numpy(val.slice(0, val.tokens).astype(np.int64))
    there, _ = load(folder)
    total = 0.0
    for start in range(0, val.tokens - 1, 8):  # as evaluation does: one window after another
        window = tokens[None, start : start + 9]
        with torch.no_grad():
            total += there(window, labels=window).loss.item() * (window.size(1) - 1)
    assert losses[0] == pytest.approx(total / (val.tokens - 1), abs=1e-4)
    assert losses[-1] < losses[0] - 0.5
    saved = checkpoints.load_checkpoint(tmp_path / "run" / "best.safetensors")
    assert (saved.metadata.model["block_size"], saved.metadata.tokenizer) == (8, {"kind": "gpt2"})
    to_huggingface.folder(tmp_path / "run", settings(out=tmp_path / "back", data_dir=gpt2_data_dir))
    assert_same_logits(build_model(saved).eval(), load(tmp_path / "back")[0], 50257, T=8)


def test_fine_tuning_on_another_vocabulary_is_refused(data_dir: Path, tmp_path: Path) -> None:
    byte_folder(tmp_path / "theirs")
    place = tmp_path / "theirs" / "model.safetensors"
    with pytest.raises(UserError, match=rf"^{place} and .* differ in their vocabularies; [^\n]*$"):
        train.main(training(data_dir, tmp_path / "run", dataset="small", init_from=place))
    assert not (tmp_path / "run").exists()


HOSTILE: list[tuple[str, Any, str]] = [
    ("config.json", b"{", "not JSON"),
    ("config.json", b"\xff", "not JSON"),
    ("config.json", b"[" * 100_000, "not JSON"),
    ("config.json", b"[]", "holds no JSON object"),
    ("config.json", b"9" * 5000, "not JSON"),
    ("config.json", {"model_type": "llama"}, "model_type is llama; only gpt2 can be converted"),
    ("config.json", {"model_type": "a\nb" * 999}, "model_type is a"),
    ("config.json", {"activation_function": ["gelu"]}, "activation_function is ['gelu']; only gelu_new and gelu and"),
    ("config.json", {"activation_function": "silu"}, "activation_function is silu; only"),
    ("config.json", {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06; only 1e-05"),
    ("config.json", {"scale_attn_weights": False}, "scale_attn_weights is False; only True"),
    ("config.json", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; only False"),
    ("config.json", {"add_cross_attention": True}, "add_cross_attention is True; only False"),
    ("config.json", {"n_inner": 13}, "n_inner is 13; only 4 x n_embd"),
    ("config.json", {"n_embd": "12", "n_layer": 1e300}, "cannot be converted for its n_layer, n_embd"),
    ("config.json", {"n_layer": 10**30}, "cannot be converted for its n_layer"),
    ("config.json", {"n_layer": 10**6}, "its weights are not those that"),
    ("config.json", {"n_head": 5}, "its weights are not those that"),
    ("config.json", {"n_positions": 17}, "its weights are not those that"),
    ("config.json", {"tie_word_embeddings": False}, "its weights are not those that"),
    ("config.json", {"bias": False}, "its weights are not those that"),
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
    ("model.safetensors", b"", "damaged or cut short"),
    ("model.safetensors", b"\xff" * 100, "damaged or cut short"),
    ("model.safetensors", {"wte.weight": torch.zeros(256, 12)}, "its weights are not those that"),
    ("model.safetensors", {"x\ny": torch.zeros(1)}, "holds x\\ny, which is no weight of a GPT-2"),
    ("model.safetensors", {"h.": torch.zeros(1)}, "holds h., which is no weight of a GPT-2"),
    ("model.safetensors", {"h.0.score.weight": torch.zeros(1)}, "holds h.0.score.weight, which is no weight"),
    ("model.safetensors", {"wte.weight": torch.ones(256, 12).long()}, "holds wte.weight, which is no weight"),
    ("model.safetensors", {"transformer.h.1.attn.c_attn.weight": torch.zeros(36)}, "its weights are not those that"),
    ("model.safetensors", {"transformer.h.1.mlp.c_fc.weight": torch.zeros(2, 3, 4)}, "its weights are not those that"),
    ("model.safetensors", {"transformer.ln_f.bias": torch.full((12,), torch.nan)}, "some weights are not finite"),
]


@pytest.mark.parametrize(("name", "content", "said"), HOSTILE)
def test_broken_folders_are_one_line(tmp_path: Path, gpt2_data_dir: Path, name: str, content: Any, said: str) -> None:
    byte_folder(tmp_path)
    path = tmp_path / name
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif name == "model.safetensors":
        whole = load_file(path)
        save_file((whole if content.keys() & whole.keys() else {}) | content, path)
    else:
        path.write_text(json.dumps({**json.loads(path.read_bytes()), **content}))
    with pytest.raises(UserError) as caught:
        from_huggingface.read(tmp_path, gpt2_data_dir)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    byte_folder(folder)
    return folder


@tries(deadline=None, max_examples=200)
@given(changes=st.dictionaries(st.sampled_from([*from_huggingface.DEFAULTS, *from_huggingface.FIXED, "n_inner"]), JSON))
def test_any_config_is_read_or_refused_in_one_line(broken: Path, changes: dict[str, Any]) -> None:
    whole = json.loads((broken / "config.json").read_bytes())
    (broken / "config.json").write_text(json.dumps(whole | changes))
    try:
        from_huggingface.read(broken, broken)
    except UserError as failure:
        assert "\n" not in str(failure)
    finally:
        (broken / "config.json").write_text(json.dumps(whole))


@tries(deadline=None, max_examples=200)
@given(data=st.data())
def test_damaged_weights_are_read_or_refused_in_one_line(broken: Path, data: st.DataObject) -> None:
    content = bytearray((broken / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    whole = bytes(content)
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, header - 1), st.integers(0, 255)), max_size=5)):
        content[place] = byte
    (broken / "model.safetensors").write_bytes(content[: data.draw(st.sampled_from([len(content), header, 100]))])
    try:
        from_huggingface.read(broken, broken)
    except UserError as failure:
        assert "\n" not in str(failure)
    finally:
        (broken / "model.safetensors").write_bytes(whole)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.bool, torch.float64])
def test_weights_of_any_type_are_read_or_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    model = byte_folder(tmp_path)
    resave(lambda weights: {name: weight.to(dtype) for name, weight in weights.items()})(tmp_path)
    if dtype.is_floating_point:
        found = build_model(from_huggingface.read(tmp_path, tmp_path))
        if dtype == torch.float64:
            assert_same_logits(found.eval(), model, 256)
    else:
        with pytest.raises(UserError, match="which is no weight of a GPT-2"):
            from_huggingface.read(tmp_path, tmp_path)


@pytest.mark.parametrize("weight_map", [["a"], {"a": "../model.safetensors"}, {"a": 1}, {"a": ".."}])
def test_an_index_names_files_of_its_folder(tmp_path: Path, weight_map: Any) -> None:
    byte_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path.parent / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"does not tell which files|cannot be read"):
        from_huggingface.read(tmp_path, tmp_path)


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    ours(tmp_path / "best.safetensors", ByteTokenizer())
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"^say where to write: --out="):
        to_huggingface.folder(tmp_path, settings())
    to_huggingface.folder(tmp_path, settings(out=out))
    with pytest.raises(UsageError, match="add --overwrite to replace it"):
        to_huggingface.folder(tmp_path, settings(out=out))
    (out / "mine.txt").touch()
    to_huggingface.folder(tmp_path, settings(out=out, overwrite=True))
    assert not (out / "mine.txt").exists()
    with pytest.raises(UsageError, match="is no model of Hugging Face's, so it is not replaced"):
        to_huggingface.folder(tmp_path, settings(out=tmp_path, overwrite=True))
    assert {path.name for path in tmp_path.iterdir()} == {"best.safetensors", "out"}


def test_a_failure_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours(tmp_path / "best.safetensors", ByteTokenizer())
    to_huggingface.folder(tmp_path, settings(out=tmp_path / "out"))
    before = contents(tmp_path / "out")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_huggingface, "save_file", full)
    with pytest.raises(UserError, match="could not be written: No space left on device"):
        to_huggingface.folder(tmp_path, settings(out=tmp_path / "out", overwrite=True))
    assert contents(tmp_path / "out") == before
    assert {path.name for path in tmp_path.iterdir()} == {"best.safetensors", "out"}


def test_a_run_of_ours_is_ours_whatever_stands_beside_it(tmp_path: Path) -> None:
    byte_folder(tmp_path)
    assert from_huggingface.is_there(tmp_path)
    ours(tmp_path / "best.safetensors", ByteTokenizer())
    assert not from_huggingface.is_there(tmp_path)
    assert not from_huggingface.is_there(tmp_path / "best.safetensors")
    with pytest.raises(UserError, match=rf"^{tmp_path / 'missing'}: no such file or folder$"):
        from_huggingface.read(tmp_path / "missing", tmp_path)


def test_the_command_line(tmp_path: Path) -> None:
    ours(tmp_path / "best.safetensors", CharTokenizer(CHARACTERS))
    there, back = tmp_path / "there", tmp_path / "back.safetensors"
    for words in (["to-huggingface", str(tmp_path), f"--out={there}"], ["huggingface", str(there), f"--out={back}"]):
        done = script("glyphgpt/convert/__main__.py", *words)
        assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    one, two = (checkpoints.load_checkpoint(path).model for path in (tmp_path / "best.safetensors", back))
    assert all(np.array_equal(one[name], two[name]) for name in one.keys() | two.keys())
