"""Measure training on one text as a single shard and as many shards: tokens per second, and private memory.

    python bench/shards_speed.py [--megabytes=1500] [--shards=100] [--runs=5]

A tiny network reads batches from a text that does not fit into memory, alternately from both datasets, each run in a
process of its own. The speed is the median over the log intervals of a run. The memory is the private memory of the
process (RssAnon of Linux, which excludes mapped files), after the first tenth of the steps and at the end. Needs free
disk space of three times the text's size. Prints a table for bench/RESULTS.md.
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
    "--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=64", "--batch_size=64", "--device=cpu",
    f"--max_steps={STEPS}", "--log_every=100", f"--eval_every={STEPS}", "--eval_tokens=1000", "--sample_tokens=0",
]  # fmt: skip


def main() -> None:
    """Prepare both datasets, train on each in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1500, help="size of the text (default 1500)")
    parser.add_argument("--shards", type=int, default=100, help="shards of the second dataset (default 100)")
    parser.add_argument("--runs", type=int, default=5, help="runs on each, alternately (default 5)")
    options = parser.parse_args()
    size = options.megabytes * 10**6
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_text(folder / "text.txt", size, accents=False)
        shard_tokens = {1: size, options.shards: -(-size // options.shards)}
        for shards, tokens in shard_tokens.items():
            args = [str(folder / "text.txt"), f"--name=shards-{shards}", f"--shard_tokens={tokens}"]
            start("prepare.py", *args, "--val_fraction=0.001", f"--data_dir={folder}").wait()
        results: dict[int, list[tuple[float, float, float]]] = {shards: [] for shards in shard_tokens}
        for run in range(options.runs):
            for shards, runs in results.items():
                runs.append(train(folder, f"shards-{shards}", folder / f"run-{shards}-{run}"))
    print("| shards | runs | tokens/s (lowest to highest) | private memory, first tenth | at the end |")
    print("|---|---|---|---|---|")
    for shards, runs in results.items():
        speeds, early, late = zip(*runs, strict=True)
        spread = f"{statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})"
        memory = " | ".join(f"{statistics.median(values):,.0f} MiB" for values in (early, late))
        print(f"| {shards} | {options.runs} | {spread} | {memory} |")


def start(script: str, *args: str) -> "subprocess.Popen[bytes]":
    """Start a script."""
    return subprocess.Popen([sys.executable, str(ROOT / script), *args], cwd=ROOT, stdout=subprocess.DEVNULL)


def train(data_dir: Path, dataset: str, out_dir: Path) -> tuple[float, float, float]:
    """Train once; return tokens per second, and MiB of private memory after a tenth of the steps and at the end."""
    process = start("train.py", f"--data_dir={data_dir}", f"--dataset={dataset}", f"--out_dir={out_dir}", *FLAGS)
    memory: list[tuple[int, float]] = []  # step, MiB
    while process.poll() is None:
        time.sleep(0.05)
        private = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8"))
        steps = [row["step"] for row in read_metrics(out_dir)]
        if private and steps:
            memory.append((max(steps), int(private[1]) / 1024))
    if process.returncode:
        sys.exit(f"train.py failed with status {process.returncode}")
    rows = [row for row in read_metrics(out_dir) if row["kind"] == "train"]
    speeds = [(b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"]) for a, b in pairwise(rows)]
    early = max(mib for step, mib in memory if step <= STEPS / 10)
    return statistics.median(speeds), early, memory[-1][1]


def read_metrics(out_dir: Path) -> list[dict[str, Any]]:
    """Return the complete rows of a run's metrics so far."""
    path = out_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]


if __name__ == "__main__":
    main()
