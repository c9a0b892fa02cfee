"""Measure prepare.py on generated text: seconds, megabytes a second, peak memory.

python bench/prepare_speed.py [--megabytes=1000] [--tokenizers=char,byte] [--runs=1]

Each run is a process of its own; its peak memory is what the operating system counted (ru_maxrss). In turn with them
the system copies the file (cp, then sync) and, for gpt2, tiktoken encodes it alone with as many threads. Needs free
disk of four times the text's size. Prints a table for bench/RESULTS.md.
"""

import argparse
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from glyphgpt.data.tokenizers import GPT2Tokenizer

ROOT = Path(__file__).parent.parent
WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "that",
    "is",
    "was",
    "he",
    "for",
    "it",
    "with",
    "as",
    "his",
    "on",
    "be",
    "at",
    "by",
]


def main() -> None:
    """Generate the text, prepare it with each tokenizer, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the text (default 1000)")
    parser.add_argument("--tokenizers", default="char,byte", help="which to measure (default char,byte)")
    parser.add_argument("--runs", type=int, default=1, help="runs of each, alternately (default 1)")
    parser.add_argument("--accents", action="store_true", help="text with letters outside ASCII")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        text, scratch = Path(name) / "text.txt", Path(name)
        write_text(text, options.megabytes * 10**6, accents=options.accents)
        tokenizers = options.tokenizers.split(",")
        work: dict[str, Callable[[], tuple[float, int]]] = {"cp, sync": partial(copy, text)}
        work |= {tokenizer: partial(measure, text, tokenizer, scratch) for tokenizer in tokenizers}
        if "gpt2" in tokenizers:
            work["tiktoken alone"] = partial(encode, text, GPT2Tokenizer(scratch / "data"))
        took: dict[str, list[tuple[float, int]]] = {title: [] for title in work}
        for title in [*work] * options.runs:
            took[title].append(work[title]())
        size = text.stat().st_size / 1e6
    print("| what | text | seconds (lowest to highest) | MB/s | GB a minute | times cp | peak memory |")
    print("|---|---|---|---|---|---|---|")
    copied = statistics.median(seconds for seconds, _ in took["cp, sync"])
    for title, results in took.items():
        times, peaks = zip(*results, strict=True)
        seconds = statistics.median(times)
        spread = f"{seconds:.1f} ({min(times):.1f} to {max(times):.1f})"
        rates = f"{size / seconds:,.0f} | {size / seconds * 0.06:.1f} | {seconds / copied:.1f}"
        memory = f"{max(peaks) / 2**20:,.0f} MiB" if max(peaks) else ""
        print(f"| {title} | {size:,.0f} MB | {spread} | {rates} | {memory} |")


def copy(text: Path) -> tuple[float, int]:
    """Have the system copy the text to the disk; return the seconds."""
    target = text.with_name("copy")
    subprocess.run(["sync"], check=True)
    started = time.perf_counter()
    subprocess.run(["cp", str(text), str(target)], check=True)
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds, 0


def encode(text: Path, tokenizer: GPT2Tokenizer) -> tuple[float, int]:
    """Encode the text with tiktoken's own threads, in pieces of lines, and throw the ids away; return the seconds."""
    started, threads = time.perf_counter(), os.cpu_count() or 1
    with text.open(encoding="utf-8") as file:
        while lines := file.readlines(1 << 18):
            pieces = ["".join(lines)] + ["".join(file.readlines(1 << 18)) for _ in range(4 * threads - 1)]
            tokenizer._encoding.encode_ordinary_batch(pieces, num_threads=threads)
    return time.perf_counter() - started, 0


def write_text(path: Path, size: int, *, accents: bool) -> None:
    """Write about `size` bytes of lines of words: one block of a megabyte, again and again."""
    chosen = random.Random(0)
    words = [*WORDS, "élan", "über", "日本"] if accents else WORDS
    lines = (" ".join(chosen.choices(words, k=12)).capitalize() + ".\n" for _ in range(18_000))
    block = "".join(lines).encode()
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)


def measure(text: Path, tokenizer: str, scratch: Path) -> tuple[float, int]:
    """Run prepare.py once; return its seconds and its peak memory in bytes."""
    command = [sys.executable, str(ROOT / "prepare.py"), str(text), f"--name=measured-{tokenizer}"]
    command += [f"--tokenizer={tokenizer}", f"--data_dir={scratch / 'data'}", "--overwrite"]
    subprocess.run(["sync"], check=True)
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    shutil.rmtree(scratch / "data" / f"measured-{tokenizer}", ignore_errors=True)
    if status:
        sys.exit(f"prepare.py failed with status {os.waitstatus_to_exitcode(status)}")
    return seconds, peak_bytes(usage)


def peak_bytes(usage: resource.struct_rusage) -> int:
    """Return the peak memory of a finished process; Linux counts it in KiB, macOS in bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
