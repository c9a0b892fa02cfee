"""The report on the text of a dataset: findings, which prepare.py prints, and a page in the dataset's folder."""

from pathlib import Path
from typing import Any

from glyphgpt.data.dataset import DatasetMeta, Found, TextReport
from glyphgpt.data.inspection import FEW, LEAK_LENGTH
from glyphgpt.files import REPORT, write_atomic
from glyphgpt.reports.templates import render
from glyphgpt.settings import PrepareSettings

TEMPLATE = "dataset.html"
MUCH_REPEATED, MUCH_LEAKED = 0.3, 0.05
"""Fractions of the text, and of the validation text, from which a finding is reported."""
MANY_RARE = 50
"""Number of rare characters from which a finding is reported."""

PROBLEMS = {
    "\\r\\n": ("Windows line ends, \\r\\n: two characters instead of one", "--newlines=lf makes them \\n"),
    "\\r": ("line ends \\r", "--newlines=lf makes them \\n"),
    "nfd": ("lines with letters and accents that could be one character", "--normalize=nfc composes them"),
    "invisible": ("characters that show nothing, such as soft hyphens", "remove them unless they are meant"),
    "mojibake": ("places that look like UTF-8 read in another encoding, such as 'Ã©' for 'é'", "check --encoding"),
    "long": ("characters in one line", "check the line ends if the text should have lines"),
}
"""What each problem of an inspection means, after its count, and what to do."""


def findings(meta: DatasetMeta, settings: PrepareSettings) -> list[str]:
    """Return what may disturb training with a dataset, and what to do; one line each."""
    report = meta.report
    if not report:
        return []
    mended = {"\\r\\n", "\\r"} if settings.newlines == "lf" else set()
    mended |= {"nfd"} if settings.normalize == "nfc" else set()
    found = [describe(problem) for problem in report.problems if problem.what not in mended]
    if report.repeated > MUCH_REPEATED and settings.deduplicate == "none":
        found.append(f"{report.repeated:.0%} of the text is in repeated lines; --deduplicate=lines drops them")
    learned = meta.tokenizer["kind"] == "char" and not settings.vocabulary
    if learned and report.rare > MANY_RARE and settings.min_count == 1:
        found.append(
            f"{report.rare:,} of {meta.vocab_size:,} characters occur fewer than {FEW} times; --min_count={FEW} "
            "replaces them by one symbol"
        )
    if report.leaked > MUCH_LEAKED:
        part = "records" if "separator" in meta.tokenizer else "passages"
        remedies = [f"--deduplicate={part}"] * (settings.deduplicate == "none") + ["--val=FILE, with another text"]
        found.append(
            f"{report.leaked:.0%} of the validation text also occurs in the training text, in {leaks_in_words(meta)}, "
            f"so the validation loss will be too low; try {' or '.join(remedies)}"
        )
    if meta.recipe:  # which has no options
        found = [finding.partition("; ")[0] for finding in found]
    return found


def describe(problem: Found) -> str:
    """Return a problem with its place and its remedy."""
    meaning, remedy = PROBLEMS[problem.what]
    return f"{problem.place}: {problem.count:,} x {meaning}; {remedy}"


def leaks_in_words(meta: DatasetMeta) -> str:
    """Return what counts as a part of the validation text that occurs in the training text too."""
    records = "whole records or " if "separator" in meta.tokenizer else ""
    return f"{records}runs of {LEAK_LENGTH} characters or more"


def kinds_in_words(report: TextReport) -> str:
    """Return the lines and the most frequent kinds of characters of a text.

    >>> kinds_in_words(TextReport.model_construct(characters=100, lines=8, kinds={"digits": 60, "symbols": 40}))
    '8 lines; 60% digits, 40% symbols'
    """
    kinds = [f"{count / report.characters:.0%} {kind}" for kind, count in report.kinds.items()]
    return f"{report.lines:,} lines; {', '.join(kinds[:4])}"


def write_dataset_report(folder: Path, name: str, meta: DatasetMeta, found: list[str]) -> None:
    """Write the page of a dataset with a report into its folder.

    Raises:
        UserError: The page cannot be written.
    """
    write_atomic(folder / REPORT, render(TEMPLATE, page_data(name, meta, found)).encode())


def page_data(name: str, meta: DatasetMeta, found: list[str]) -> dict[str, Any]:
    """Return the data of a page."""
    report = meta.report
    assert report
    splits = {"Training text": meta.train, "Validation text": meta.val} | (
        {"Test text": meta.test} if meta.test else {}
    )
    characters = sum(split.characters for split in splits.values())
    return {
        "name": name,
        "source": ", ".join(meta.source.names[:10]) + (", …" if len(meta.source.names) > 10 else ""),
        "findings": found,
        "highlights": [
            ("Characters", f"{characters:,}", f"{meta.source.bytes:,} bytes in the files"),
            ("Lines", f"{report.lines:,}", f"the longest examined one has {report.longest_line:,} characters"),
            ("Vocabulary", f"{meta.vocab_size:,}", f"{meta.tokenizer['kind']} tokens"),
            *((title, f"{split.tokens:,}", "tokens") for title, split in splits.items()),
            ("Validation in training", f"{report.leaked:.1%}", f"in {leaks_in_words(meta)}"),
            ("Repeated lines", f"{report.repeated:.1%}", "of the text, without short lines"),
            ("Rare characters", f"{report.rare:,}", f"occur fewer than {FEW} times"),
        ],
        "examined": report.examined,
        "characters": report.characters,
        "kinds": [(kind, f"{count:,}", count / report.characters) for kind, count in report.kinds.items()],
        "rarest": [
            (found.what, f"U+{ord(found.what):04X}", f"{found.count:,}", str(found.place)) for found in report.rarest
        ],
    }
