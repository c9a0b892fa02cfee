"""Export to GGUF: llama.cpp computes the same ids, the same probabilities and the same greedy text."""

import errno
import gc
import json
import math
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import train
from conftest import decoder_of, prepare_text, some_text, tiny_model, tiny_settings
from glyphgpt import checkpoint as checkpoints
from glyphgpt.convert import __main__ as convert
from glyphgpt.convert import to_gguf
from glyphgpt.convert.common import make_checkpoint
from glyphgpt.data.bpe import learn_bpe
from glyphgpt.data.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, RecordTokenizer, Tokenizer, decode
from glyphgpt.errors import UsageError, UserError
from glyphgpt.inference.generate import SamplingParams, generate
from glyphgpt.settings import ConvertSettings
from glyphgpt.training.torch_state import build_model, model_arrays
from model import GPT

TEXT = "Ça ira 🙂, mon roi!\n"
CHARACTERS = "".join(sorted(set(TEXT) | {"\t", "\u0301", "\u00a0", "字", "'", "s"}))
UNKNOWN = "è宇😀\u0302\u1234Z"  # some start with the same bytes as known ones

RELU2: dict[str, Any] = {"position": "rotary", "norm": "rmsnorm", "activation": "relu2", "bias": False}
NETWORKS: dict[str, tuple[str, dict[str, Any], float]] = {
    "learned": ("gpt2", {}, 1e-2),
    "learned, no biases": ("gpt2", {"bias": False, "tie_embeddings": False}, 1e-2),
    "sinusoidal": ("gpt2", {"position": "sinusoidal"}, 1e-2),
    "sinusoidal, untied head": ("gpt2", {"position": "sinusoidal", "tie_embeddings": False}, 1e-2),
    "gelu_erf": ("gpt2", {"activation": "gelu_erf"}, 1e-2),
    "rotary": ("gptneox", {"position": "rotary"}, 1e-2),
    "rotary, no biases": ("gptneox", {"position": "rotary", "bias": False, "tie_embeddings": False}, 1e-2),
    "relu2": ("arcee", RELU2, 1e-4),
    "relu2, untied head": ("arcee", {**RELU2, "tie_embeddings": False}, 1e-4),
    "qk_norm": ("apertus", {**RELU2, "qk_norm": True}, 1e-4),
    "qk_norm, untied head": ("apertus", {**RELU2, "qk_norm": True, "tie_embeddings": False}, 1e-4),
}
"""Architecture in llama.cpp, network, and tolerance of log-probabilities: llama.cpp's GELU is a float16 table."""


class Llama:
    """A llama.cpp server with a model, in this process."""

    def __init__(self, path: Path) -> None:
        xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp, a package of llama.cpp, is not installed")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_parallel = parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        parameters.n_gpu_layers = parameters.port = 0  # any free port
        parameters.warmup = parameters.fit_params = False
        parameters.verbosity = -1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(parameters)
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def post(self, endpoint: str, **body: Any) -> Any:
        """Send a request to the server; return its response."""
        url = f"{self._server.listening_address}/{endpoint}"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with self._open(request, timeout=60) as response:
            return json.load(response)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.post("tokenize", content=text, parse_special=True)["tokens"]

    def complete(self, prompt: str | list[int], tokens: int, **params: Any) -> Any:
        """Continue a prompt by up to this many tokens."""
        return self.post(
            "completion", prompt=prompt, n_predict=tokens, cache_prompt=False, return_tokens=True, **params
        )

    def log_probs(self, tokens: list[int], vocab_size: int) -> np.ndarray[Any, Any]:
        """Return the log-probabilities of the next token, normalized over our vocabulary."""
        [step] = self.complete(tokens, 1, temperature=0, n_probs=vocab_size + 1)["completion_probabilities"]
        log_probs = {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}
        return log_softmax(np.array([log_probs[token] for token in range(vocab_size)]))


@contextmanager
def start_llama(path: Path) -> Iterator[Llama]:
    """Start a llama.cpp server, and stop it at the end."""
    server = Llama(path)
    yield server
    del server
    gc.collect()


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return logits - np.logaddexp.reduce(logits)


def settings(**changes: object) -> ConvertSettings:
    return ConvertSettings.model_validate({key: str(value) for key, value in changes.items()})


def write_checkpoint(folder: Path, tokenizer: Tokenizer, scale: float = 0.4, **changes: Any) -> tuple[Path, GPT]:
    """Save a network with random weights, large enough that it is far from linear; return the file and the model."""
    sizes = {"vocab_size": tokenizer.vocab_size, "n_embd": 32, "block_size": 64}
    model = tiny_model(**{**sizes, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (scale if parameter.dim() > 1 else 0.1))
    checkpoint = make_checkpoint(asdict(model.config), model_arrays(model), tokenizer.to_dict())
    checkpoints.save_checkpoint(checkpoint, folder / "best.safetensors")
    return folder / "best.safetensors", model


@pytest.mark.parametrize(("architecture", "network", "tolerance"), NETWORKS.values(), ids=NETWORKS)
def test_llama_cpp_computes_same_probabilities(
    tmp_path: Path, architecture: str, network: dict[str, Any], tolerance: float, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = write_checkpoint(tmp_path, CharTokenizer(CHARACTERS), **network)
    message = to_gguf.export_gguf(path, settings(out=tmp_path / "model.gguf"))
    assert f"model.gguf: for llama.cpp, as {architecture}; " in message
    assert bool(capsys.readouterr().err) == (network.get("activation") == "gelu_erf")
    random = np.random.default_rng(0)
    with start_llama(tmp_path / "model.gguf") as llama, torch.no_grad():
        for length in (1, 2, 30, 63):
            tokens = random.integers(len(CHARACTERS), size=length).tolist()
            expected = log_softmax(model(torch.tensor([tokens]))[0, -1].double().numpy())
            log_probs = llama.log_probs(tokens, len(CHARACTERS))
            np.testing.assert_allclose(log_probs, expected, rtol=0, atol=tolerance)


TRAINED = {name: NETWORKS[name][1] for name in ("qk_norm",)}
VERSE = """A small machine sat down to read,
and read one page again, again;
it learned the shape of every word,
thé crème brûlée, the 🙂, the rain.

"""


@pytest.mark.parametrize("network", TRAINED.values(), ids=TRAINED)
def test_trained_model_generates_same_200_characters(tmp_path: Path, network: dict[str, Any]) -> None:
    prepare_text(VERSE * 80, tmp_path)  # memorized, so that no two characters are about equally probable
    sizes = {"n_embd": 64, "block_size": 208, "max_steps": 150, "eval_every": 150}
    optimization = {"optimizer": "muon", "learning_rate": 0.02, "min_lr": 0.0}
    train.main(tiny_settings(tmp_path, tmp_path / "run", **{"bias": False, **sizes, **optimization, **network}))
    to_gguf.export_gguf(tmp_path / "run", settings(out=tmp_path / "model.gguf"))
    checkpoint = checkpoints.load_checkpoint(tmp_path / "run" / "best.safetensors")
    decoder = decoder_of(build_model(checkpoint))
    tokenizer = CharTokenizer("".join(sorted(set(VERSE))))
    prompt = tokenizer.encode("A small ").astype(np.int64)
    tokens = generate(
        decoder, prompt, block_size=208, num_samples=1, max_new_tokens=200, params=SamplingParams(temperature=0), seed=0
    )
    text = decode(tokenizer, [int(token[0]) for token in tokens])
    assert "it learned" in text
    with start_llama(tmp_path / "model.gguf") as llama:
        assert llama.complete("A small ", 200, temperature=0)["content"] == text


def encode_known(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text without its unknown characters."""
    unknown = tokenizer.unknown_characters(text)
    return tokenizer.encode("".join(character for character in text if character not in unknown)).tolist()


TOKENIZERS = {
    "characters": CharTokenizer(CHARACTERS), "ascii": CharTokenizer("\n ab"), "bytes": ByteTokenizer(),
    "bpe": learn_bpe([CHARACTERS, *some_text(3000).splitlines()] * 2, 290),
}  # fmt: skip


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_llama_cpp_encodes_same_ids_and_skips_unknown_characters(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, _ = write_checkpoint(tmp_path, tokenizer)
    to_gguf.export_gguf(path, settings(out=tmp_path / "model.gguf"))
    with start_llama(tmp_path / "model.gguf") as llama:
        ids = (
            tokenizer.encode(CHARACTERS).tolist()
            if tokenizer.kind in ("byte", "bpe")
            else [*range(tokenizer.vocab_size)]
        )
        assert llama.post("detokenize", tokens=ids)["content"] == decode(tokenizer, ids)

        @hypothesis_settings(deadline=None, max_examples=100)
        @given(st.text(CHARACTERS + UNKNOWN) | st.text(st.characters(exclude_categories=["Cs"])))
        def check(text: str) -> None:
            assert llama.encode(text) == encode_known(tokenizer, text)

        check()
        for text in (CHARACTERS, UNKNOWN, to_gguf.END, "<|endoftext|>", "a  \n\n b\r\n", "'s 's", ""):
            if text == "<|endoftext|>" and tokenizer.end_of_text:
                continue  # llama.cpp reads it as the token that separates documents
            assert llama.encode(text) == encode_known(tokenizer, text)


def test_llama_cpp_encodes_same_bpe_tokens(tmp_path: Path, gpt2_data_dir: Path) -> None:
    tokenizer = GPT2Tokenizer(gpt2_data_dir)
    path, _ = write_checkpoint(tmp_path, tokenizer)
    to_gguf.export_gguf(path, settings(out=tmp_path / "model.gguf", data_dir=gpt2_data_dir))
    with start_llama(tmp_path / "model.gguf") as llama:
        for text in (TEXT, some_text(500), "a  b\n\n\n c\t 12345 don't WE'RE", "日本語 e\u0301 🙂👩‍👩‍👧", " "):
            assert llama.encode(text) == tokenizer.encode(text).tolist()


@pytest.mark.parametrize("tokenizer", [tokenizer for tokenizer in TOKENIZERS.values() if not tokenizer.end_of_text])
def test_llama_cpp_generates_to_requested_length(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, _ = write_checkpoint(tmp_path, tokenizer, scale=0, n_embd=4)  # all tokens are about equally probable
    to_gguf.export_gguf(path, settings(out=tmp_path / "model.gguf"))
    with start_llama(tmp_path / "model.gguf") as llama:
        params = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}
        responses = [llama.complete("a", 60, seed=seed, **params) for seed in range(20)]
        assert {(response["stop_type"], response["tokens_evaluated"]) for response in responses} == {("limit", 1)}
        assert max(token for response in responses for token in response["tokens"]) < tokenizer.vocab_size


@pytest.mark.parametrize("base", TOKENIZERS.values(), ids=TOKENIZERS)
def test_llama_cpp_begins_and_ends_records(tmp_path: Path, base: Tokenizer) -> None:
    tokenizer = RecordTokenizer(base, "\n")
    path, _ = write_checkpoint(tmp_path, tokenizer, scale=0, n_embd=4)  # all tokens are about equally probable
    to_gguf.export_gguf(path, settings(out=tmp_path / "model.gguf"))
    with start_llama(tmp_path / "model.gguf") as llama:
        response = llama.complete("a", 3000, temperature=1, top_k=0, top_p=1, min_p=0, seed=1)
        assert (response["stop_type"], response["tokens_evaluated"]) == ("eos", 2)
        assert llama.post("tokenize", content="ab", add_special=True)["tokens"] == [
            tokenizer.end_of_text,
            *encode_known(base, "ab"),
        ]


def test_added_token_is_never_most_probable(tmp_path: Path) -> None:
    path, _ = write_checkpoint(tmp_path, CharTokenizer(CHARACTERS), tie_embeddings=False)
    checkpoint = checkpoints.load_checkpoint(path)
    config = checkpoint.config
    checkpoint.model["head.weight"] += 1
    head = to_gguf.gguf_tensors(config, checkpoint.model, add_end=True)["output.weight"]
    states = np.random.default_rng(0).standard_normal((32, 1000), np.float32)
    for logits in (head @ states, head @ -np.abs(states)):
        assert (logits[-1] < logits[:-1].max(0)).all()
    assert (logits < 0).all(), "otherwise a row of zeros would pass, too"


@pytest.mark.parametrize(
    ("network", "advice"),
    [
        ({"ngram": 3}, "with norm = 'layernorm' it needs ngram = 1"),
        ({"token_shift": True, "qk_norm": True}, "it needs token_shift = false, qk_norm = false"),
        ({"activation": "relu2"}, "it needs activation = 'gelu'"),
        ({"norm": "rmsnorm"}, "'rmsnorm' it needs position = 'rotary', activation = 'relu2', bias = false"),
    ],
)
def test_unsupported_network_is_refused(tmp_path: Path, network: dict[str, Any], advice: str) -> None:
    path, _ = write_checkpoint(tmp_path, CharTokenizer(CHARACTERS), **network)
    with pytest.raises(UserError) as caught:
        to_gguf.export_gguf(path, settings(out=tmp_path / "model.gguf"))
    assert str(caught.value).startswith(f"{path}: llama.cpp has no such network; ")
    assert str(caught.value).endswith(advice)
    assert not (tmp_path / "model.gguf").exists()


def test_inconsistent_checkpoint_is_refused(tmp_path: Path) -> None:
    path, _ = write_checkpoint(tmp_path, CharTokenizer(CHARACTERS))
    checkpoint = checkpoints.load_checkpoint(path)
    for part, changes, message in (
        ("tokenizer", {"characters": "ab"}, "its tokenizer and its network differ in vocabulary size"),
        ("model", {"n_layer": 3}, "its config and its weights do not belong together"),
    ):
        metadata = checkpoint.metadata.model_copy(update={part: getattr(checkpoint.metadata, part) | changes})
        checkpoints.save_checkpoint(replace(checkpoint, metadata=metadata), path)
        with pytest.raises(UserError, match=f"^{path}: {message}$"):
            to_gguf.export_gguf(tmp_path, settings(out=tmp_path / "model.gguf"))
    checkpoint.model["norm.weight"][0] = np.nan
    checkpoints.save_checkpoint(checkpoint, path)
    with pytest.raises(UserError, match="some weights are not finite"):
        to_gguf.export_gguf(tmp_path, settings(out=tmp_path / "model.gguf"))
    path.write_bytes(b"GGUF")
    with pytest.raises(UserError, match=f"^{path}: "):
        to_gguf.export_gguf(tmp_path, settings(out=tmp_path / "model.gguf"))
    assert not (tmp_path / "model.gguf").exists()


def test_existing_file_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    path, _ = write_checkpoint(tmp_path, CharTokenizer(CHARACTERS))
    out = tmp_path / "model.gguf"
    out.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists already; add --overwrite"):
        to_gguf.export_gguf(path, settings(out=out))
    assert out.read_bytes() == b"mine"
    to_gguf.export_gguf(path, settings(out=out, overwrite=True))
    assert out.read_bytes().startswith(b"GGUF")


def test_full_disk_leaves_existing_file_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf import GGUFWriter  # noqa: PLC0415

    def disk_full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path, _ = write_checkpoint(tmp_path, CharTokenizer(CHARACTERS))
    out = tmp_path / "model.gguf"
    out.write_bytes(b"mine")
    monkeypatch.setattr(GGUFWriter, "write_tensors_to_file", disk_full)
    with pytest.raises(
        UserError, match=r"model.gguf: could not be written: No space left on device; the previous file is unchanged$"
    ):
        to_gguf.export_gguf(path, settings(out=out, overwrite=True))
    assert {file.name: file.read_bytes() for file in tmp_path.glob("model*")} == {"model.gguf": b"mine"}


def test_missing_gguf_package_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"^writing GGUF needs gguf: pip install gguf$"):
        to_gguf.export_gguf(tmp_path, settings(out=tmp_path / "model.gguf"))


def test_gguf_metadata_describes_network(tmp_path: Path) -> None:
    from gguf import GGUFReader  # noqa: PLC0415

    path, _ = write_checkpoint(tmp_path, CharTokenizer(CHARACTERS), position="rotary")
    to_gguf.export_gguf(path, settings(out=tmp_path / "model.gguf"))
    reader = GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "gptneox"
    assert fields["general.name"] == tmp_path.name
    assert [fields[f"gptneox.{key}"] for key in ("context_length", "embedding_length", "block_count")] == [64, 32, 2]
    assert [fields[f"gptneox.{key}"] for key in ("feed_forward_length", "attention.head_count")] == [128, 2]
    assert math.isclose(fields["gptneox.attention.layer_norm_epsilon"], 1e-5, rel_tol=1e-6)
    assert (fields["gptneox.rope.dimension_count"], fields["gptneox.rope.freq_base"]) == (16, 10000)
    assert fields["gptneox.use_parallel_residual"] is False
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}
    assert len(fields["tokenizer.ggml.tokens"]) == len(CHARACTERS) + 1


def test_command_line_exports_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, CharTokenizer(CHARACTERS))
    monkeypatch.setattr(sys, "argv", ["convert", "to-gguf", str(tmp_path), f"--out={tmp_path / 'new' / 'model.gguf'}"])
    convert.main()
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'new' / 'model.gguf'}: for llama.cpp, as gpt2; ")
