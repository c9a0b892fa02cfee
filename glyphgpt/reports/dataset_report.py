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
"""The same for the number of rare characters."""

PROBLEMS = {
    "\\r\\n": ("line ends are \\r\\n, two characters instead of one", "--newlines=lf makes them \\n"),
    "\\r": ("line ends are \\r", "--newlines=lf makes them \\n"),
    "nfd": ("lines have accents as characters of their own", "--normalize=nfc composes letters and accents"),
    "invisible": ("characters show nothing, such as soft hyphens", "remove them unless they are meant"),
    "mojibake": ("places look like UTF-8 that was read in another encoding, such as 'Ã©' for 'é'", "check --encoding"),
    "long": ("characters are in one line", "check that the text has lines, if that matters"),
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
        found.append(
            f"{report.repeated:.0%} of the text is in lines that occurred before; --deduplicate=lines drops them"
        )
    if meta.tokenizer["kind"] == "char" and report.rare > MANY_RARE and settings.min_count == 1:
        found.append(
            f"{report.rare:,} of {meta.vocab_size:,} characters occur less than {FEW} times; --min_count={FEW} "
            "replaces them by one symbol"
        )
    if report.leaked > MUCH_LEAKED:
        found.append(
            f"{report.leaked:.0%} of the validation text stands in the training text word for word, in runs of "
            f"{LEAK_LENGTH} characters or more, so the validation loss will be too low; --deduplicate=passages drops "
            "repeated passages"
        )
    return found


def describe(problem: Found) -> str:
    """Return a problem with its place and its remedy."""
    meaning, remedy = PROBLEMS[problem.what]
    return f"{problem.place}: {problem.count:,} {meaning}; {remedy}"


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
    report, train, val = meta.report, meta.train, meta.val
    assert report
    return {
        "name": name,
        "source": ", ".join(meta.source.names[:10]) + (", …" if len(meta.source.names) > 10 else ""),
        "findings": found,
        "highlights": [
            ("Characters", f"{train.characters + val.characters:,}", f"{meta.source.bytes:,} bytes in the files"),
            ("Lines", f"{report.lines:,}", f"the longest has {report.longest_line:,} characters"),
            ("Vocabulary", f"{meta.vocab_size:,}", f"{meta.tokenizer['kind']} tokens"),
            ("Training text", f"{train.tokens:,}", "tokens"),
            ("Validation text", f"{val.tokens:,}", "tokens"),
            ("Of it in the training text", f"{report.leaked:.1%}", f"in runs of {LEAK_LENGTH} characters or more"),
            ("Repeated lines", f"{report.repeated:.1%}", "of the text, without short lines"),
            ("Rare characters", f"{report.rare:,}", f"occur less than {FEW} times"),
        ],
        "examined": report.examined,
        "characters": report.characters,
        "kinds": [(kind, f"{count:,}", count / report.characters) for kind, count in report.kinds.items()],
        "rarest": [
            (found.what, f"U+{ord(found.what):04X}", f"{found.count:,}", str(found.place)) for found in report.rarest
        ],
    }
