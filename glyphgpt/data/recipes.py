"""Recipes: TOML files that describe how a well-known text becomes a dataset."""

import hashlib
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from glyphgpt.data.downloads import FileName, Sha256, Source, fetch
from glyphgpt.data.text import read_lines
from glyphgpt.errors import UsageError, UserError
from glyphgpt.files import write_atomic

QUICK = "config/quick.toml"


class Pairs(BaseModel):
    """A text made of two that tell the same line by line: a line of one, a tab, the line of the other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: FileName
    sha256: Sha256
    sources: tuple[Source, ...]
    aligned: tuple[tuple[str, str], ...]
    """Which files stand side by side, by name; one pair of files after the other."""

    @model_validator(mode="after")
    def check_names(self) -> "Pairs":
        """See that every file that stands beside another is a source."""
        missing = {name for names in self.aligned for name in names} - {source.file for source in self.sources}
        if missing:
            raise ValueError(f"no source is called {min(missing)}")
        return self


class Recipe(BaseModel):
    """How a well-known text becomes a data set: a TOML file in the data folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    licence: str
    tokenizer: Literal["char", "byte", "gpt2"]
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    config: Annotated[str, Field(pattern=r"^[\w./-]+\.toml$")] = QUICK
    """The settings to train on it with."""
    source: Source | None = None
    pairs: Pairs | None = None

    @model_validator(mode="after")
    def check_text(self) -> "Recipe":
        """See that there is a text."""
        if bool(self.source) == bool(self.pairs):
            raise ValueError("a recipe names a source, or pairs of them")
        return self

    @property
    def text(self) -> "Source | Pairs":
        """What the text is made from."""
        chosen = self.source or self.pairs
        assert chosen
        return chosen


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        UsageError: it is not a recipe; one line per problem.
    """
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a TOML file: {error}") from error
    except ValidationError as error:
        places = [(".".join(map(str, problem["loc"])), problem["msg"]) for problem in error.errors()]
        told = [": ".join(filter(None, (str(path), place, message))) for place, message in places]
        raise UsageError("\n".join(told)) from error


def download_text(recipe: Recipe, data_dir: Path) -> Path:
    """Return the path of a recipe's text, bringing what it is made from into `data_dir`/downloads.

    Raises:
        UserError: something could not be had, or is not what its checksum tells of.
    """
    return fetch(recipe.text, data_dir) if isinstance(recipe.text, Source) else align(recipe.text, data_dir)


def align(pairs: Pairs, data_dir: Path) -> Path:
    """Write a text of pairs, and return its path.

    Raises:
        UserError: a file could not be had, or they do not make the text that the checksum tells of.
    """
    paths = {source.file: fetch(source, data_dir) for source in pairs.sources}
    target = data_dir / "downloads" / pairs.file
    lines: list[str] = []
    for names in pairs.aligned:
        left, right = (read_lines(str(paths[name])) for name in names)
        if len(left) != len(right):
            raise UserError(f"{' and '.join(names)} differ in their numbers of lines: {len(left):,} and {len(right):,}")
        lines += [f"{one}\t{other}\n" for one, other in zip(left, right, strict=True)]
    text = "".join(lines).encode()
    if hashlib.sha256(text).hexdigest() != pairs.sha256:
        raise UserError(
            f"{pairs.file}: not the text that the recipe tells of: its SHA-256 is "
            f"{hashlib.sha256(text).hexdigest()}, not {pairs.sha256}"
        )
    write_atomic(target, text)
    return target
