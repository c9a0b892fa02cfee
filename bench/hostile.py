"""Hostile files, texts and words: attacks of bench/faults.py that need no second process.

Withstood means that the thing was used as it is, or refused with a `UserError`, whose lines are all that a user sees.
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

from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as tries
from hypothesis import strategies as st
from tqdm import tqdm

import prepare
import sample
import train
from attack import ROOT, Arena, Tally, peak_memory, trouble
from glyphgpt import checkpoint as checkpoints
from glyphgpt.cli import parse
from glyphgpt.data.dataset import META, load_dataset
from glyphgpt.data.text import open_text
from glyphgpt.data.tokenizers import ByteTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer, decode
from glyphgpt.errors import UserError
from glyphgpt.files import BEST, LAST
from glyphgpt.settings import PrepareSettings, SampleSettings, TrainSettings

Json = Any
ODD: list[Json] = [
    None, True, -1, 0, 1, 7, 2**31, 10**18, 10**300, 0.5, -1e300, float("nan"), float("inf"), "", "x", "../../x",
    "a\0b", "\ud800", "rotary", "F64", "U8", [], {}, [0], [-1], [2**62, 2], {"a": {}}, [[[[[[]]]]]],
]  # fmt: skip
"""Values that stand where others are expected."""
SIZE_CLASS = 100 * 2**20
"""Bytes of memory that no small file may cost."""


def cuts(arena: Arena, count: int) -> Tally:
    """Cut checkpoints anywhere, and change a byte anywhere: none may load."""
    tally, path = Tally(), arena.scratch / "damaged.safetensors"
    for number in range(2 * count):
        whole = (arena.straight / (BEST, LAST)[number // 2 % 2]).read_bytes()
        place = arena.random.randrange(len(whole))
        changed = bytes([whole[place] ^ arena.random.randint(1, 255)]) + whole[place + 1 :]
        path.write_bytes(whole[:place] + changed * (number % 2))
        try:
            checkpoints.load_checkpoint(path)
            tally.add(f"loaded, though damaged at {place} of {len(whole)} bytes")
        except UserError as failure:
            tally.add(str(failure) if "\n" in str(failure) else "")
    return tally


def forged_checkpoints(arena: Arena, count: int) -> Tally:
    """Change a checkpoint's header at random, seal it as a forger would, sample from it and train on from it."""
    tally, out_dir = Tally(), arena.new_run()
    out_dir.mkdir()
    resume = arena.settings(out_dir, resume=True, max_steps=61)
    draw = SampleSettings(max_new_tokens=3, device="cpu", data_dir=str(arena.data_dir))
    peak_before = peak_memory()
    for number in range(count):
        header, data = opened(arena.straight / (BEST, LAST)[number % 2])
        if number % 4 < 2:
            header = mutated(header, arena.random)
        else:
            about = json.loads(header["__metadata__"]["glyphgpt"])
            header["__metadata__"]["glyphgpt"] = json.dumps(mutated(about, arena.random))
        for name in (BEST, LAST):
            (out_dir / name).write_bytes(sealed(header, data))
        found = trouble(lambda: sample.main(draw, str(out_dir / BEST)), tally)
        found = found or trouble(lambda: train.main(resume), tally)
        grown = peak_memory() - peak_before
        found = found or (f"{grown:,} bytes of memory" if grown > SIZE_CLASS else "")
        tally.add(found and f"{found}: {json.dumps(header)[:3000]}")
    return tally


def forged_data_sets(arena: Arena, count: int) -> Tally:
    """Change a data set's meta.json or a shard at random, checksums made to fit, and train on it."""
    tally, folder = Tally(), arena.data_dir / "forged"
    whole = {path.name: path.read_bytes() for path in (arena.data_dir / "small").iterdir()}
    folder.mkdir()
    for number in range(count):
        for name, content in whole.items():
            (folder / name).write_bytes(content)
        meta = json.loads(whole[META])
        if number % 2:
            meta = mutated(meta, arena.random)
        else:
            shard = meta[arena.random.choice(("train", "val"))]["shards"][0]
            changed = bytearray(whole[shard["file"]])
            start, length = arena.random.randrange(len(changed)), arena.random.choice((0, 1, 4, 400))
            changed[start : start + length] = arena.random.randbytes(arena.random.randrange(9))
            (folder / shard["file"]).write_bytes(changed)
            shard["sha256"] = hashlib.sha256(changed).hexdigest()
        (folder / META).write_text(json.dumps(meta), encoding="utf-8")
        settings = arena.settings(arena.new_run(), dataset="forged", max_steps=1)
        found = trouble(partial(train.main, settings), tally)
        tally.add(found and f"{found}: {json.dumps(meta)[:3000]}")
    return tally


def arbitrary_bytes(arena: Arena, count: int) -> Tally:
    """Prepare any bytes: the shards give back the very bytes, or there is no data set."""
    tally, file = Tally(), arena.scratch / "any.txt"
    text = st.text(min_size=20, max_size=200).map(str.encode)
    contents = st.one_of(
        st.binary(max_size=200), text, text, st.tuples(text, st.binary(max_size=3), text).map(b"".join)
    )

    @given(contents, st.sampled_from(["char", "byte"]))
    def attack(content: bytes, tokenizer: str) -> None:
        file.write_bytes(content)
        flags = PrepareSettings.model_validate(
            {"name": "any", "tokenizer": tokenizer, "data_dir": str(arena.data_dir), "overwrite": True}
        )
        failed: list[UserError] = []

        def work() -> None:
            try:
                prepare.prepare_files([str(file)], flags)
            except UserError as failure:
                failed.append(failure)
                raise

        found = trouble(work, tally)
        if failed:
            with suppress(UnicodeDecodeError):
                found = f"refused: {failed[0]}" if len(content.decode()) > 40 else ""
        elif not found:
            dataset = load_dataset(arena.data_dir / "any", arena.data_dir)
            parts = (decode(dataset.tokenizer, split.slice(0, split.tokens)) for split in (dataset.train, dataset.val))
            found = "" if "".join(parts).encode() == content else "another text came back"
        tally.add(found and f"{found}: {content!r}")

    many(attack, count)
    return tally


def links(arena: Arena, count: int) -> Tally:
    """Grow random folders with links of every kind: however they are named, each file is read once, and all end."""
    tally = Tally()
    for number in tqdm(range(count), desc="links", leave=False):
        top = arena.scratch / f"tree-{number}"
        wanted = grow_tree(top, arena)
        if not wanted:
            tally.note("no files")
        every = [str(path) for path in top.rglob("*") if path.is_file()]  # which follows no links
        arena.random.shuffle(every)
        for words in ([str(top)], [f"{top}/**/*"], every, [*every, str(top)], [f"{top}/*", str(top)]):
            found: list[str] = []

            def read(words: list[str] = words, found: list[str] = found) -> None:
                found += chain.from_iterable(open_text(words, arena.scratch).read(lambda _: None))

            complaint = trouble(read, tally)
            if sorted("".join(found).split()) != wanted:
                complaint = complaint or f"{words[:2]}: {len(found)} files, not {len(wanted)}"
            tally.add(complaint)
        shutil.rmtree(top)
    return tally


def grow_tree(top: Path, arena: Arena) -> list[str]:
    """Make a folder of files, each with a word of its own, and links; return the words, sorted."""
    random, folders, files = arena.random, [top], list[Path]()
    top.mkdir()
    for number in range(random.randint(1, 12)):
        place = random.choice(folders) / random.choice(
            [f"n{number}", f"n{number}.txt", f"n {number}\n", f"{number}\udce9"]
        )
        kind = random.choice(["file", "file", "folder", "link", "hard link", "loop", "dangling"])
        if kind == "folder":
            place.mkdir()
            folders.append(place)
        elif kind == "file":
            place.write_text(f"word-{number}\n", encoding="utf-8")
            files.append(place)
        elif kind == "dangling":
            place.symlink_to("nowhere")
        elif kind == "loop":
            place.symlink_to(random.choice(folders), target_is_directory=True)
        elif files:
            (place.symlink_to if kind == "link" else place.hardlink_to)(random.choice(files))
    return sorted(file.read_text(encoding="utf-8").strip() for file in files)


def arbitrary_unicode(_: Arena, count: int) -> Tally:
    """Turn any Unicode into tokens and back, with every tokenizer."""
    tally, fixed = Tally(), list[Tokenizer]([ByteTokenizer()])
    try:
        fixed.append(GPT2Tokenizer(ROOT / "data"))
    except UserError:
        tally.note("GPT-2's vocabulary could not be fetched, which took it out")

    @given(st.text(max_size=100), st.integers(0, len(fixed)))
    def attack(text: str, which: int) -> None:
        def work() -> None:
            tokenizer: Tokenizer = CharTokenizer.learn([text, "x"]) if which == len(fixed) else fixed[which]
            ids = tokenizer.encode(text)
            if decode(tokenizer, ids) != text or (ids.size and ids.max() >= tokenizer.vocab_size):
                raise AssertionError("another text came back")

        found = trouble(work, tally)
        tally.add(found and f"{found}: {text!r}")

    many(attack, count)
    return tally


KEYS = sorted({*TrainSettings.model_fields, *SampleSettings.model_fields, *PrepareSettings.model_fields})
ODD_VALUES = st.one_of(
    st.text(max_size=20), st.integers().map(str), st.floats().map(str),
    st.sampled_from(["true", "false", "0", "1", "64", "1e-3", "inf", "9" * 5000, "[]", "{}", "'''", '"\\u0000"']),
)  # fmt: skip
DEFAULTS = {key: str(field.default) for key, field in TrainSettings.model_fields.items()}
SOUND = st.sampled_from([(key, value) for key, value in DEFAULTS.items() if value.replace(".", "").isdigit()])
PAIRS = st.one_of(SOUND, SOUND, st.tuples(st.sampled_from([*KEYS, "n_layers"]), ODD_VALUES))
"""Settings with their values, two thirds of them sound."""


def arbitrary_toml(arena: Arena, count: int) -> Tally:
    """Read any text as a settings file."""
    tally, file = Tally(), arena.scratch / "any.toml"
    texts = st.one_of(st.text(max_size=80), *[st.lists(PAIRS.map(" = ".join), max_size=5).map("\n".join)] * 3)

    @given(texts)
    def attack(text: str) -> None:
        file.write_text(text, encoding="utf-8", newline="")
        found = trouble(lambda: parse(TrainSettings, [str(file)], "", "", files=True), tally)
        tally.add(found and f"{found}: {text!r}")

    many(attack, count)
    return tally


def arbitrary_command_lines(_: Arena, count: int) -> Tally:
    """Read any words as a command line of any script."""
    tally = Tally()
    flag = st.one_of(
        PAIRS.map(lambda pair: [f"--{pair[0]}={pair[1]}"]), PAIRS.map(lambda pair: [f"--{pair[0]}", pair[1]])
    )
    words = st.lists(st.one_of(*[flag] * 4, st.text(max_size=20).map(lambda word: [word])), max_size=4)

    @given(words, st.sampled_from([TrainSettings, SampleSettings, PrepareSettings]))
    def attack(words: list[list[str]], kind: Any) -> None:
        line = [word for group in words for word in group]
        found = trouble(lambda: parse(kind, line, "", "", files=kind is TrainSettings), tally)
        tally.add(found and f"{found}: {line!r}")

    many(attack, count)
    return tally


PROMPTS = {
    "empty": "", "one character": "t", "longer than the block": "to be or not " * 50, "all unknown": "ÄÖÜ",
    "partly unknown": "to be Ä", "1 MB": "to be or not " * 77_000, "NUL": "\0", "undecodable byte": "to\udcff",
    "right to left": "\u202eשלום", "combining": "e\u0301\u0301\u0301", "emoji": "\U0001f468\u200d\U0001f469",
    "control characters": "\x1b[31m\r\x07",
}  # fmt: skip


def prompts(arena: Arena, count: int) -> Tally:
    """Sample from odd prompts: they stand before the sample, or the unknown is named, or left out if asked."""
    tally = Tally()
    for number, (kind, prompt) in enumerate(list(PROMPTS.items()) * -(-count // len(PROMPTS))):
        for skip in (False, True):
            flags = SampleSettings.model_validate(
                {"prompt": prompt, "max_new_tokens": 5, "skip_unknown": skip, "seed": number, "device": "cpu"}
            )
            said, foreign = StringIO(), set(prompt) - set(arena.text)
            found = ""
            try:
                with redirect_stdout(said), redirect_stderr(StringIO()):
                    sample.main(flags, str(arena.straight))
                right = said.getvalue().startswith(prompt) and not (foreign and not skip)
                found = "" if right else f"unexpected: {said.getvalue()[:100]!r}"
            except UserError as failure:
                named = all(repr(character) in str(failure) for character in sorted(foreign)[:10])
                found = "" if foreign and not skip and named else f"refused: {failure}"
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            tally.add(found and f"{kind}, skip_unknown={skip}: {found}")
    return tally


def many(attack: Callable[..., None], count: int) -> None:
    """Call a test of hypothesis with so many examples."""
    unhindered = tries(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    unhindered(attack)()


def mutated(value: dict[str, Json], chosen: random.Random) -> dict[str, Json]:
    """Return a JSON object with one to three of its parts changed a little, replaced, left out, doubled or swapped."""
    value = copy.deepcopy(value)
    for _ in range(chosen.randint(1, 3)):
        parent: Json = value
        key: Any = chosen.choice(list(value) or ["x"])
        while isinstance(parent[key], dict | list) and parent[key] and chosen.random() < 0.8:
            parent = parent[key]
            key = chosen.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        kind = chosen.random()
        if kind < 0.4:
            parent[key] = copy.deepcopy(chosen.choice(ODD))
        elif kind < 0.8 or isinstance(parent, list):
            parent[key] = near(parent[key], chosen)
        elif kind < 0.9:
            del parent[key]
        elif kind < 0.95:
            parent[str(key) + chosen.choice("x./\0é")] = parent[key]
        else:
            other = chosen.choice(list(parent))
            parent[key], parent[other] = parent[other], parent[key]
    return value


def near(value: Json, chosen: random.Random) -> Json:
    """Return a JSON value much like another."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return chosen.choice([value - 1, value + 1, 2 * value, -value, value // 2])
    if isinstance(value, str):
        place = chosen.randint(0, len(value))
        return chosen.choice([value[:place], value[place:], value[:place] + value[place + 1 :], value + value])
    if isinstance(value, list):
        return [near(item, chosen) for item in value]
    return value


def opened(path: Path) -> tuple[dict[str, Json], bytes]:
    """Return a safetensors file's header and its data."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def sealed(header: dict[str, Json], data: bytes) -> bytes:
    """Return a safetensors file with that header, and with the checksum that fits where it has a place for one."""
    text = json.dumps(header, separators=(",", ":")).encode()
    key = b'"sha256":"'
    place = text.find(key) + len(key)
    text = text[:place] + b"0" * 64 + text[place + 64 :]
    whole = len(text).to_bytes(8, "little") + text + data
    digest = hashlib.sha256(whole).hexdigest().encode()
    return whole[: 8 + place] + digest + whole[8 + place + 64 :]
