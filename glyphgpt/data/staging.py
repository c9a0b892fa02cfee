"""A data set in the making: its hidden folder, and how far it has come, so that a broken run can be gone on with."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from glyphgpt.data.dataset import META, Shard
from glyphgpt.data.sources import list_names
from glyphgpt.errors import UsageError, UserError, warn
from glyphgpt.files import file_sha256, locked, swap_dirs, write_atomic

PROGRESS = "progress.json"
OWN_FILE = re.compile(r"meta\.json|(?:train|val)-\d{5,}\.npy|report\.html")
"""Files of a dataset's folder that a new one may replace."""


class PrepareProgress(BaseModel):
    """How far a preparation has come: what is finished, and from where on the text is still to be encoded."""

    model_config = ConfigDict(extra="forbid", strict=True)

    job: str
    """Name of the very text and settings; empty where it cannot be gone on with."""
    characters: int
    """Of the whole text."""
    sha256: str
    """Of the text's files."""
    tokenizer: dict[str, Any]
    skipped: int = 0
    """Characters that were left out, since the tokenizer lacks them; no other number counts them."""
    shards: dict[str, list[Shard]] = {}
    """The finished files of each split."""
    split: str = ""
    """The split in which the last finished file ended,"""
    start: int = 0
    """and where in it, in characters, the piece begins whose tokens filled that file;"""
    tokens: int = 0
    """tokens of the split before that piece."""


def task_fingerprint(**facts: object) -> str:
    """Name a job by all that its result follows from, as JSON types."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def dataset_dir(name: str, data_dir: Path) -> Path:
    """Return the folder of a data set to make.

    Raises:
        UsageError: it cannot have that name.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError("give the data set a name of letters, digits, '_', '-' and '.': --name=NAME")
    if name == "downloads":
        raise UsageError("--name=downloads is taken by fetched files; choose another")
    return data_dir / name


@contextmanager
def staging_dir(folder: Path, *, overwrite: bool, named: bool = True) -> Iterator[Path]:
    """Give a folder to make a data set in, that becomes `folder` at the end, whole.

    After a failure it is kept if there is something to continue from, else nothing is left behind. `named` is whether
    the user may name the dataset, where its place is taken.

    Raises:
        UsageError: another process prepares this data set.
        UserError: there is something in the place already.
    """
    check_target(folder, overwrite=overwrite, named=named)
    hidden = folder.with_name(f".{folder.name}.unfinished")
    new, old = hidden / "new", hidden / "old"
    with locked(hidden, "--name=ANOTHER"):
        if old.exists() and not folder.exists():  # an earlier run was killed while it changed one for the other
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        try:
            check_target(folder, overwrite=overwrite, named=named)  # once more, now that nobody else can make it
            new.mkdir(exist_ok=True)
            yield new
            swap_dirs(folder, new, old)
            clear_progress(folder)
        except BaseException:
            if (new / PROGRESS).exists():
                warn(f"what is done so far is kept in {hidden}; the same command continues from there")
            else:
                shutil.rmtree(hidden, ignore_errors=True)
            raise
        shutil.rmtree(hidden, ignore_errors=True)


def check_target(folder: Path, *, overwrite: bool, named: bool) -> None:
    """Make sure that a dataset may be written to a folder: only a dataset is ever replaced, with nothing beside it.

    Raises:
        UserError: there is something already.
    """
    instead = "choose another --name" if named else "move it away"
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder, so it is never replaced; {instead}")
    names = sorted(path.name for path in folder.iterdir())
    if others := [name for name in names if META not in names or not OWN_FILE.fullmatch(name)]:
        raise UserError(f"{folder} holds other files ({list_names(others)}), which are never replaced; {instead}")
    if names and not overwrite:
        another = ", or --name=ANOTHER" if named else ""
        raise UserError(f"{folder} holds a dataset already; add --overwrite to replace it{another}")


def load_progress(folder: Path, job: str) -> PrepareProgress | None:
    """Return how far an earlier run of the same job came; what any other left in the folder is deleted."""
    try:
        progress = PrepareProgress.model_validate_json((folder / PROGRESS).read_bytes())
    except (OSError, ValidationError):
        progress = None
    if progress and progress.job == job:
        shards = [shard for finished in progress.shards.values() for shard in finished]
        if all((folder / s.file).exists() and file_sha256(folder / s.file) == s.sha256 for s in shards):
            return progress
    for path in folder.iterdir():
        path.unlink()
    return None


def save_progress(progress: PrepareProgress, folder: Path) -> None:
    """Write down how far a job has come."""
    write_atomic(folder / PROGRESS, progress.model_dump_json().encode())


def clear_progress(folder: Path) -> None:
    """Leave nothing to go on with: the job is done, or cannot be."""
    (folder / PROGRESS).unlink(missing_ok=True)
