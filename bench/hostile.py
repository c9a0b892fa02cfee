"""Hostile inputs of bench/faults.py: corrupt and forged files, and random texts, settings and prompts.

A trial passes if the input is used as it is, or rejected with a `UserError`, whose message is all that a user sees.
"""

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st
from tqdm import tqdm

import prepare
import sample
import train
from glyphgpt import checkpoint as checkpoints
from glyphgpt.cli import parse
from glyphgpt.data.dataset import load_dataset
from glyphgpt.data.text import open_text
from glyphgpt.data.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer, decode
from glyphgpt.errors import UserError
from glyphgpt.files import BEST, LAST, META
from glyphgpt.settings import PrepareSettings, SampleSettings, TrainSettings
from harness import ROOT, Tally, Workspace, check_call, peak_memory

Json = Any
UNEXPECTED: list[Json] = [
    None, True, -1, 0, 1, 7, 2**31, 10**18, 10**300, 0.5, -1e300, float("nan"), float("inf"), "", "x", "../../x",
    "a\0b", "\ud800", "rotary", "F64", "U8", [], {}, [0], [-1], [2**62, 2], {"a": {}}, [[[[[[]]]]]],
]  # fmt: skip
"""Values that replace others in JSON."""
MAX_GROWTH = 100 * 2**20
"""Bytes of memory that a small forged file may cost at most."""


def corruption(workspace: Workspace, trials: int) -> Tally:
    """Truncate checkpoints at random lengths, and change random bytes: none loads."""
    tally, path = Tally(), workspace.scratch / "corrupt.safetensors"
    for trial in range(2 * trials):
        content = (workspace.reference_run / (BEST, LAST)[trial // 2 % 2]).read_bytes()
        offset = workspace.rng.randrange(len(content))
        changed = bytes([content[offset] ^ workspace.rng.randint(1, 255)]) + content[offset + 1 :]
        path.write_bytes(content[:offset] + changed * (trial % 2))
        try:
            checkpoints.load_checkpoint(path)
            tally.add_trial(f"loaded, though corrupt at {offset} of {len(content)} bytes")
        except UserError as error:
            tally.add_trial(str(error) if "\n" in str(error) else "")
    return tally


def forged_checkpoints(workspace: Workspace, trials: int) -> Tally:
    """Change the header of a checkpoint at random, with a valid checksum, then sample from it and resume it."""
    tally, out_dir = Tally(), workspace.new_run_dir()
    out_dir.mkdir()
    resume = workspace.train_settings(out_dir, resume=True, max_steps=61)
    sampling = SampleSettings(max_new_tokens=3, device="cpu", data_dir=str(workspace.data_dir))
    peak_before = peak_memory()
    for trial in range(trials):
        header, data = read_safetensors(workspace.reference_run / (BEST, LAST)[trial % 2])
        if trial % 4 < 2:
            header = mutate(header, workspace.rng)
        else:
            metadata = json.loads(header["__metadata__"]["glyphgpt"])
            header["__metadata__"]["glyphgpt"] = json.dumps(mutate(metadata, workspace.rng))
        for name in (BEST, LAST):
            (out_dir / name).write_bytes(make_safetensors(header, data))
        failure = check_call(lambda: sample.main(sampling, str(out_dir / BEST)), tally)
        failure = failure or check_call(lambda: train.main(resume), tally)
        growth = peak_memory() - peak_before
        failure = failure or (f"{growth:,} bytes of memory" if growth > MAX_GROWTH else "")
        tally.add_trial(failure and f"{failure}: {json.dumps(header)[:3000]}")
    return tally


def forged_datasets(workspace: Workspace, trials: int) -> Tally:
    """Change meta.json or a shard of a dataset, with or without records, with valid checksums, and train on it."""
    tally, folder = Tally(), workspace.data_dir / "forged"
    (workspace.scratch / "records.txt").write_text(workspace.text.replace(" ", "\n"), encoding="utf-8")
    workspace.prepare(workspace.scratch / "records.txt", "records", "--records=lines")
    datasets = [
        {path.name: path.read_bytes() for path in (workspace.data_dir / name).iterdir()}
        for name in ("small", "records")
    ]
    folder.mkdir()
    for trial in range(trials):
        intact = workspace.rng.choice(datasets)
        for name, content in intact.items():
            (folder / name).write_bytes(content)
        meta = json.loads(intact[META])
        if trial % 2:
            meta = mutate(meta, workspace.rng)
        else:
            shard = meta[workspace.rng.choice(("train", "val"))]["shards"][0]
            changed = bytearray(intact[shard["file"]])
            start, length = workspace.rng.randrange(len(changed)), workspace.rng.choice((0, 1, 4, 400))
            changed[start : start + length] = workspace.rng.randbytes(workspace.rng.randrange(9))
            (folder / shard["file"]).write_bytes(changed)
            shard["sha256"] = hashlib.sha256(changed).hexdigest()
        (folder / META).write_text(json.dumps(meta), encoding="utf-8")
        settings = workspace.train_settings(workspace.new_run_dir(), dataset="forged", max_steps=1)
        failure = check_call(partial(train.main, settings), tally)
        tally.add_trial(failure and f"{failure}: {json.dumps(meta)[:3000]}")
    return tally


def random_bytes(workspace: Workspace, trials: int) -> Tally:
    """Prepare random bytes: the splits decode to the same bytes, in blocks of any order, or there is no dataset.

    Records lose the line ends around them.
    """
    tally, file = Tally(), workspace.scratch / "random.txt"
    text = st.text(min_size=20, max_size=200).map(str.encode)
    contents = st.one_of(
        st.binary(max_size=200), text, text, st.tuples(text, st.binary(max_size=3), text).map(b"".join)
    )

    ways = st.sampled_from([{}, {"split": "blocks"}, {"records": "lines"}, {"records": "0"}])

    @given(contents, st.sampled_from(["char", "byte"]), ways, st.sampled_from([0, 0.2]))
    def trial(content: bytes, tokenizer: str, way: dict[str, str], test_fraction: float) -> None:
        file.write_bytes(content)
        values = {"name": "random", "tokenizer": tokenizer, "test_fraction": test_fraction, **way}
        settings = PrepareSettings.model_validate(
            {**values, "data_dir": str(workspace.data_dir), "overwrite": True, "report": bool(test_fraction)}
        )
        errors: list[UserError] = []

        def prepare_file() -> None:
            try:
                prepare.prepare_files([str(file)], settings)
            except UserError as error:
                errors.append(error)
                raise

        failure = check_call(prepare_file, tally)
        if errors:
            with suppress(UnicodeDecodeError):
                failure = f"rejected: {errors[0]}" if len(content.decode()) > 40 and "records" not in way else ""
        elif not failure:
            dataset = load_dataset(workspace.data_dir / "random", workspace.data_dir)
            splits = [part for part in (dataset.train, dataset.val, dataset.test) if part]
            text = "".join(decode(dataset.tokenizer, part.slice(0, part.tokens)) for part in splits)
            dropped = "\r\n0" if "records" in way else ""
            kept, expected = (
                sorted(each.translate(dict.fromkeys(map(ord, dropped)))) for each in (text, content.decode())
            )
            same = kept == expected if way else text.encode() == content
            failure = "" if same else "decoded to another text"
        tally.add_trial(failure and f"{failure}: {content!r}")

    run_examples(trial, trials)
    return tally


def random_links(workspace: Workspace, trials: int) -> Tally:
    """Read folders of random links of every kind, named in five ways: each file is read once, and reading ends."""
    tally = Tally()
    for trial in tqdm(range(trials), desc="links", leave=False):
        top = workspace.scratch / f"tree-{trial}"
        expected = make_tree(top, workspace.rng)
        if not expected:
            tally.count("no files")
        files = [str(path) for path in top.rglob("*") if path.is_file()]  # rglob follows no links
        workspace.rng.shuffle(files)
        for patterns in ([str(top)], [f"{top}/**/*"], files, [*files, str(top)], [f"{top}/*", str(top)]):
            texts: list[str] = []

            def read(patterns: list[str] = patterns, texts: list[str] = texts) -> None:
                texts += chain.from_iterable(open_text(patterns, workspace.scratch).read(lambda _: None))

            failure = check_call(read, tally)
            if sorted("".join(texts).split()) != expected:
                failure = failure or f"{patterns[:2]}: {len(texts)} files instead of {len(expected)}"
            tally.add_trial(failure)
        shutil.rmtree(top)
    return tally


def make_tree(top: Path, rng: random.Random) -> list[str]:
    """Create a folder of links and of files, each with a unique word; return the words, sorted."""
    folders, files = [top], list[Path]()
    top.mkdir()
    for number in range(rng.randint(1, 12)):
        names = [f"n{number}", f"n{number}.txt", f"n {number}\n", f"{number}\udce9"]
        path = rng.choice(folders) / rng.choice(names)
        kind = rng.choice(["file", "file", "folder", "link", "hard link", "loop", "dangling"])
        if kind == "folder":
            path.mkdir()
            folders.append(path)
        elif kind == "file":
            path.write_text(f"word-{number}\n", encoding="utf-8")
            files.append(path)
        elif kind == "dangling":
            path.symlink_to("nowhere")
        elif kind == "loop":
            path.symlink_to(rng.choice(folders), target_is_directory=True)
        elif files:
            (path.symlink_to if kind == "link" else path.hardlink_to)(rng.choice(files))
    return sorted(file.read_text(encoding="utf-8").strip() for file in files)


def random_unicode(_: Workspace, trials: int) -> Tally:
    """Encode and decode random Unicode with every tokenizer: the same text returns."""
    tally, tokenizers = Tally(), list[Tokenizer]([ByteTokenizer()])
    try:
        tokenizers.append(GPT2Tokenizer(ROOT / "data"))
    except UserError:
        tally.count("without GPT-2's tokenizer, which could not be downloaded")

    @given(st.text(max_size=100), st.integers(0, len(tokenizers)))
    def trial(text: str, number: int) -> None:
        def encode_and_decode() -> None:
            learn = number == len(tokenizers)
            tokenizer: Tokenizer = CharTokenizer.learn([text, "x"]) if learn else tokenizers[number]
            ids = tokenizer.encode(text)
            if decode(tokenizer, ids) != text or (ids.size and ids.max() >= tokenizer.vocab_size):
                raise AssertionError("decoded to another text")

        failure = check_call(encode_and_decode, tally)
        tally.add_trial(failure and f"{failure}: {text!r}")

    run_examples(trial, trials)
    return tally


KEYS = sorted({*TrainSettings.model_fields, *SampleSettings.model_fields, *PrepareSettings.model_fields})
UNEXPECTED_VALUES = st.one_of(
    st.text(max_size=20), st.integers().map(str), st.floats().map(str),
    st.sampled_from(["true", "false", "0", "1", "64", "1e-3", "inf", "9" * 5000, "[]", "{}", "'''", '"\\u0000"']),
)  # fmt: skip
DEFAULTS = {key: str(field.default) for key, field in TrainSettings.model_fields.items()}
VALID = st.sampled_from([(key, value) for key, value in DEFAULTS.items() if value.replace(".", "").isdigit()])
PAIRS = st.one_of(VALID, VALID, st.tuples(st.sampled_from([*KEYS, "n_layers"]), UNEXPECTED_VALUES))
"""Settings with values, two thirds of them valid."""


def random_toml(workspace: Workspace, trials: int) -> Tally:
    """Parse random text as a settings file."""
    tally, file = Tally(), workspace.scratch / "random.toml"
    texts = st.one_of(st.text(max_size=80), *[st.lists(PAIRS.map(" = ".join), max_size=5).map("\n".join)] * 3)

    @given(texts)
    def trial(text: str) -> None:
        file.write_text(text, encoding="utf-8", newline="")
        failure = check_call(lambda: parse(TrainSettings, [str(file)], "", "", files=True), tally)
        tally.add_trial(failure and f"{failure}: {text!r}")

    run_examples(trial, trials)
    return tally


def random_command_lines(_: Workspace, trials: int) -> Tally:
    """Parse random arguments as a command line of each script."""
    tally = Tally()
    flag = st.one_of(
        PAIRS.map(lambda pair: [f"--{pair[0]}={pair[1]}"]), PAIRS.map(lambda pair: [f"--{pair[0]}", pair[1]])
    )
    groups = st.lists(st.one_of(*[flag] * 4, st.text(max_size=20).map(lambda word: [word])), max_size=4)

    @given(groups, st.sampled_from([TrainSettings, SampleSettings, PrepareSettings]))
    def trial(groups: list[list[str]], settings_class: Any) -> None:
        args = [word for group in groups for word in group]
        failure = check_call(lambda: parse(settings_class, args, "", "", files=settings_class is TrainSettings), tally)
        tally.add_trial(failure and f"{failure}: {args!r}")

    run_examples(trial, trials)
    return tally


PROMPTS = {
    "empty": "", "one character": "t", "longer than block_size": "to be or not " * 50, "unknown characters": "ÄÖÜ",
    "one unknown character": "to be Ä", "1 MB": "to be or not " * 77_000, "NUL": "\0", "undecodable byte": "to\udcff",
    "right to left": "\u202eשלום", "combining": "e\u0301\u0301\u0301", "emoji": "\U0001f468\u200d\U0001f469",
    "control characters": "\x1b[31m\r\x07",
}  # fmt: skip


def unusual_prompts(workspace: Workspace, trials: int) -> Tally:
    """Sample from unusual prompts: the output begins with the prompt, or the error names the unknown characters."""
    tally = Tally()
    for trial, (kind, prompt) in enumerate(list(PROMPTS.items()) * -(-trials // len(PROMPTS))):
        for skip_unknown in (False, True):
            settings = SampleSettings.model_validate(
                {"prompt": prompt, "max_new_tokens": 5, "skip_unknown": skip_unknown, "seed": trial, "device": "cpu"}
            )
            output, unknown = StringIO(), set(prompt) - set(workspace.text)
            failure = ""
            try:
                with redirect_stdout(output), redirect_stderr(StringIO()):
                    sample.main(settings, str(workspace.reference_run))
                passed = output.getvalue().startswith(prompt) and not (unknown and not skip_unknown)
                failure = "" if passed else f"unexpected output: {output.getvalue()[:100]!r}"
            except UserError as error:
                named = all(repr(character) in str(error) for character in sorted(unknown)[:10])
                failure = "" if unknown and not skip_unknown and named else f"rejected: {error}"
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"
            tally.add_trial(failure and f"{kind}, skip_unknown={skip_unknown}: {failure}")
    return tally


def run_examples(trial: Callable[..., None], count: int) -> None:
    """Run a Hypothesis test on a number of random examples, without its database, deadline and shrinking."""
    settings = hypothesis.settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    settings(trial)()


def mutate(value: dict[str, Json], rng: random.Random) -> dict[str, Json]:
    """Return a JSON object with one to three parts replaced, slightly changed, deleted, duplicated or swapped."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        parent: Json = value
        key: Any = rng.choice(list(value) or ["x"])
        while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.8:
            parent = parent[key]
            key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        kind = rng.random()
        if kind < 0.4:
            parent[key] = copy.deepcopy(rng.choice(UNEXPECTED))
        elif kind < 0.8 or isinstance(parent, list):
            parent[key] = perturb(parent[key], rng)
        elif kind < 0.9:
            del parent[key]
        elif kind < 0.95:
            parent[str(key) + rng.choice("x./\0é")] = parent[key]
        else:
            other = rng.choice(list(parent))
            parent[key], parent[other] = parent[other], parent[key]
    return value


def perturb(value: Json, rng: random.Random) -> Json:
    """Return a JSON value of the same type that differs slightly."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice([value - 1, value + 1, 2 * value, -value, value // 2])
    if isinstance(value, str):
        index = rng.randint(0, len(value))
        return rng.choice([value[:index], value[index:], value[:index] + value[index + 1 :], value + value])
    if isinstance(value, list):
        return [perturb(item, rng) for item in value]
    return value


def read_safetensors(path: Path) -> tuple[dict[str, Json], bytes]:
    """Return the header and the data of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def make_safetensors(header: dict[str, Json], data: bytes) -> bytes:
    """Return a safetensors file; if its header has the key sha256, its value becomes the valid checksum."""
    text = json.dumps(header, separators=(",", ":")).encode()
    key = b'"sha256":"'
    offset = text.find(key) + len(key)
    text = text[:offset] + b"0" * 64 + text[offset + 64 :]
    content = len(text).to_bytes(8, "little") + text + data
    digest = hashlib.sha256(content).hexdigest().encode()
    return content[: 8 + offset] + digest + content[8 + offset + 64 :]
