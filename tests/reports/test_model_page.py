"""A model's page: its scripts compute what the NumPy network, the samplers and the tokenizers compute."""

import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from conftest import MODERN, NETWORKS, decoder_of, random_model, some_text, tiny_settings
from glyphgpt.data.bpe import learn_bpe
from glyphgpt.data.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, RecordTokenizer, Tokenizer, decode
from glyphgpt.files import BEST
from glyphgpt.inference.generate import SamplingParams, context_start, generate
from glyphgpt.inference.loading import open_checkpoint
from glyphgpt.inference.numpy_gpt import NumpyGPT
from glyphgpt.reports.attention_maps import attention_weights
from glyphgpt.reports.model_page import page_data, tokenizer_data
from glyphgpt.reports.templates import read
from glyphgpt.settings import ModelConfig
from glyphgpt.training.torch_state import model_arrays
from model import GPT

SIZES: list[dict[str, Any]] = [
    {"n_embd": 6, "n_head": 3, "vocab_size": 2, "block_size": 3, "n_layer": 1},
    {"n_embd": 18, "n_head": 3, "vocab_size": 300, "block_size": 20, "n_layer": 3, **MODERN, "ngram": 6},
    {"position": "sinusoidal", "init": "zero", "tie_embeddings": False},  # init changes the embedding scale
]
HOSTILE = "</script><b>$x_1$ {data} 😀 שלום é\n\t\0\u202e</SCRIPT>"


def run_page(body: str, data: Any = None) -> Any:
    """Run the page's network and text in Node, and return the result of a function of `data` with this body."""
    node = shutil.which("node")
    if not node:
        pytest.skip("Node.js is not installed (Debian: nodejs)")
    scripts = read("gpt.js") + read("text.js")
    wrapped = f"const run = (data) => {{ {body} }}; const data = JSON.parse(require('fs').readFileSync(0));"
    program = f"{scripts}\n{wrapped}\nconsole.log(JSON.stringify(run(data)));"
    done = subprocess.run(
        [node, "-e", program], input=json.dumps(data), capture_output=True, encoding="utf-8", check=False, timeout=120
    )
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout)


LOAD = """
    const load = ({config, weights}) => new GPT(config, Object.fromEntries(Object.entries(weights).map(
        ([name, {shape, values}]) => [name, new Weight(shape, Float32Array.from(values))])));
"""


def network(model: GPT) -> dict[str, Any]:
    """Return a network as `load` of LOAD reads it."""
    config = ModelConfig(**asdict(model.config))
    weights = {
        name: {"shape": weight.shape, "values": weight.flatten().tolist()}
        for name, weight in model_arrays(model).items()
    }
    return {"config": config.model_dump() | {"embedding_scale": config.embedding_scale}, "weights": weights}


def expected_logits(decoder: NumpyGPT, tokens: list[int], index: int) -> np.ndarray[Any, Any]:
    """Return the logits (V) that predict token `index`, as sample.py computes them."""
    start = context_start(index, decoder.config.block_size)
    return np.asarray(decoder.next_logits(np.array([tokens[start:index]]), decoder.new_cache(1))[0])


def test_the_network_computes_the_logits_of_the_numpy_network() -> None:
    models = [random_model(**changes) for changes in NETWORKS[::7] + SIZES]
    texts = [np.random.default_rng(i).integers(m.config.vocab_size, size=8).tolist() for i, m in enumerate(models)]
    logits = run_page(
        LOAD + """
        return data.map(({net, tokens}) => {
            const text = new ModelText(load(net), null);
            text.tokens = tokens;
            while (!text.isRead) text.read();
            return tokens.map((_, i) => Array.from(text.logits(i + 1)));
        });
        """,
        [{"net": network(model), "tokens": tokens} for model, tokens in zip(models, texts, strict=True)],
    )  # fmt: skip
    for model, tokens, rows in zip(models, texts, logits, strict=True):
        decoder = decoder_of(model)
        for index, row in enumerate(rows, start=1):
            np.testing.assert_allclose(
                row, expected_logits(decoder, tokens, index), atol=3e-5, err_msg=str(model.config)
            )


@pytest.mark.parametrize("changes", [{}, MODERN], ids=["gpt2", "modern"])
def test_greedy_text_is_that_of_sample(changes: dict[str, Any]) -> None:
    model = random_model(std=0.5, **changes)
    tokens = generate(
        decoder_of(model), np.array([3, 1, 4]), block_size=model.config.block_size, num_samples=1, max_new_tokens=100,
        params=SamplingParams(temperature=0), seed=1,
    )  # fmt: skip
    written = run_page(
        LOAD + """
        const text = new ModelText(load(data), new ByteTokenizer());
        for (const token of [3, 1, 4]) text.append(token);
        for (let i = 0; i < 100; i++) {
            while (!text.isRead) text.read();
            const probs = samplingProbs(text.logits(text.tokens.length), {temperature: 0, topK: 0, topP: 1, minP: 0});
            text.append(draw(probs, uniform(1, i)));
        }
        return text.tokens;
        """,
        network(model),
    )  # fmt: skip
    assert written == [3, 1, 4, *(int(token) for (token,) in tokens)]


def test_edits_leave_what_the_model_reads_from_the_new_text() -> None:
    model = random_model(**MODERN | {"vocab_size": 26})
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    rng = np.random.default_rng(1)
    edits: list[Any] = []
    for _ in range(40):
        text = "".join(rng.choice(list(alphabet + "!"), size=rng.integers(30)))
        edits.append([text, int(rng.integers(len(text) + 1)), rng.integers(26, size=rng.integers(12)).tolist()])
    rows = run_page(
        LOAD + """
        const text = new ModelText(load(data.net), new CharTokenizer({characters: data.alphabet}));
        return data.edits.map(([edited, piece, added], i) => {
            text.text = i % 2 ? edited : text.text.slice(0, 9) + edited; // the beginning stays
            for (let steps = 0; steps < 25 && !text.isRead; steps++) text.read();
            if (piece < text.pieces.length) text.cut(piece);
            for (const token of added) text.append(token);
            while (!text.isRead) text.read();
            const logits = text.tokens.map((_, i) => Array.from(text.logits(i + 1)));
            return {text: text.text, tokens: text.tokens, bits: [...text.bits], logits};
        });
        """,
        {"net": network(model), "alphabet": alphabet, "edits": edits},
    )  # fmt: skip
    decoder = decoder_of(model)
    for row in rows:
        tokens = row["tokens"]
        assert [alphabet.index(character) for character in row["text"] if character != "!"] == tokens
        expected = [expected_logits(decoder, tokens, index) for index in range(1, len(tokens) + 1)]
        np.testing.assert_allclose(np.array(row["logits"]).reshape(-1, 26), np.reshape(expected, (-1, 26)), atol=3e-5)
        assert len(row["bits"]) == (len(tokens) if len(tokens) > 1 else 0)
        for bits, logits, token in zip(row["bits"][1:], expected, tokens[1:], strict=False):
            log_probs = logits - np.logaddexp.reduce(logits)
            assert bits == pytest.approx(-log_probs[token] / np.log(2), abs=1e-3)


def test_attention_weights_are_those_of_the_network() -> None:
    model = random_model(std=0.5, **MODERN)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    maps = run_page(
        LOAD + """
        const text = new ModelText(load(data.net), null);
        text.tokens = data.tokens;
        while (!text.isRead) text.read();
        return [0, 1].map((layer) => [0, 1].map((head) => data.tokens.map(
            (_, i) => [...text.attention(i + 1, layer, head).weights, ...Array(7 - i).fill(0)])));
        """,
        {"net": network(model), "tokens": tokens},
    )  # fmt: skip
    expected = attention_weights(model, torch.tensor(tokens))
    np.testing.assert_allclose(maps, expected.numpy(), atol=1e-5)


def test_sampling_parameters_mean_the_same_as_in_sample() -> None:
    rng = np.random.default_rng(0)
    cases: list[dict[str, Any]] = []
    for _ in range(300):
        logits = rng.choice(2000, size=rng.integers(1, 30), replace=False) / 128  # different, or top_k is ambiguous
        params = (
            rng.choice([0.05, 0.8, 3]),
            rng.integers(30),
            rng.choice([0.01, 0.3, 0.9, 1]),
            rng.choice([0, 0.1, 1]),
        )
        keys = ("temperature", "topK", "topP", "minP")
        cases.append({"logits": logits.tolist(), "params": dict(zip(keys, map(float, params), strict=True))})
    found = run_page("return data.map(({logits, params}) => Array.from(samplingProbs(logits, params)));", cases)
    for case, page_probs in zip(cases, found, strict=True):
        temperature, top_k, top_p, min_p = case["params"].values()
        probs = SamplingParams(temperature, int(top_k), top_p, min_p).probs(np.array([case["logits"]]))[0]
        np.testing.assert_allclose(page_probs, probs / probs.sum(), atol=1e-9)


def test_tokens_are_drawn_with_their_probabilities() -> None:
    probs = [0.0, 0.5, 0.1, 0.0, 0.4, 0.0]
    for seed in (1, 2, 1000):
        drawn = run_page(f"return [...Array(20000).keys()].map((i) => draw(data, uniform({seed}, i)));", probs)
        np.testing.assert_allclose(np.bincount(drawn, minlength=6) / 20000, probs, atol=0.015)
        pairs = np.bincount(np.array(drawn[::2]) * 6 + drawn[1::2], minlength=36) / 10000
        np.testing.assert_allclose(pairs, np.outer(probs, probs).flatten(), atol=0.015)
    assert run_page("return [draw([0.2, 0.3, 0.5 - 1e-9, 0], 1 - 1e-12), draw([0, 1], 0)];") == [2, 1]


@pytest.mark.parametrize("kind", ["char", "byte", "bpe", "gpt2"])
def test_texts_have_the_tokens_of_the_tokenizer(kind: str, request: pytest.FixtureRequest) -> None:
    parts = [*"'é字🙂\n\x85\xa0\ufeff\x1f", "word", " word", "  ", "\r\n", "e\u0301", "'ll", "12", "!?"]
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(parts, size=rng.integers(1, 40))) for _ in range(100)]
    tokenizer: Tokenizer
    if kind == "gpt2":
        tokenizer = GPT2Tokenizer(request.getfixturevalue("gpt2_data_dir"))
    elif kind == "bpe":
        tokenizer = learn_bpe(texts, 300)
    else:
        tokenizer = ByteTokenizer() if kind == "byte" else CharTokenizer("".join(sorted(set("".join(parts)))))
    found = run_page(
        """
        const tokenizer = new TOKENIZERS[data.tokenizer.kind](data.tokenizer);
        return data.texts.map((text) => tokenizer.pieces(text));
        """,
        {"tokenizer": tokenizer_data(tokenizer), "texts": texts},
    )
    for text, pieces in zip(texts, found, strict=True):
        assert "".join(piece["text"] for piece in pieces) == text
        assert [token for piece in pieces for token in piece["tokens"]] == tokenizer.encode(text).tolist()
        assert all(decode(tokenizer, piece["tokens"]) == piece["text"] for piece in pieces)


@pytest.mark.parametrize("separator", ["\n", "%%", ""])
def test_records_have_their_tokens_before_and_after(separator: str) -> None:
    tokenizer = RecordTokenizer(CharTokenizer("aemnv"), separator)
    between = separator or "<|endoftext|>"
    texts = ["", "emma", f"{between}emma{between}ava", f"emma{between}{between}", between]
    found = run_page(
        """
        const tokenizer = new TOKENIZERS[data.tokenizer.kind](data.tokenizer);
        return data.texts.map((text) => tokenizer.pieces(text));
        """,
        {"tokenizer": tokenizer_data(tokenizer), "texts": texts},
    )
    tokens = [[token for piece in pieces for token in piece["tokens"]] for pieces in found]
    emma, ava = [5, 1, 2, 2, 0], [5, 0, 4, 0]
    assert tokens == [[], emma, emma + ava, [*emma, 5, 5], [5]]
    for pieces, text in zip(found, texts, strict=True):
        assert "".join(piece["text"] for piece in pieces).removeprefix(between) == text.removeprefix(between)
        assert all(decode(tokenizer, piece["tokens"]) == piece["text"] for piece in pieces)


def test_bytes_that_the_model_writes_become_characters_when_they_are_complete() -> None:
    texts = run_page(
        """
        const text = new ModelText(null, new ByteTokenizer());
        text.measure = () => {};
        return data.map((token) => { text.append(token); return text.text; });
        """,
        [*"é字".encode(), 0xC3, 0x41, 0xFF, 0x42],
    )
    assert texts == ["", "é", "é", "é", "é字", "é字", "é字\ufffdA", "é字\ufffdA\ufffd", "é字\ufffdA\ufffdB"]


@pytest.fixture(scope="module")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with every switch of MODERN, and a context of 16 tokens."""
    out_dir = tmp_path_factory.mktemp("runs") / "my run"
    train.main(tiny_settings(data_dir, out_dir, max_steps=30, learning_rate=0.01, **MODERN))
    return out_dir


@pytest.mark.parametrize(("int8", "tolerance"), [(False, 2e-2), (True, 0.3)])
def test_stored_weights_are_nearly_those_of_the_checkpoint(int8: bool, tolerance: float, run: Path) -> None:
    checkpoint, tokenizer = open_checkpoint(run / BEST, Path("data"))
    data = page_data(checkpoint, tokenizer, title="", int8=int8)
    logits = run_page(
        """
        const text = new ModelText(new GPT(data.config, readWeights(data.tensors, data.weights)), null);
        text.tokens = data.tokens;
        while (!text.isRead) text.read();
        return text.tokens.map((_, i) => Array.from(text.logits(i + 1)));
        """,
        data | {"tokens": (tokens := tokenizer.encode(some_text(60, seed=3)).tolist())},
    )
    decoder = NumpyGPT(checkpoint.config, checkpoint.model)
    expected = [expected_logits(decoder, tokens, index) for index in range(1, len(tokens) + 1)]
    np.testing.assert_allclose(logits, expected, atol=tolerance)
