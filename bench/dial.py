"""Measure the dial, `train.py --minutes`, on texts of many kinds, and print a table.

    python bench/dial.py                                              ten texts for 0.1, 1 and 5 minutes each
    python bench/dial.py --corpora=shakespeare,chinese --minutes=1
    python bench/dial.py --corpora=linux --minutes=1 --against='config/quick.toml --max_steps=1200'

    git clone https://github.com/karpathy/nanoGPT
    python bench/dial.py --nanogpt=nanoGPT                            parts and multiples of nanoGPT's time on each text

Each run is a process of its own, from a cold start of Python and with empty compiler caches. Its loss is on a part of
the text that neither training nor evaluation has seen, in nats per token. `--against` trains with other settings in
turn, for a comparison with settings chosen by hand. nanoGPT's training is that of its README for a CPU, or for a GPU
where there is one.
"""

import argparse
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median

from tqdm import tqdm

from corpora import CORPORA, ROOT
from glyphgpt.data.dataset import load_dataset
from nanogpt import README_CPU, README_GPU, Finished, NanoGPT, run

REPORTED_CHARACTERS = 1_000_000
SHORTEST = 0.05
"""Minutes that train.py takes at least."""


@dataclass(frozen=True)
class Result:
    """A finished run."""

    seconds: float
    loss: float
    """On the part of the text to report on, in nats per token."""
    choice: str = ""
    """What the dial printed, in one line."""


class Bench:
    """The folder of the texts, prepared for training."""

    def __init__(self, folder: Path, nanogpt: Path | None) -> None:
        """Make the folder if needed; `nanogpt` is a checkout of nanoGPT."""
        self.folder, self.checkout = folder, nanogpt
        folder.mkdir(parents=True, exist_ok=True)

    def script(self, *args: str, **environment: str) -> Finished:
        """Run one of the scripts."""
        return run([sys.executable, *args], ROOT, environment)

    def report_path(self, name: str) -> Path:
        """Return the file with the part of a text to report on."""
        return self.folder / f"{name}.report.txt"

    def prepare(self, name: str) -> None:
        """Prepare a text for training, and write the part of it to report on."""
        if (self.folder / name / "meta.json").exists():
            return
        train, val, report = CORPORA[name].splits(self.folder)
        text = self.folder / f"{name}.txt"
        text.write_text(train + val, encoding="utf-8", newline="")
        self.report_path(name).write_text(report[:REPORTED_CHARACTERS], encoding="utf-8", newline="")
        fraction = len(val) / len(train + val)
        flags = (f"--name={name}", f"--data_dir={self.folder}", f"--val_fraction={fraction}")
        self.script("prepare.py", str(text), *flags)

    def train(self, name: str, flags: list[str]) -> Result:
        """Train on a text, and score the best model on the part to report on."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            out_dir = f"{scratch}/run"
            paths = (f"--dataset={name}", f"--data_dir={self.folder}", f"--out_dir={out_dir}")
            cache = {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor", "TRITON_CACHE_DIR": f"{scratch}/triton"}
            finished = self.script("train.py", *flags, *paths, **cache)
            scored = self.script("sample.py", out_dir, f"--score={self.report_path(name)}", "--skip_unknown").output
        loss = re.search(r"loss ([\d.]+)", scored)
        assert loss
        choice = [line.strip() for line in finished.output.splitlines() if line.startswith("  ") and ": " in line[:12]]
        return Result(finished.seconds, float(loss[1]), "; ".join(choice))

    def train_nanogpt(self, name: str) -> Result:
        """Train nanoGPT on a text, and score its best model on the part to report on."""
        import torch  # noqa: PLC0415  (only this row needs it)

        assert self.checkout
        dataset = load_dataset(self.folder / name, self.folder)
        splits = {"train": dataset.train, "val": dataset.val}
        text, _ = dataset.tokenizer.split_unknown(self.report_path(name).read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            nanogpt = NanoGPT(self.checkout, Path(scratch) / "nanoGPT")
            nanogpt.write_tokens(
                dataset.tokenizer.vocab_size,
                **{split: part.slice(0, part.tokens) for split, part in splits.items()},
                report=dataset.tokenizer.encode(text),
            )
            finished = nanogpt.run(*(README_GPU if torch.cuda.is_available() else README_CPU))
            return Result(finished.seconds, nanogpt.evaluate("report"))


def print_row(*cells: str) -> None:
    """Print a row of the table."""
    tqdm.write(f"| {' | '.join(cells)} |")
    sys.stdout.flush()


def compare(bench: Bench, name: str, options: argparse.Namespace) -> float:
    """Train on a text with every choice, print their rows, and return how many times as fast as nanoGPT the dial is.

    That is nan without nanoGPT, and if no run reaches its loss.
    """
    bench.prepare(name)
    rivals = {f"--minutes={minutes}": [f"--minutes={minutes}"] for minutes in options.minutes.split(",")}
    nanogpt = Result(float("nan"), float("-inf"))
    if options.nanogpt:
        nanogpt = bench.train_nanogpt(name)
        print_row(name, "nanoGPT", f"{nanogpt.seconds:.1f}", f"{nanogpt.loss:.4f}", "")
        minutes = {part: max(SHORTEST, nanogpt.seconds * float(part) / 60) for part in options.parts.split(",")}
        rivals = {f"{part} of nanoGPT's time": [f"--minutes={minutes[part]:.4f}"] for part in minutes}
    rivals |= {flags: shlex.split(flags) for flags in options.against}
    results: dict[str, list[Result]] = {title: [] for title in rivals}
    for seed in range(1, options.runs + 1):
        for title, flags in rivals.items():
            results[title].append(bench.train(name, [*flags, f"--seed={seed}"]))
    fastest = float("inf")
    for title, runs in results.items():
        seconds, loss = (median(getattr(result, key) for result in runs) for key in ("seconds", "loss"))
        print_row(name, title, f"{seconds:.1f}", f"{loss:.4f}", runs[0].choice)
        if loss <= nanogpt.loss:
            fastest = min(fastest, seconds)
    return nanogpt.seconds / fastest if fastest < float("inf") else float("nan")


def main() -> None:
    """Train on each text for each time, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", default="open", help=f"open, aside, or some of {','.join(CORPORA)}")
    parser.add_argument(
        "--minutes", default="0.1,1,5", help="times to train, separated by commas (default %(default)s)"
    )
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT to compare with")
    parser.add_argument(
        "--parts",
        default="0.045,0.055,0.065,0.083,1",
        help="with --nanogpt, times to train instead of --minutes, in units of its time (default %(default)s)",
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
    bench = Bench(options.folder, options.nanogpt)
    print_row("text", "run", "seconds", "loss", "choice")
    print_row(*["---"] * 5)
    speedups = {name: compare(bench, name, options) for name in tqdm(names, unit="text")}
    if options.nanogpt:
        each = ", ".join(f"{name} {speedup:.1f}x" for name, speedup in speedups.items())
        print(f"time to nanoGPT's loss: {each}; geometric mean {geometric_mean(speedups.values()):.1f}x")


if __name__ == "__main__":
    main()
