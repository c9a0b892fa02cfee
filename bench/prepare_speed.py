"""Measure prepare.py on generated text: seconds, megabytes per second, peak memory.

    python bench/prepare_speed.py [--megabytes=1000] [--tokenizers=char,byte] [--runs=1]

Each run is a process of its own, whose peak memory the operating system counts (ru_maxrss). For comparison, runs
alternate with a copy of the file (cp, then sync) and, for gpt2, with tiktoken alone on as many threads. Needs free
disk space of four times the text's size. Prints a table for bench/RESULTS.md.
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
    "the", "of", "and", "to", "in", "that", "is", "was", "he", "for", "it", "with", "as", "his", "on", "be", "at", "by",
]  # fmt: skip


def main() -> None:
    """Generate the text, prepare it with each tokenizer, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the text (default 1000)")
    parser.add_argument("--tokenizers", default="char,byte", help="names, separated by commas (default char,byte)")
    parser.add_argument("--runs", type=int, default=1, help="runs of each, alternately (default 1)")
    parser.add_argument("--accents", action="store_true", help="include letters outside ASCII")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        text, scratch = Path(name) / "text.txt", Path(name)
        write_text(text, options.megabytes * 10**6, accents=options.accents)
        tokenizers = options.tokenizers.split(",")
        programs: dict[str, Callable[[], tuple[float, int]]] = {"cp, sync": partial(copy, text)}
        programs |= {tokenizer: partial(prepare, text, tokenizer, scratch) for tokenizer in tokenizers}
        if "gpt2" in tokenizers:
            programs["tiktoken alone"] = partial(encode, text, GPT2Tokenizer(scratch / "data"))
        results: dict[str, list[tuple[float, int]]] = {title: [] for title in programs}
        for title in [*programs] * options.runs:
            results[title].append(programs[title]())
        size = text.stat().st_size / 1e6
    print("| program | text | seconds (lowest to highest) | MB/s | GB per minute | times cp | peak memory |")
    print("|---|---|---|---|---|---|---|")
    cp_seconds = statistics.median(seconds for seconds, _ in results["cp, sync"])
    for title, runs in results.items():
        times, peaks = zip(*runs, strict=True)
        seconds = statistics.median(times)
        spread = f"{seconds:.1f} ({min(times):.1f} to {max(times):.1f})"
        rates = f"{size / seconds:,.0f} | {size / seconds * 0.06:.1f} | {seconds / cp_seconds:.1f}"
        memory = f"{max(peaks) / 2**20:,.0f} MiB" if max(peaks) else ""
        print(f"| {title} | {size:,.0f} MB | {spread} | {rates} | {memory} |")


def copy(text: Path) -> tuple[float, int]:
    """Copy the text to the disk with cp and sync; return the seconds, and 0 for the memory."""
    target = text.with_name("copy")
    subprocess.run(["sync"], check=True)
    started = time.perf_counter()
    subprocess.run(["cp", str(text), str(target)], check=True)
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds, 0


def encode(text: Path, tokenizer: GPT2Tokenizer) -> tuple[float, int]:
    """Encode the text with tiktoken's threads, in chunks of lines, and discard the ids; return the seconds, and 0."""
    started, threads = time.perf_counter(), os.cpu_count() or 1
    with text.open(encoding="utf-8") as file:
        while lines := file.readlines(1 << 18):
            chunks = ["".join(lines)] + ["".join(file.readlines(1 << 18)) for _ in range(4 * threads - 1)]
            tokenizer._encoding.encode_ordinary_batch(chunks, num_threads=threads)
    return time.perf_counter() - started, 0


def write_text(path: Path, size: int, *, accents: bool) -> None:
    """Write about `size` bytes of lines of words, which repeat one block of a megabyte."""
    rng = random.Random(0)
    words = [*WORDS, "élan", "über", "日本"] if accents else WORDS
    lines = (" ".join(rng.choices(words, k=12)).capitalize() + ".\n" for _ in range(18_000))
    block = "".join(lines).encode()
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)


def prepare(text: Path, tokenizer: str, scratch: Path) -> tuple[float, int]:
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
    """Return the peak memory of a finished process in bytes; Linux counts KiB, macOS bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
