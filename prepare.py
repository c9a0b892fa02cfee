"""Turn any text into token shards for train.py.

    python prepare.py shakespeare_char                      a recipe: a TOML file in data/
    python prepare.py my.txt more/*.txt --name=mine         your own files
    python prepare.py folder/ --tokenizer=gpt2              all files in a folder
    python prepare.py 'wiki/*.jsonl.zst' --name=wiki        a pattern; compressed files; JSON, CSV or Parquet records
    cat my.txt | python prepare.py - --name=mine            standard input
    python prepare.py my.txt --vocabulary=out/quick         with the tokenizer of a run, for train.py --init_from

The text is streamed, so it may be larger than memory: it is read once to count and check it, then again to encode it.
The last part (val_fraction) is the validation split, unless --split or --val says otherwise. The splits decode to
exactly the same text, unless an option changes it. An interrupted preparation resumes when the same command is run
again.
"""

import glyphgpt.startup  # first: handles --help and usage errors before the other imports

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from glyphgpt.checkpoint import find_checkpoint, read_metadata
from glyphgpt.cli import ROOT, command, from_here, unescape
from glyphgpt.data.background import BackgroundWorker
from glyphgpt.data.cleaning import replace_unknown
from glyphgpt.data.corpus import Corpus
from glyphgpt.data.dataset import FORMAT, DatasetMeta, SourceMeta, Split, SplitMeta, read_meta, write_meta
from glyphgpt.data.inspection import leaked_fraction
from glyphgpt.data.recipes import download_text, read_recipe
from glyphgpt.data.scan import Scan, progress_bar
from glyphgpt.data.sources import is_stream, list_names
from glyphgpt.data.splitting import encode_segments, split_text
from glyphgpt.data.staging import (
    PrepareProgress,
    ResumableWriter,
    clear_progress,
    dataset_dir,
    load_progress,
    staging_dir,
)
from glyphgpt.data.text import Text, open_text
from glyphgpt.data.tokenizers import (
    Tokenizer,
    drop_unknown,
    tokenizer_from_dict,
)
from glyphgpt.errors import UsageError, UserError, sanitize, warn
from glyphgpt.files import META, REPORT
from glyphgpt.reports.dataset_report import findings, kinds_in_words, write_dataset_report
from glyphgpt.settings import RECORD_KINDS, PrepareSettings

TEXT_SETTINGS = {
    "tokenizer", "vocab_size", "vocabulary", "skip_unknown", "encoding", "text_field", "newlines", "normalize",
    "deduplicate", "min_count", "val_fraction", "test_fraction", "val", "split", "seed", "records",
}  # fmt: skip
"""Settings that determine the tokens of a text."""


def main(settings: PrepareSettings, *words: str) -> None:
    """Prepare a recipe or the user's own text."""
    data_dir = Path(settings.data_dir)
    recipes = list_names(sorted(path.stem for path in data_dir.glob("*.toml")), length=10) or "none"
    if not words:
        usage = glyphgpt.startup.USAGE["prepare.py"]
        raise UsageError(f"name a recipe or a text: {usage}; recipes in {data_dir}: {recipes}")
    recipe_path, is_single = data_dir / f"{words[0]}.toml", len(words) == 1
    if is_single and recipe_path.is_file() and not Path(words[0]).is_file():
        prepare_recipe(recipe_path, settings)
    elif is_single and re.fullmatch(r"\w+", words[0]) and not Path(words[0]).exists():
        raise UsageError(f"{words[0]}: no such file, folder or recipe; recipes in {data_dir}: {recipes}")
    else:
        prepare_files(words, settings)


def prepare_recipe(path: Path, settings: PrepareSettings) -> None:
    """Prepare a public text as its recipe says, unless this has been done already."""
    recipe, name = read_recipe(path), path.stem
    has_records = recipe.pairs is not None
    for key in settings.model_fields_set & TEXT_SETTINGS | ({"name"} & settings.model_fields_set):
        raise UsageError(f"--{key} is only for your own text; a recipe is always prepared as {path} says")
    folder = Path(settings.data_dir) / name
    if folder.exists() and not settings.overwrite:
        meta = read_meta(folder)
        prepared = meta.source.sha256, meta.tokenizer["kind"], "separator" in meta.tokenizer
        if prepared == (recipe.text.sha256, recipe.tokenizer, has_records):
            print(f"{folder} is already prepared; next: {train_command(folder, recipe.config)}")
            return
    file, val_file = download_text(recipe, Path(settings.data_dir))
    print(f"{recipe.title}; licence: {recipe.licence}")
    chosen = {"tokenizer": recipe.tokenizer, "val_fraction": recipe.val_fraction, "val": str(val_file or "")}
    settings = settings.model_copy(update=chosen)
    text, val = (
        Text((each,), (sanitize(each),), can_set_encoding=False, separate_documents=has_records) if each else None
        for each in (file, val_file)
    )
    assert text
    corpus = Corpus(text, settings, val, separator="\n" if has_records else None)
    with staging_dir(folder, overwrite=settings.overwrite, can_rename=False) as staging:
        meta = prepare(corpus, staging, settings, recipe=name)
        found = report(staging, name, meta, settings)
    print_summary(meta, folder, found, recipe.config)


def prepare_files(words: Sequence[str], settings: PrepareSettings) -> None:
    """Prepare the user's own text."""
    has_name = len(words) == 1 and not is_stream(words[0])
    folder = dataset_dir(settings.name or (Path(words[0]).stem if has_name else ""), Path(settings.data_dir))
    vocabulary = load_tokenizer(settings) if settings.vocabulary else None
    if vocabulary:
        settings = settings.model_copy(update={"tokenizer": vocabulary.kind})
    separator = record_separator(settings, vocabulary)
    check_division(settings, separator)
    has_end_of_text = settings.tokenizer in ("bpe", "gpt2") or separator is not None
    with staging_dir(folder, overwrite=settings.overwrite) as staging:
        fields: dict[str, Any] = {
            "field": settings.text_field,
            "keep_documents": has_end_of_text or settings.split == "documents",
            "separate_documents": has_end_of_text,
        }
        text, val = open_text(words, staging.parent, settings.encoding, **fields), None
        if settings.val:
            (scratch := staging.parent / "val").mkdir(exist_ok=True)
            val = open_text([settings.val], scratch, settings.encoding, **fields)
        meta = prepare(Corpus(text, settings, val, separator), staging, settings, recipe="", vocabulary=vocabulary)
        found = report(staging, folder.name, meta, settings)
    print_summary(meta, folder, found)


def prepare(
    text: Corpus, folder: Path, settings: PrepareSettings, recipe: str, vocabulary: Tokenizer | None = None
) -> DatasetMeta:
    """Write the shards and meta.json of a text to a folder, or resume an interrupted preparation there.

    Raises:
        UserError: The text cannot be read, changes meanwhile, or is too short to split.
    """
    file_stats = text.file_stats()
    fingerprint = task_fingerprint(text, settings, recipe, vocabulary)
    progress = load_progress(folder, fingerprint)
    if progress:
        print(f"resuming an interrupted preparation; finished shards: {sum(map(len, progress.shards.values()))}")
    else:
        progress = Scan(text, settings, vocabulary).read(fingerprint)
    tokenizer = tokenizer_from_dict(progress.tokenizer, Path(settings.data_dir))
    writer = write_shards(text, folder, settings, tokenizer, progress)
    splits = writer.splits()
    has_changed = not writer.finished or text.file_stats() != file_stats
    problem = "the text changed while it was read; try again" if has_changed else find_short_split(splits)
    if problem:
        clear_progress(folder)
        raise UserError(f"{list_names(text.names)}: {problem}")
    texts = {name: writer.read(name, tokenizer.end_of_record) for name in splits}
    splits = {name: count_separators(split, texts[name]) for name, split in splits.items()}
    text_report = progress.report
    if text_report:
        leaked = leaked_fraction(texts["train"], texts["val"], tokenizer)
        text_report = text_report.model_copy(update={"leaked": leaked})
    meta = DatasetMeta(
        format=FORMAT,
        recipe=recipe,
        tokenizer=tokenizer.to_dict(),
        vocab_size=tokenizer.vocab_size,
        val_fraction=settings.val_fraction,
        source=SourceMeta(names=list(text.names), bytes=text.total_bytes(), sha256=progress.sha256),
        report=text_report,
        **splits,
    )
    write_meta(folder, meta)
    if progress.dropped:
        print(f"dropped {progress.dropped:,} characters that are not in the vocabulary of {settings.vocabulary}")
    return meta


def task_fingerprint(text: Corpus, settings: PrepareSettings, recipe: str, vocabulary: Tokenizer | None) -> str:
    """Return a checksum of all that determines the shards and meta.json, or "" if the text cannot be read again."""
    if not text.rereadable:
        return ""
    keys = TEXT_SETTINGS | {"shard_tokens", "report"}
    paths, chosen = [str(path) for path in text.paths], settings.model_dump(include=keys)
    facts = [paths, text.file_stats(), chosen, recipe, vocabulary and vocabulary.to_dict()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def write_shards(
    text: Corpus, folder: Path, settings: PrepareSettings, tokenizer: Tokenizer, progress: PrepareProgress
) -> ResumableWriter:
    """Read a text for the second time: encode it, and write the shards that are not finished yet."""
    writer = ResumableWriter(folder, tokenizer.vocab_size, settings.shard_tokens, progress)
    threads = settings.workers or (os.cpu_count() if tokenizer.kind in ("bpe", "gpt2") else 1)
    with (
        progress_bar("encoding", text, text.passes) as bar,
        BackgroundWorker() as disk,
        ThreadPoolExecutor(threads) as encoders,
    ):
        stream = text.read_splits(list(progress.characters), lambda chunk: bar.update(len(chunk)))
        if settings.min_count > 1:
            stream = replace_unknown(stream, tokenizer)
        if progress.dropped:
            stream = drop_unknown(stream, tokenizer, Counter())
        segments = split_text(stream, progress.characters, tokenizer, progress.split, progress.start)
        for segment, tokens in encode_segments(segments, tokenizer, encoders):
            disk.submit(writer.write, segment, tokens)
        disk.flush()
    return writer


def count_separators(meta: SplitMeta, split: Split) -> SplitMeta:
    """Return the metadata of a split with the end of each record counted as a character, as a line end would be."""
    records = 0 if split.record_ends is None else len(split.record_ends) - 1
    return meta.model_copy(update={"characters": meta.characters + records})


def record_separator(settings: PrepareSettings, vocabulary: Tokenizer | None) -> str | None:
    """Return what separates records: "" for documents, and None if the text is not one of records.

    Raises:
        UsageError: The vocabulary has records already, or no token before and after them.
    """
    if vocabulary and not settings.records:
        return vocabulary.separator
    if vocabulary and vocabulary.separator is not None:
        raise UsageError(f"--vocabulary={settings.vocabulary} brings its own records; leave out --records")
    if vocabulary and vocabulary.end_of_text is None:
        raise UsageError(
            f"--vocabulary={settings.vocabulary} has no token for the ends of records; leave out --records"
        )
    return RECORD_KINDS[settings.records] if settings.records in RECORD_KINDS else unescape(settings.records)


def check_division(settings: PrepareSettings, separator: str | None) -> None:
    """Check that the options for splits and records fit the text.

    Raises:
        UsageError: They do not.
    """
    given = settings.model_fields_set
    if separator is None and settings.deduplicate == "records":
        raise UsageError("--deduplicate=records is for a text of records: --records=lines, or what separates them")
    if separator is not None and "split" in given:
        raise UsageError("records are drawn at random; leave out --split")
    if "seed" in given and settings.split == "tail" and (separator is None or settings.val):
        raise UsageError("--seed is for a random split: --split=blocks, --split=documents, or --records without --val")


def load_tokenizer(settings: PrepareSettings) -> Tokenizer:
    """Return the tokenizer of the run, checkpoint or dataset that --vocabulary names.

    Raises:
        UsageError: The path does not exist, or the settings name another tokenizer.
        UserError: The run or dataset cannot be read.
    """
    path = Path(settings.vocabulary)
    if not path.exists():
        raise UsageError(f"--vocabulary={settings.vocabulary}: no such run, checkpoint or dataset")
    data = read_meta(path).tokenizer if (path / META).is_file() else read_metadata(find_checkpoint(path)).tokenizer
    tokenizer = tokenizer_from_dict(data, Path(settings.data_dir))
    if "tokenizer" in settings.model_fields_set and settings.tokenizer != tokenizer.kind:
        raise UsageError(
            f"--tokenizer={settings.tokenizer} contradicts --vocabulary={settings.vocabulary}, whose tokenizer is "
            f"{tokenizer.kind}; leave one of them out"
        )
    return tokenizer


def find_short_split(splits: dict[str, SplitMeta]) -> str:
    """Return a message if one of the splits is too short to predict a token, otherwise ""."""
    for name, split in splits.items():
        if split.tokens < 2:
            total = sum(split.characters for split in splits.values())
            purpose = {"train": "training", "val": "validation", "test": "the test"}[name]
            return f"too short: {total} characters give {split.tokens} of the 2 tokens that {purpose} needs; add text"
    return ""


def report(folder: Path, name: str, meta: DatasetMeta, settings: PrepareSettings) -> list[str]:
    """Write the page with what was found in the text, and return the findings; none if it was not inspected."""
    found = findings(meta, settings)
    if meta.report:
        write_dataset_report(folder, name, meta, found)
    return found


def print_summary(meta: DatasetMeta, folder: Path, found: list[str], config: str = "") -> None:
    """Print the sizes of a dataset, what was found in its text, and the command that trains on it."""
    splits = {"to train": meta.train, "to validate": meta.val} | ({"to test": meta.test} if meta.test else {})
    tokens, characters = (sum(getattr(split, key) for split in splits.values()) for key in ("tokens", "characters"))
    print(
        f"{folder}: {characters:,} characters, {tokens:,} tokens "
        f"({', '.join(f'{split.tokens:,} {purpose}' for purpose, split in splits.items())})\n"
        f"vocabulary: {meta.vocab_size:,} ({meta.tokenizer['kind']}), {characters / tokens:.2f} characters per token"
    )
    for finding in found:
        warn(finding)
    if meta.report:
        print(f"report: {folder / REPORT} ({kinds_in_words(meta.report)})")
    print(f"next: {train_command(folder, config)}")


def train_command(folder: Path, config: str) -> str:
    """Return the command that trains on a dataset, for a minute if no config is for it."""
    name = folder.name
    flags = [] if name == "shakespeare_char" else [f"--dataset={name}", f"--out_dir=out/{name}"]
    flags += [] if folder.parent == Path("data") else [f"--data_dir={folder.parent}"]
    if not config:
        return command("train.py", *flags, "--minutes=1")
    return command("train.py", from_here(ROOT / config), *flags)


if __name__ == "__main__":
    glyphgpt.startup.run("prepare.py", main)
