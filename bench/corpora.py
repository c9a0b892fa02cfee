"""Texts for benchmarks, made from package indexes: several languages, sizes and kinds.

They come from Debian packages (`apt-get download`, which needs no root) and from Python's own library. Each text is
split in three: 80% to train on, 10% to validate on, and 10% to report on, on which nothing is ever chosen.
"""

import gzip
import random
import subprocess
import sysconfig
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from glyphgpt.data.recipes import download_text, read_recipe

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Corpus:
    """A text: its kind, how to read it from a folder of downloads, and its length."""

    kind: str
    read: Callable[[Path], str]
    characters: int | None = None
    """Characters to use; None for all."""
    aside: bool = False
    """Whether the text was kept aside until the rules of the dial were final."""

    def splits(self, folder: Path) -> tuple[str, str, str]:
        """Return the parts of the text to train on, to validate on, and to report on."""
        text = self.read(folder)[: self.characters]
        train, val = int(0.8 * len(text)), int(0.9 * len(text))
        return text[:train], text[train:val], text[val:]


def unpack(folder: Path, package: str) -> Path:
    """Return the folder of the files of a Debian package, after downloading it if needed."""
    unpacked = folder / package
    if not unpacked.exists():
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
        (archive,) = folder.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
        archive.unlink()
    return unpacked


def decode(data: bytes) -> str:
    """Return the text of a file's bytes, without bytes that are not UTF-8."""
    return data.decode(errors="ignore")


def shuffle(texts: Iterable[str]) -> list[str]:
    """Return the distinct texts in a random order that is always the same, so that the three parts are alike."""
    distinct = sorted(set(texts))
    random.Random(1).shuffle(distinct)
    return distinct


def fortunes(package: str) -> Callable[[Path], str]:
    """Return a function that reads a package of fortunes: many short texts."""

    def read(folder: Path) -> str:
        files = sorted(unpack(folder, package).glob("usr/share/games/fortunes/**/*"))
        texts = [path.read_bytes() for path in files if path.is_file() and path.suffix in ("", ".fortunes")]
        return "\n\n".join(shuffle(part.strip() for text in texts for part in decode(text).split("\n%")))

    return read


def compressed(package: str, path: str) -> Callable[[Path], str]:
    """Return a function that reads a file, compressed by gzip, of a Debian package."""
    return lambda folder: decode(gzip.decompress((unpack(folder, package) / path).read_bytes()))


def shakespeare(folder: Path) -> str:
    """Return Tiny Shakespeare, which `prepare.py shakespeare_char` uses too."""
    path, _ = download_text(read_recipe(ROOT / "data" / "shakespeare_char.toml"), folder)
    return path.read_text(encoding="utf-8")


def topics(_folder: Path) -> str:
    """Return the reference text of Python's help function."""
    from pydoc_data.topics import topics  # noqa: PLC0415  (half a megabyte)

    return "\n\n".join(topics.values())


def words(folder: Path) -> str:
    """Return a list of English words and names, one on each line."""
    path = unpack(folder, "wamerican") / "usr/share/dict/american-english"
    return "\n".join(shuffle(path.read_text(encoding="utf-8").split()))


def python_library(_folder: Path) -> str:
    """Return the distinct modules of Python's library, without its tests and the packages that pip installed."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in library.glob("**/*.py") if not {"site-packages", "test", "tests"} & set(path.parts)]
    return "\n\n".join(shuffle(decode(path.read_bytes()) for path in paths))


def linux(folder: Path) -> str:
    """Return 100 MB of Linux: C files of up to 100 kB."""
    source = unpack(folder, "linux-source-6.1") / "usr/src/linux-source-6.1.tar.xz"
    with tarfile.open(source) as archive:
        files = [
            archive.extractfile(member) for member in archive if member.name.endswith(".c") and member.size < 10**5
        ]
        texts = shuffle(decode(file.read()) for file in files if file)
    return "\n\n".join(texts)


CORPORA = {
    "topics_20k": Corpus("reference, English", topics, 20_000),
    "shakespeare_60k": Corpus("verse, English", shakespeare, 60_000),
    "german_200k": Corpus("jokes and quotations, German", fortunes("fortunes-de"), 200_000),
    "topics": Corpus("reference, English", topics),
    "words": Corpus("words and names, English", words),
    "chinese": Corpus("short texts, Chinese", fortunes("fortunes-zh")),
    "shakespeare": Corpus("verse, English", shakespeare),
    "changelog": Corpus(
        "log of changes",
        compressed("linux-source-6.1", "usr/share/doc/linux-source-6.1/changelog.Debian.gz"),
        5_000_000,
    ),
    "python": Corpus("code, Python", python_library, 5_000_000),
    "linux": Corpus("code, C", linux, 100_000_000),
    "russian": Corpus("jokes and quotations, Russian", fortunes("fortunes-ru"), aside=True),
    "dictionary": Corpus(
        "dictionary, English", compressed("dict-foldoc", "usr/share/dictd/foldoc.dict.dz"), aside=True
    ),
}
