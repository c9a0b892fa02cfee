"""A text of records: prepared, trained on, scored and sampled, each record on its own."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as tries
from hypothesis import strategies as st
from test_cleaning import in_parts

import train
from conftest import prepare_text, run_prepare, script, some_text, tiny_settings
from glyphgpt.data.dataset import Split, load_dataset
from glyphgpt.data.inspection import repeated_records
from glyphgpt.data.splitting import read_records
from glyphgpt.data.staging import ResumableWriter
from glyphgpt.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    RecordTokenizer,
    decode,
    start_token,
    tokenizer_from_dict,
)
from glyphgpt.errors import UsageError, UserError
from glyphgpt.inference.api import load
from glyphgpt.inference.translate import Translator
from glyphgpt.settings import TranslateSettings

NAMES = [first + last for first in ("an", "be", "cor", "dal", "em") for last in ("a", "na", "nie", "wyn", "ric", "lo")]


def records_of(split: Split, end: int) -> list[list[int]]:
    """Return the tokens of each record of a split, without the ends."""
    tokens = split.slice(0, split.tokens).tolist()
    assert tokens[0] == tokens[-1] == end
    records: list[list[int]] = []
    for token in tokens[:-1]:
        records = [*records, []] if token == end else [*records[:-1], [*records[-1], token]]
    return records


@given(
    st.lists(st.text("ab\n\r", max_size=30), min_size=1, max_size=4),
    st.integers(1, 9),
    st.sampled_from(["\n", "\n\n", "ab", "", "b\n"]),
)
@example(documents=["a\n\nb", "c"], part=1, separator="\n\n")
@example(documents=["aababab", "b"], part=2, separator="bab")
def test_records_are_found_however_the_text_arrives(documents: list[str], part: int, separator: str) -> None:
    parts = [piece for document in documents for piece in (document.split(separator) if separator else [document])]
    expected = [record for piece in parts if (record := piece.strip("\r\n"))]
    lists = list(read_records(in_parts(documents, part), separator))
    assert [record for _, *records in lists for record in records] == expected
    assert {first for first, *_ in lists} == {""}, "each list begins with a record"


@tries(deadline=None)
@given(st.lists(st.text(min_size=1), min_size=1), st.booleans(), st.sampled_from(["\n", "%%", ""]))
def test_encoded_records_decode_to_the_text(records: list[str], characters: bool, separator: str) -> None:
    base = CharTokenizer.learn(records) if characters else ByteTokenizer()
    tokenizer = RecordTokenizer(base, separator)
    tokens = tokenizer.encode_documents(["", *records, ""])
    end = tokenizer.end_of_text
    assert tokens.dtype == np.min_scalar_type(end)
    assert records_of(Split((tokens,), 0), end) == [base.encode(record).tolist() for record in records]
    between = separator or "<|endoftext|>"
    assert decode(tokenizer, tokens) == between + between.join(records) + between
    assert tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())), Path()).to_dict() == tokenizer.to_dict()
    assert start_token(tokenizer) == end


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
@pytest.mark.parametrize("fractions", [{}, {"test_fraction": 0.2, "val_fraction": 0.2, "seed": 7}])
def test_each_record_is_in_one_split(tmp_path: Path, tokenizer: str, fractions: dict[str, Any]) -> None:
    lines = [f"{name} {number}" for number, name in enumerate(NAMES * 30)]
    text = "\n".join(lines) + "\n\n\r\n"
    vocabulary: dict[str, Any] = {"vocab_size": 270} if tokenizer == "bpe" else {}
    folder = prepare_text(text, tmp_path, records="lines", tokenizer=tokenizer, **fractions, **vocabulary)
    dataset = load_dataset(folder, tmp_path)
    end = dataset.tokenizer.end_of_text
    assert end == dataset.tokenizer.vocab_size - 1
    splits = [split for split in (dataset.train, dataset.val, dataset.test) if split]
    assert len(splits) == 2 + ("test_fraction" in fractions)
    found = []
    for split in splits:
        records = [decode(dataset.tokenizer, record) for record in records_of(split, end)]
        assert split.characters == sum(len(record) + 1 for record in records), "line ends are characters too"
        assert records == sorted(records, key=lambda record: int(record.split()[1])), "they keep their order"
        found += records
    assert Counter(found) == Counter(lines)
    assert len(records_of(dataset.val, end)) / len(lines) == pytest.approx(fractions.get("val_fraction", 0.1), abs=0.01)


def test_a_validation_file_is_divided_into_records(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("emma\nava\n")
    folder = prepare_text("\n".join(NAMES) + "v", tmp_path, records="lines", val=str(tmp_path / "val.txt"))
    dataset = load_dataset(folder, tmp_path)
    splits = (dataset.train, dataset.val)
    train_records, val_records = (records_of(split, dataset.tokenizer.vocab_size - 1) for split in splits)
    assert (len(train_records), len(val_records)) == (len(NAMES), 2)
    assert decode(dataset.tokenizer, val_records[1]) == "ava"


def test_records_of_json_and_files_are_documents(tmp_path: Path) -> None:
    (tmp_path / "poems.jsonl").write_text("".join(json.dumps({"text": f"{name}\nline\n"}) + "\n" for name in NAMES))
    run_prepare(str(tmp_path / "poems.jsonl"), "--records=documents", f"--data_dir={tmp_path / 'data'}")
    dataset = load_dataset(tmp_path / "data" / "poems", tmp_path)
    records = [
        decode(dataset.tokenizer, record)
        for split in (dataset.train, dataset.val)
        for record in records_of(split, dataset.tokenizer.vocab_size - 1)
    ]
    assert sorted(records) == sorted(f"{name}\nline" for name in NAMES)


@pytest.mark.parametrize("writes", [5, 20, 26])
def test_a_preparation_of_records_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], writes: int
) -> None:
    monkeypatch.setattr("glyphgpt.data.text.CHUNK_BYTES", 300)
    text = "\n".join(NAMES * 30)
    whole = load_dataset(prepare_text(text, tmp_path, "whole", records="lines"), tmp_path)
    changes: dict[str, Any] = {"records": "lines", "shard_tokens": 100}
    write, count = ResumableWriter.write, itertools.count()

    def fail(*args: Any) -> None:
        if next(count) == writes:
            raise UserError("stopped")
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ResumableWriter, "write", fail)
        with pytest.raises(UserError, match="stopped"):
            prepare_text(text, tmp_path, "parts", **changes)
    flags = ["--records=lines", "--shard_tokens=100", f"--data_dir={tmp_path}"]
    run_prepare(str(tmp_path / "parts.txt"), *flags)
    parts = load_dataset(tmp_path / "parts", tmp_path)
    assert "resuming" in capsys.readouterr().out
    assert parts.meta.train.sha256 == whole.meta.train.sha256
    assert parts.meta.val.sha256 == whole.meta.val.sha256


def test_repeated_records_are_found_and_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "val.txt").write_text("emma\nanna\nbena\nava\nem\n")
    flags = {"records": "lines", "val": str(tmp_path / "val.txt")}
    text = "".join(f"{name}\n" for name in [*NAMES, *NAMES[:3], "v"])
    folder = prepare_text(text, tmp_path, **flags)
    assert "45% of the validation text also occurs in the training text, in whole records or" in capsys.readouterr().err
    report = load_dataset(folder, tmp_path).meta.report
    assert report
    assert report.leaked == len("anna bena ") / len("emma anna bena ava em ")
    dataset = load_dataset(prepare_text(text, tmp_path, "dropped", deduplicate="records", **flags), tmp_path)
    splits = (dataset.train, dataset.val)
    train_records, val_records = (records_of(split, dataset.tokenizer.vocab_size - 1) for split in splits)
    assert len(train_records) == len(NAMES) + 1
    assert [decode(dataset.tokenizer, record) for record in val_records] == ["emma", "ava", "em"]
    assert "validation text" not in capsys.readouterr().err


@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1), st.lists(st.text("ab", min_size=1, max_size=5)))
@tries(deadline=None)
def test_records_that_occur_in_both_splits_are_counted(train_records: list[str], val_records: list[str]) -> None:
    val_records = [*val_records, "c"]
    tokenizer = RecordTokenizer(CharTokenizer("abc"), "\n")
    splits = [
        Split((tokenizer.encode_documents(["", *records, ""]),), 0, 3) for records in (train_records, val_records)
    ]
    repeated = sum(len(record) + 1 for record in val_records if record in train_records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glyphgpt.data.inspection.HASHED_TOKENS", 7)
        assert repeated_records(*splits) == pytest.approx(repeated / sum(len(record) + 1 for record in val_records))


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (some_text(300).replace("\n", " "), ["--records=lines"], "too few records (between '\\n')"),
        (some_text(3000), ["--records=%%"], "too few records (between '%%')"),
        (some_text(3000), ["--records=documents"], "too few records (one for each document)"),
        ("\n\n\r\n\n" * 50, ["--records=lines"], "the text is empty"),
    ],
)
def test_texts_without_records_are_refused_in_one_line(
    tmp_path: Path, text: str, flags: list[str], message: str
) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError) as caught:
        run_prepare(str(tmp_path / "a.txt"), *flags, f"--data_dir={tmp_path / 'data'}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data" / "a").exists()


def test_a_record_that_memory_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glyphgpt.data.splitting.LONGEST_RECORD", 100)
    with pytest.raises(UserError, match="a record has more than 100 characters"):
        list(read_records(iter([["a" * 60], ["b" * 60]]), "\n"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--records=lines", "--split=blocks"], "records are drawn at random; leave out --split"),
        (["--records=lines", "--val=a.txt", "--seed=3"], "--seed is for a random split"),
        (["--seed=3"], "--seed is for a random split"),
        (["--deduplicate=records"], "--deduplicate=records is for a text of records"),
        (["--records=Line"], "records = 'Line': did you mean lines?"),
        (["--vocabulary=RUN", "--records=lines"], "--vocabulary=RUN brings its own records; leave out --records"),
        (["--vocabulary=RUN", "--split=blocks"], "records are drawn at random; leave out --split"),
        (["--vocabulary=CHARACTERS", "--records=lines"], "no token for the ends of records; leave out --records"),
    ],
    ids=str,
)
def test_contradicting_options_are_refused(run: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    characters = prepare_text(some_text(3000), tmp_path, "characters")
    words = [flag.replace("=RUN", f"={run}").replace("=CHARACTERS", f"={characters}") for flag in flags]
    with pytest.raises(UsageError) as caught:
        run_prepare("a.txt", *words, f"--data_dir={tmp_path}")
    assert message.replace("=RUN", f"={run}") in str(caught.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned NAMES by heart, beside its dataset."""
    folder = tmp_path_factory.mktemp("names")
    prepare_text("".join(f"{name}\n" for name in NAMES) * 12, folder, "names", records="lines")
    settings = tiny_settings(
        folder, folder / "run", dataset="names", block_size=16, max_steps=400, learning_rate=0.01, n_embd=32
    )
    train.main(settings)
    return folder / "run"


def test_samples_are_records(run: Path) -> None:
    names = script("sample.py", str(run), "--num_samples=20", "--device=cpu").stdout.splitlines()
    assert len(names) == 20
    assert sum(name in NAMES for name in names) > 10
    assert script("sample.py", str(run), "--prompt=cor", "--temperature=0").stdout.strip() in NAMES
    model = load(run)
    assert model.generate(temperature=0) in NAMES
    assert next(iter(model.probabilities("emna"))) == "<|endoftext|>", "the end of the record"


def test_conversations_are_records_of_their_own(run: Path) -> None:
    done = script("sample.py", str(run), "--interactive", "--temperature=0", text="cor\nem\n")
    replies = [line.removeprefix("> ") for line in done.stdout.splitlines() if line.strip("> ")]
    assert "cor" + replies[0] in NAMES
    assert "em" + replies[1] in NAMES


def test_each_record_is_scored_on_its_own(run: Path, tmp_path: Path) -> None:
    model, names = load(run), NAMES[:7]
    score = model.score("\n".join(names))
    total = 0.0
    for name in names:
        for index in range(len(name) + 1):
            following = name[index] if index < len(name) else "<|endoftext|>"
            total -= math.log(model.probabilities(name[:index])[following])
    assert score.eval_tokens == sum(map(len, names)) + len(names)
    assert score.loss == pytest.approx(total / score.eval_tokens, abs=1e-4)
    assert "".join(part for part, _ in score.surprise) == "\n" + "\n".join(names) + "\n"
    (tmp_path / "names.txt").write_text("\n".join(names))
    printed = script("sample.py", str(run), f"--score={tmp_path / 'names.txt'}", "--device=cpu").stdout
    assert printed == f"{tmp_path / 'names.txt'}: {score}\n"


def test_the_training_reports_the_loss_of_records(run: Path) -> None:
    printed = script("sample.py", str(run), "--score=names", f"--data_dir={run.parent}", "--device=cpu").stdout
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert f"loss {min(row['loss'] for row in rows if row['kind'] == 'val'):.4f}" in printed


def test_micro_batches_weigh_targets_alike(run: Path, tmp_path: Path) -> None:
    losses = []
    for batch_size, steps in ((12, 1), (4, 3)):
        settings = tiny_settings(
            run.parent, tmp_path / str(steps), dataset="names", block_size=16,
            batch_size=batch_size, gradient_accumulation_steps=steps, max_steps=20, log_every=1,
        )  # fmt: skip
        train.main(settings)
        rows = [json.loads(line) for line in (tmp_path / str(steps) / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if row["kind"] == "train"])
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)


def test_long_records_are_reported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(tiny_settings(run.parent, tmp_path / "run", dataset="names", block_size=4, max_steps=2))
    assert "290 of 324 records are longer than block_size = 4: later parts" in capsys.readouterr().err


def test_a_vocabulary_brings_its_records(run: Path, tmp_path: Path) -> None:
    folder = prepare_text("emna\nanna\n" * 20, tmp_path, vocabulary=str(run))
    dataset = load_dataset(folder, tmp_path)
    assert len(records_of(dataset.train, dataset.tokenizer.vocab_size - 1)) == 36


def test_a_bpe_model_learns_records_later(tmp_path: Path) -> None:
    """The token between documents becomes the one between records."""
    text = "".join(f"{name}\n" for name in NAMES) * 12
    prepare_text(text, tmp_path, "stream", tokenizer="bpe", vocab_size=270)
    train.main(tiny_settings(tmp_path, tmp_path / "first", dataset="stream", max_steps=5))
    prepare_text(text, tmp_path, "records", vocabulary=str(tmp_path / "first"), records="lines")
    changes = {"dataset": "records", "init_from": str(tmp_path / "first"), "max_steps": 5}
    train.main(tiny_settings(tmp_path, tmp_path / "second", **changes))
    assert load(tmp_path / "second").has_records


@pytest.mark.parametrize("text", ["12\n3\n", "\n\n", ""])
def test_a_score_needs_records(run: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    done = script("sample.py", str(run), f"--score={tmp_path / 'a.txt'}", "--skip_unknown", "--device=cpu")
    assert done.stderr == f"error: {tmp_path / 'a.txt'}: 0 tokens; a score needs at least 2\n"


def test_unknown_characters_within_records_are_counted(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"an1na\r\n12\r\nbena\r\n")
    words = [str(run), f"--score={tmp_path / 'a.txt'}", "--device=cpu"]
    assert "the model has never seen '1' (U+0031), '2' (U+0032)" in script("sample.py", *words).stderr
    printed = script("sample.py", *words, "--skip_unknown").stdout
    assert printed.startswith(f"{tmp_path / 'a.txt'} (3 unknown characters skipped): loss ")
    assert "(10 tokens)" in printed, "anna and bena, and their ends"


def test_documents_are_scored_one_by_one(tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        (tmp_path / f"{number}.txt").write_text(f"{name}\n{name}\n")
    (tmp_path / "data").mkdir()
    run_prepare(str(tmp_path / "*.txt"), "--name=files", "--records=documents", f"--data_dir={tmp_path / 'data'}")
    train.main(tiny_settings(tmp_path / "data", tmp_path / "run", dataset="files", max_steps=3))
    printed = script("sample.py", str(tmp_path / "run"), f"--score={tmp_path / '*.txt'}", "--device=cpu").stdout
    assert f"({sum(2 * len(name) + 2 for name in NAMES):,} tokens)" in printed


def test_a_prompt_file_ends_before_its_line_end(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("cor\n")
    printed = script("sample.py", str(run), f"--prompt_file={tmp_path / 'prompt.txt'}", "--temperature=0").stdout
    assert printed.strip() in NAMES


def test_novelty_compares_records(run: Path) -> None:
    flags = [f"--novelty={run.parent / 'names'}", "--num_samples=50", "--device=cpu"]
    done = script("sample.py", str(run), *flags)
    longest = {line.split("  ")[0]: int(line.split()[-1]) for line in done.stdout.splitlines()[2:4]}
    assert 2 < longest["validation text"] <= max(map(len, NAMES))
    assert 2 < longest["samples"] <= max(map(len, NAMES))


def test_records_without_known_characters_are_left_out(run: Path, tmp_path: Path) -> None:
    folder = prepare_text("emna\n12\nanna\n3\n" * 20, tmp_path, vocabulary=str(run), skip_unknown=True)
    dataset = load_dataset(folder, tmp_path)
    end = dataset.tokenizer.vocab_size - 1
    records = [*records_of(dataset.train, end), *records_of(dataset.val, end)]
    assert all(records)
    assert len(records) == 40


@pytest.mark.parametrize("seed", range(20))
def test_ten_records_are_enough(tmp_path: Path, seed: int) -> None:
    prepare_text("\n".join(f"record {number}" for number in range(10)), tmp_path, records="lines", seed=seed)


def test_damaged_records_are_refused(tmp_path: Path) -> None:
    folder = prepare_text("emna\nanna\n" * 20, tmp_path)
    meta = json.loads((folder / "meta.json").read_text())
    meta["tokenizer"]["characters"] = meta["tokenizer"]["characters"][:-1]
    meta["tokenizer"]["separator"] = "\n"
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="the records are damaged"):
        load_dataset(folder, tmp_path)


def test_translations_end_with_their_record(tmp_path: Path) -> None:
    prepare_text("rot\tred\nblau\tblue\ngruen\tgreen\n" * 60, tmp_path, records="lines")
    settings = tiny_settings(tmp_path, tmp_path / "run", block_size=24, max_steps=300, learning_rate=0.01, n_embd=32)
    train.main(settings)
    model = load(tmp_path / "run")
    translator = Translator(model.model, model.tokenizer, model.block_size, TranslateSettings(beam=2))
    assert translator.translate(["blau", "", "gruen"]) == ["blue", "", "green"]
