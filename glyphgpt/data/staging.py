"""Resumable preparation: the hidden folder in which a dataset is made, and the progress that is saved in it."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from glyphgpt.data.dataset import Shard, ShardFile, ShardWriter, Split, SplitMeta, TextReport, file_identity
from glyphgpt.data.sources import list_names
from glyphgpt.data.splitting import Segment
from glyphgpt.data.tokenizers import Tokens
from glyphgpt.errors import UsageError, UserError, warn
from glyphgpt.files import META, file_sha256, locked, swap_dirs, write_atomic

PROGRESS = "progress.json"
DATASET_FILE = re.compile(r"meta\.json|(?:train|val|test)-\d{5,}\.npy|report\.html")
"""Files of a dataset's folder, which a new dataset may replace."""


class PrepareProgress(BaseModel):
    """The results of the first pass over a text, and the shards that the second pass has finished."""

    model_config = ConfigDict(extra="forbid", strict=True)

    fingerprint: str
    """Identifies the text and the settings; empty if the preparation cannot be resumed."""
    characters: dict[str, int]
    """The number of characters in each split, in the order in which they are written."""
    sha256: str
    """Checksum of the bytes of the text's files."""
    tokenizer: dict[str, Any]
    report: TextReport | None = None
    """What the text consists of."""
    dropped: int = 0
    """The number of unknown characters, which are dropped and not counted in `characters`."""
    shards: dict[str, list[Shard]] = {}
    """The finished shards of each split."""
    split: str = "train"
    """The split of the segment to resume from, which is the one that completed the last shard."""
    start: int = 0
    """The number of characters of the split before this segment."""
    tokens: int = 0
    """The number of tokens of the split before this segment."""


class ResumableWriter:
    """Writes encoded segments to the shards of all splits, and saves the progress when a shard is finished."""

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int, progress: PrepareProgress) -> None:
        """Start the shards, or continue after those that an earlier run has finished."""
        self.folder, self.progress = folder, progress
        self.finished = False
        self._tokens = progress.tokens  # of the current split, before the next segment
        self._writers = {
            split: ShardWriter(folder, split, vocab_size, shard_tokens, progress.shards.get(split, ()))
            for split in progress.characters
        }

    def write(self, segment: Segment, tokens: Tokens) -> None:
        """Append the tokens of the next segment, except those that an earlier run has written."""
        writer, tokens_before = self._writers[segment.split], self._tokens
        shards_before = len(writer.shards)
        writer.write(tokens[writer.tokens - tokens_before :])
        self._tokens += tokens.size
        if segment.is_last:
            writer.finish()
            self._tokens = 0
            self.finished = segment.split == list(self._writers)[-1]
        if len(writer.shards) > shards_before and self.progress.fingerprint:
            shards = {split: writer.shards for split, writer in self._writers.items()}
            resume_from = {"split": segment.split, "start": segment.start, "tokens": tokens_before}
            save_progress(self.folder, self.progress.model_copy(update={"shards": shards, **resume_from}))

    def read(self, name: str, end_of_record: int | None) -> Split:
        """Return a finished split, whose records lie between the tokens `end_of_record`."""
        writer = self._writers[name]
        paths = ((self.folder / shard.file, shard.tokens) for shard in writer.shards)
        shards = (ShardFile(path, file_identity(path), tokens, writer.dtype) for path, tokens in paths)
        return Split(tuple(shards), self.progress.characters[name], end_of_record)

    def splits(self) -> dict[str, SplitMeta]:
        """Return the metadata of the splits by their names."""
        return {split: writer.meta(self.progress.characters[split]) for split, writer in self._writers.items()}


def dataset_dir(name: str, data_dir: Path) -> Path:
    """Return the folder of a new dataset.

    Raises:
        UsageError: The name is invalid.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError("the dataset needs a name of letters, digits, '_', '-' and '.'; add --name=NAME")
    if name == "downloads":
        raise UsageError("--name=downloads is reserved for downloaded files; choose another name")
    return data_dir / name


@contextmanager
def staging_dir(folder: Path, *, overwrite: bool, can_rename: bool = True) -> Iterator[Path]:
    """Yield a folder in which to prepare a dataset, then rename it to `folder`, so that no reader sees a partial one.

    After a failure, the folder is kept if it contains progress; otherwise it is deleted. `can_rename` is whether the
    script has the option --name, which error messages then suggest.

    Raises:
        UsageError: Another process is preparing this dataset.
        UserError: The folder exists and may not be replaced.
    """
    check_target(folder, overwrite=overwrite, can_rename=can_rename)
    hidden = folder.with_name(f".{folder.name}.unfinished")
    new, old = hidden / "new", hidden / "old"
    with locked(hidden, "--name=ANOTHER"):
        if old.exists() and not folder.exists():  # an earlier run was killed between the renames of swap_dirs
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        try:
            check_target(folder, overwrite=overwrite, can_rename=can_rename)  # again, now that the folder is locked
            new.mkdir(exist_ok=True)
            yield new
            swap_dirs(folder, new, old)
            clear_progress(folder)
        except BaseException:
            if (new / PROGRESS).exists():
                warn(f"finished shards are kept in {hidden}; run the same command again to resume")
            else:
                shutil.rmtree(hidden, ignore_errors=True)
            raise
        shutil.rmtree(hidden, ignore_errors=True)


def check_target(folder: Path, *, overwrite: bool, can_rename: bool) -> None:
    """Check that a dataset may be written to a folder: only a dataset is replaced, and only if `overwrite` is true.

    Raises:
        UserError: The folder may not be replaced.
    """
    if not os.path.lexists(folder):
        return
    remedy = "choose another --name" if can_rename else "move it away"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder and is never replaced; {remedy}")
    names = sorted(path.name for path in folder.iterdir())
    if others := [name for name in names if META not in names or not DATASET_FILE.fullmatch(name)]:
        raise UserError(f"{folder} contains other files ({list_names(others)}) and is never replaced; {remedy}")
    if names and not overwrite:
        rename = ", or choose --name=ANOTHER" if can_rename else ""
        raise UserError(f"{folder} already contains a dataset; add --overwrite to replace it{rename}")


def load_progress(folder: Path, fingerprint: str) -> PrepareProgress | None:
    """Return the progress of an earlier run with the same fingerprint; if there is none, empty the folder."""
    try:
        progress = PrepareProgress.model_validate_json((folder / PROGRESS).read_bytes())
    except (OSError, ValidationError):
        progress = None
    if progress and progress.fingerprint == fingerprint:
        shards = [shard for split in progress.shards.values() for shard in split]
        if all((folder / s.file).exists() and file_sha256(folder / s.file) == s.sha256 for s in shards):
            return progress
    for path in folder.iterdir():
        path.unlink()
    return None


def save_progress(folder: Path, progress: PrepareProgress) -> None:
    """Save the progress, so that an interrupted preparation can resume."""
    write_atomic(folder / PROGRESS, progress.model_dump_json().encode())


def clear_progress(folder: Path) -> None:
    """Delete the progress, because the preparation is finished or cannot succeed."""
    (folder / PROGRESS).unlink(missing_ok=True)
