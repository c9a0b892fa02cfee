"""Measure prepare.py on generated text: seconds, megabytes a second, peak memory.

python bench/prepare_speed.py [--megabytes=1000] [--tokenizers=char,byte]

Each run is a process of its own; its peak memory is what the operating system counted (ru_maxrss). Needs free
disk of twice the text's size. Prints a table for bench/RESULTS.md.
"""

import argparse
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
    parser.add_argument("--accents", action="store_true", help="text with letters outside ASCII")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        write_text(text, options.megabytes * 10**6, accents=options.accents)
        print("| tokenizer | text | seconds | MB/s | peak memory |\n|---|---|---|---|---|")
        for tokenizer in options.tokenizers.split(","):
            seconds, peak = measure(text, tokenizer, Path(scratch))
            size = text.stat().st_size / 1e6
            print(f"| {tokenizer} | {size:,.0f} MB | {seconds:.1f} | {size / seconds:,.0f} | {peak / 2**20:,.0f} MiB |")


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
    command += [f"--tokenizer={tokenizer}", f"--data_dir={scratch / 'data'}"]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"prepare.py failed with status {os.waitstatus_to_exitcode(status)}")
    return seconds, peak_bytes(usage)


def peak_bytes(usage: resource.struct_rusage) -> int:
    """Return the peak memory of a finished process; Linux counts it in KiB, macOS in bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
