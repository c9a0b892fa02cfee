"""Recipes: TOML files that describe how to turn a public text into a dataset."""

import hashlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from glyphgpt.data.downloads import FileName, RemoteFile, Sha256, fetch
from glyphgpt.data.text import read_lines
from glyphgpt.errors import UsageError, UserError
from glyphgpt.files import write_atomic


class Pairs(BaseModel):
    """A text of translation pairs: each line of one file, a tab, and the same line of another file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: FileName
    val_file: FileName
    sha256: Sha256
    """Checksum of the text and the validation text, one after the other."""
    sources: tuple[RemoteFile, ...]
    train: tuple[str, str]
    """Names of the two sources whose lines correspond."""
    val: tuple[str, str]
    """The same for the validation text."""

    @model_validator(mode="after")
    def check_names(self) -> "Pairs":
        """Check that every file is a source."""
        missing = {*self.train, *self.val} - {source.file for source in self.sources}
        if missing:
            raise ValueError(f"no source is called {min(missing)}")
        return self


class Recipe(BaseModel):
    """How to turn a public text into a dataset: the content of a TOML file in the data folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    licence: str
    tokenizer: Literal["char", "byte", "gpt2"]
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    config: Annotated[str, Field(pattern=r"^([\w./-]+\.toml)?$")] = ""
    """The config to train with, if there is one."""
    source: RemoteFile | None = None
    pairs: Pairs | None = None

    @model_validator(mode="after")
    def check_source(self) -> "Recipe":
        """Check that the recipe has exactly one text."""
        if bool(self.source) == bool(self.pairs):
            raise ValueError("a recipe needs either [source] or [pairs]")
        return self

    @property
    def text(self) -> "RemoteFile | Pairs":
        """The source or the pairs."""
        text = self.source or self.pairs
        assert text
        return text


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        UsageError: The file is not a recipe; the message has one line per problem.
    """
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a TOML file: {error}") from error
    except ValidationError as error:
        problems = [(str(path), ".".join(map(str, item["loc"])), item["msg"]) for item in error.errors()]
        raise UsageError("\n".join(": ".join(filter(None, problem)) for problem in problems)) from error


def download_text(recipe: Recipe, data_dir: Path) -> tuple[Path, Path | None]:
    """Return the paths of a recipe's text and of its validation text, if it has one of its own.

    Files that are missing are downloaded into `data_dir`/downloads.

    Raises:
        UserError: A file cannot be downloaded, or has the wrong checksum.
    """
    return (
        (fetch(recipe.text, data_dir), None)
        if isinstance(recipe.text, RemoteFile)
        else join_pairs(recipe.text, data_dir)
    )


def join_pairs(pairs: Pairs, data_dir: Path) -> tuple[Path, Path]:
    """Write a text of pairs and its validation text, and return their paths.

    Raises:
        UserError: A file cannot be downloaded, the files of a pair have different numbers of lines, or the texts have
            the wrong checksum.
    """
    paths = {source.file: fetch(source, data_dir) for source in pairs.sources}
    texts = [join_lines(names, paths) for names in (pairs.train, pairs.val)]
    sha256 = hashlib.sha256(b"".join(texts)).hexdigest()
    if sha256 != pairs.sha256:
        raise UserError(f"{pairs.file}: not the text of the recipe: its SHA-256 is {sha256}, not {pairs.sha256}")
    targets = data_dir / "downloads" / pairs.file, data_dir / "downloads" / pairs.val_file
    for target, text in zip(targets, texts, strict=True):
        write_atomic(target, text)
    return targets


def join_lines(names: tuple[str, str], paths: Mapping[str, Path]) -> bytes:
    """Return the lines of two files in pairs, each with a tab between them.

    Raises:
        UserError: The files have different numbers of lines.
    """
    left, right = (read_lines(str(paths[name])) for name in names)
    if len(left) != len(right):
        raise UserError(f"{' and '.join(names)} have different numbers of lines: {len(left):,} and {len(right):,}")
    return "".join(f"{one}\t{other}\n" for one, other in zip(left, right, strict=True)).encode()
