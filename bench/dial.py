"""Measure the dial, `train.py --minutes`, on texts of many kinds, and print a table.

    python bench/dial.py                                              ten texts for 0.1, 1 and 5 minutes each
    python bench/dial.py --corpora=shakespeare,chinese --minutes=1
    python bench/dial.py --corpora=linux --minutes=1 --against='config/quick.toml --max_steps=1200'

Each run is a process of its own, from a cold start of Python. Its loss is on a part of the text that neither training
nor evaluation has seen. `--against` trains with other settings in turn, for a comparison with settings chosen by hand.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tqdm import tqdm

from corpora import CORPORA, ROOT

REPORTED_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Result:
    """A finished run."""

    seconds: float
    loss: float
    """On the part of the text to report on, in nats per character."""
    choice: str
    """What the dial printed, in one line."""


def prepare(name: str, folder: Path) -> None:
    """Prepare a text for training, and write the part of it to report on."""
    if (folder / name / "meta.json").exists():
        return
    train, val, report = CORPORA[name].splits(folder)
    text = folder / f"{name}.txt"
    text.write_text(train + val, encoding="utf-8", newline="")
    (folder / f"{name}.report.txt").write_text(report[:REPORTED_CHARACTERS], encoding="utf-8", newline="")
    fraction = len(val) / len(train + val)
    run("prepare.py", str(text), f"--name={name}", f"--data_dir={folder}", f"--val_fraction={fraction}")


def run(*command: str) -> str:
    """Run one of the scripts, and return what it prints; exit with that if it fails."""
    finished = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(f"{shlex.join(command)}\n{finished.stdout}{finished.stderr}")
    return finished.stdout


def train(name: str, folder: Path, flags: list[str]) -> Result:
    """Train on a text, and score the best model on the part to report on."""
    with tempfile.TemporaryDirectory(dir=folder) as out_dir:
        start = time.perf_counter()
        output = run("train.py", *flags, f"--dataset={name}", f"--data_dir={folder}", f"--out_dir={out_dir}")
        seconds = time.perf_counter() - start
        scored = run("sample.py", out_dir, f"--score={folder}/{name}.report.txt", "--skip_unknown")
    loss = re.search(r"loss ([\d.]+)", scored)
    assert loss
    choice = [line.strip() for line in output.splitlines() if line.startswith("  ") and ": " in line[:12]]
    return Result(seconds, float(loss[1]), "; ".join(choice))


def main() -> None:
    """Train on each text for each time, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", default="open", help=f"open, aside, or some of {','.join(CORPORA)}")
    parser.add_argument(
        "--minutes", default="0.1,1,5", help="times to train, separated by commas (default %(default)s)"
    )
    parser.add_argument("--runs", type=int, default=1, help="runs of each, with seeds 1, 2, ... (default %(default)s)")
    parser.add_argument("--against", action="append", default=[], help="flags of another run; may be given repeatedly")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "dial", help="for texts (default %(default)s)")
    options = parser.parse_args()
    groups = {
        kind: [name for name, corpus in CORPORA.items() if corpus.aside == (kind == "aside")]
        for kind in ("open", "aside")
    }
    names = groups.get(options.corpora) or options.corpora.split(",")
    options.folder.mkdir(parents=True, exist_ok=True)
    rivals = {f"--minutes={minutes}": [f"--minutes={minutes}"] for minutes in options.minutes.split(",")}
    rivals |= {flags: shlex.split(flags) for flags in options.against}
    print("| text | run | seconds | loss | choice |\n| --- | --- | --- | --- | --- |", flush=True)
    for name in tqdm(names, unit="text"):
        prepare(name, options.folder)
        results: dict[str, list[Result]] = {title: [] for title in rivals}
        for seed in range(1, options.runs + 1):
            for title, flags in rivals.items():
                results[title].append(train(name, options.folder, [*flags, f"--seed={seed}"]))
        for title, runs in results.items():
            seconds, loss = (median(getattr(result, key) for result in runs) for key in ("seconds", "loss"))
            tqdm.write(f"| {name} | {title} | {seconds:.1f} | {loss:.4f} | {runs[0].choice} |")


if __name__ == "__main__":
    main()
