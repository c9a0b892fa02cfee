"""Measure training on one text as a single shard and as many: tokens a second, and memory of its own.

python bench/shards_speed.py [--megabytes=1500] [--shards=100] [--runs=5]

A network of almost no size reads batches from a text that is too large to be kept in memory whole, from both data
sets in turn, each run a process of its own. Speed is the median over intervals of a run's log; memory is what Linux
counts as the process's own (RssAnon, without files that it maps), after the first tenth of the steps and at the end.
Needs free disk of three times the text's size. Prints a table for bench/RESULTS.md.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from prepare_speed import ROOT, write_text

STEPS = 3000
FLAGS = [
    "--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=64", "--batch_size=64", "--device=cpu", "--plot=False",
    f"--max_steps={STEPS}", "--log_every=100", f"--eval_every={STEPS}", "--eval_tokens=1000", "--sample_tokens=0",
]  # fmt: skip


def main() -> None:
    """Prepare the text both ways, train on each in turn, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1500, help="size of the text (default 1500)")
    parser.add_argument("--shards", type=int, default=100, help="how many against one (default 100)")
    parser.add_argument("--runs", type=int, default=5, help="runs of each, alternately (default 5)")
    options = parser.parse_args()
    size = options.megabytes * 10**6
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_text(folder / "text.txt", size, accents=False)
        shards = {1: size, options.shards: -(-size // options.shards)}
        for number, tokens in shards.items():
            words = [str(folder / "text.txt"), f"--name=of{number}", f"--shard_tokens={tokens}", "--val_fraction=0.001"]
            run("prepare.py", *words, f"--data_dir={folder}").wait()
        measured: dict[int, list[tuple[float, float, float]]] = {number: [] for number in shards}
        for attempt in range(options.runs):
            for number, results in measured.items():
                results.append(measure(folder, f"of{number}", folder / f"run{number}-{attempt}"))
    print(
        "| shards | runs | tokens/s (lowest to highest) | own memory, first tenth | at the end |\n|---|---|---|---|---|"
    )
    for number, results in measured.items():
        speeds, early, late = zip(*results, strict=True)
        spread = f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})"
        memory = " | ".join(f"{statistics.median(values):,.0f} MiB" for values in (early, late))
        print(f"| {number} | {options.runs} | {spread} | {memory} |")


def run(script: str, *words: str) -> "subprocess.Popen[bytes]":
    """Start one of the scripts."""
    return subprocess.Popen([sys.executable, str(ROOT / script), *words], cwd=ROOT, stdout=subprocess.DEVNULL)


def measure(data_dir: Path, name: str, out_dir: Path) -> tuple[float, float, float]:
    """Train once; return tokens a second, and MiB of its own memory early and at last."""
    process = run("train.py", f"--data_dir={data_dir}", f"--dataset={name}", f"--out_dir={out_dir}", *FLAGS)
    memory: list[tuple[int, float]] = []  # steps done, MiB
    while process.poll() is None:
        time.sleep(0.05)
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8"))
        steps = [row["step"] for row in log(out_dir)]
        if found and steps:
            memory.append((max(steps), int(found[1]) / 1024))
    if process.returncode:
        sys.exit(f"train.py failed with status {process.returncode}")
    rows = [row for row in log(out_dir) if row["kind"] == "train"]
    speeds = [(b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"]) for a, b in pairwise(rows)]
    early = max(mib for step, mib in memory if step <= STEPS / 10)
    return statistics.median(speeds), early, memory[-1][1]


def log(out_dir: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a run's log so far."""
    path = out_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]


if __name__ == "__main__":
    main()
