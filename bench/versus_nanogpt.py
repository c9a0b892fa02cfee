"""Compare the speed of glyphgpt with nanoGPT's on this machine, and add a table to bench/RESULTS.md.

    git clone https://github.com/karpathy/nanoGPT
    python bench/versus_nanogpt.py --nanogpt=nanoGPT                  every CPU row; about half an hour
    python bench/versus_nanogpt.py --nanogpt=nanoGPT --rows=sampling,stream --runs=5
    python bench/versus_nanogpt.py --nanogpt=nanoGPT --rows=gpu       the rows of a CUDA GPU, as in bench/gpu.sh

Both programs run unmodified and alternately, in processes of their own: nanoGPT with the commands of its README, in a
copy of the checkout. Unless a row says otherwise, times are those of whole processes from a cold start of Python, with
empty compiler caches. A row quotes the median of its runs. bench/dial.py compares the losses.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median

from tqdm import tqdm

from glyphgpt.data.dataset import load_dataset
from glyphgpt.data.tokenizers import decode
from nanogpt import README_CPU, README_GPU, Finished, NanoGPT, run
from prepare_speed import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "RESULTS.md"
README_SAMPLE = ["sample.py", "--out_dir=out-shakespeare-char", "--device=cpu"]
SHORT = ["--max_iters=200", "--eval_interval=1000"]
GPT2_BENCH = ["bench.py", "--real_data=False"]
SMALL_MODEL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}
BABY_MODEL = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}


@dataclass(frozen=True)
class SpeedRow:
    """A row that compares training speeds with the same network size, batch and settings."""

    title: str
    config: str
    nanogpt_args: tuple[str, ...]
    tokens: int
    """Of each step of nanoGPT."""
    minimum: str
    target: str


SPEED_ROWS = {
    "training-speed": SpeedRow(
        "CPU, training speed", "config/nanogpt_cpu.toml", (*README_CPU, *SHORT), 12 * 64, "2x", "3x"
    ),
}
GPU_SPEED_ROWS = {
    "gpu-training-speed": SpeedRow(
        "GPU, training speed", "config/nanogpt_gpu.toml", (*README_GPU, *SHORT, "--log_interval=1"),
        64 * 256, "2x", "4x",
    ),
    "gpu-124m": SpeedRow(
        "GPU, training speed of GPT-2 124M", "config/gpt2.toml", tuple(GPT2_BENCH), 12 * 1024,
        "1.2x", "1.5x, 55% of peak",
    ),
}  # fmt: skip
GPT2_FLOPS = 6 * 124e6 + 12 * 12 * 768 * 1024
"""FLOPs of training on one token: parameters and attention (Chowdhery et al. 2022, PaLM, appendix B)."""
H200_FLOPS = 989e12
"""FLOPs per second of dense bfloat16 products, from the vendor's data sheet."""

# A separate process imports torch: Linux counts the memory of this process in the peak memory of those it starts.
DESCRIBE_TORCH = """
import torch
print(f"torch {torch.__version__}", f"on one {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "")
"""
# Python runs these in nanoGPT's folder, where `model` is nanoGPT's.
NANOGPT_UNTRAINED = """
import sys, json, torch
from model import GPT, GPTConfig
torch.manual_seed(0)
args = dict(json.loads(sys.argv[1]), vocab_size=65, dropout=0.0, bias=False)
saved = {"model_args": args, "model": GPT(GPTConfig(**args)).state_dict(), "config": {"dataset": "shakespeare_char"}}
torch.save(saved, "out-shakespeare-char/ckpt.pt")
"""
NANOGPT_STREAM = """
import sys, time, torch
from model import GPT, GPTConfig
saved = torch.load("out-shakespeare-char/ckpt.pt", map_location="cpu")
model = GPT(GPTConfig(**saved["model_args"])).eval().to(sys.argv[1])
prompt = torch.zeros((1, 1), dtype=torch.long, device=sys.argv[1])
model.generate(prompt, 50, temperature=0.8, top_k=200)
started = time.perf_counter()
model.generate(prompt, 1000, temperature=0.8, top_k=200)
print(1000 / (time.perf_counter() - started))
"""


@dataclass(frozen=True)
class Programs:
    """Both programs with their data, in a scratch folder."""

    nanogpt: NanoGPT
    scratch: Path
    runs: int

    def run_glyphgpt(self, *args: str) -> Finished:
        """Run one of glyphgpt's scripts, with empty compiler caches."""
        with tempfile.TemporaryDirectory() as cache:
            environment = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
            return run([sys.executable, *args], ROOT, environment)

    def out_dir(self, name: str) -> Path:
        """Return the folder of a run of glyphgpt."""
        return self.scratch / "out" / name

    def path_flags(self, name: str) -> tuple[str, ...]:
        """Return the flags of a run of glyphgpt for its data and its folder."""
        return f"--data_dir={self.scratch}", f"--out_dir={self.out_dir(name)}"


@dataclass
class Table:
    """The rows and notes so far."""

    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Add a row, and print it."""
        self.rows.append(cells)
        tqdm.write(" | ".join(cells))

    def add_comparison(
        self, title: str, nanogpt: list[float], glyphgpt: list[float], *, unit: str, targets: tuple[str, str]
    ) -> None:
        """Add a row of medians, and of how many times better glyphgpt's is: smaller seconds, or a larger speed."""
        better = median(nanogpt) / median(glyphgpt) if unit == "s" else median(glyphgpt) / median(nanogpt)
        self.add(title, format_spread(nanogpt, unit), format_spread(glyphgpt, unit), f"{better:.1f}x", *targets)

    def markdown(self) -> str:
        """Return the table and its notes."""
        head = ("row", "nanoGPT", "glyphgpt", "speedup or loss", "minimum", "target")
        lines = [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *self.rows)]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)])


def compare_training_speed(programs: Programs, table: Table, row: SpeedRow) -> None:
    """Compare the tokens per second of training, without the start of the programs."""
    glyphgpt, nanogpt = [], []
    for number in tqdm(range(programs.runs), unit="round", desc=row.title):
        log = programs.nanogpt.run(*row.nanogpt_args).output
        times = [float(line.split("time ")[1].split("ms")[0]) for line in log.splitlines() if line.startswith("iter")]
        times += [
            float(line.split("iteration: ")[1].split("ms")[0]) for line in log.splitlines() if "iteration: " in line
        ]
        nanogpt.append(row.tokens / median(times) * 1000)
        name = f"speed-{number}"
        flags = (*programs.path_flags(name), "--max_steps=400", "--eval_every=400", "--log_every=50", "--overwrite")
        flags += ("--eval_tokens=2000", "--sample_tokens=0", "--gradient_accumulation_steps=1", "--warmup_steps=10")
        programs.run_glyphgpt("train.py", row.config, *flags)
        speeds = [
            (after["tokens"] - before["tokens"]) / (after["seconds"] - before["seconds"])
            for before, after in pairwise(read_metrics(programs.out_dir(name), "train"))
        ]
        glyphgpt.append(median(speeds))
    targets = (row.minimum, row.target)
    table.add_comparison(f"{row.title} (`{row.config}`)", nanogpt, glyphgpt, unit="tokens/s", targets=targets)
    if "124M" in row.title:
        fractions = [median(speeds) * GPT2_FLOPS / H200_FLOPS for speeds in (nanogpt, glyphgpt)]
        table.notes.append(
            f"GPT-2 124M: {fractions[0]:.0%} of an H200's peak with nanoGPT, {fractions[1]:.0%} with glyphgpt."
        )


def compare_sampling(programs: Programs, table: Table) -> None:
    """Compare the seconds of whole processes that write ten samples of 500 characters."""
    run_dir = make_untrained(programs, BABY_MODEL)
    nanogpt, glyphgpt = [], []
    for _ in tqdm(range(programs.runs), unit="round", desc="sampling"):
        nanogpt.append(programs.nanogpt.run(*README_SAMPLE).seconds)
        flags = ("--num_samples=10", "--max_new_tokens=500", "--top_k=200")
        glyphgpt.append(programs.run_glyphgpt("sample.py", str(run_dir), *flags).seconds)
    title = "CPU, sampling 10 x 500 characters, 10.65M parameters"
    table.add_comparison(title, nanogpt, glyphgpt, unit="s", targets=("30x", "60x"))


def compare_cpu_stream(programs: Programs, table: Table) -> None:
    """Compare the generation of one sequence on a CPU."""
    title = "CPU, one sequence, 0.8M parameters"
    compare_stream(programs, table, title, SMALL_MODEL, "cpu", targets=("10x", "25x"))


def compare_gpu_stream(programs: Programs, table: Table) -> None:
    """Compare the generation of one sequence on a GPU; the targets are characters per second."""
    title = "GPU, one sequence, 10.65M parameters"
    compare_stream(programs, table, title, BABY_MODEL, "cuda", targets=("5,000", "10,000"))


def compare_stream(
    programs: Programs, table: Table, title: str, model: dict[str, int], device: str, *, targets: tuple[str, str]
) -> None:
    """Compare the characters per second of one sequence, without the start of the programs."""
    run_dir = make_untrained(programs, model)
    nanogpt, glyphgpt, fractions = [], [], []
    for _ in tqdm(range(programs.runs), unit="round", desc=title):
        nanogpt.append(float(programs.nanogpt.run("-c", NANOGPT_STREAM, device).output.split()[-1]))
        output = programs.run_glyphgpt("bench/decode_speed.py", str(run_dir), f"--device={device}").output
        speed, bound = map(float, output.split()[-2:])
        glyphgpt.append(speed)
        fractions.append(speed / bound)
    table.add_comparison(title, nanogpt, glyphgpt, unit="characters/s", targets=targets)
    table.notes.append(f"{title}: glyphgpt reaches {median(fractions):.0%} of the speed of its matrix products alone.")


def compare_prepare(programs: Programs, table: Table) -> None:
    """Compare the seconds and the peak memory of whole processes that prepare 100 MB of text as characters."""
    folder = programs.nanogpt.folder / "data" / "large"
    folder.mkdir()
    shutil.copy(programs.nanogpt.folder / "data" / "shakespeare_char" / "prepare.py", folder)
    text = folder / "input.txt"
    write_text(text, 100 * 10**6, accents=False)
    nanogpt, glyphgpt = [], []
    flags = ("--name=large", f"--data_dir={programs.scratch}", "--overwrite")
    for _ in tqdm(range(programs.runs), unit="round", desc="prepare"):
        nanogpt.append(programs.nanogpt.run(str(folder / "prepare.py")))
        glyphgpt.append(programs.run_glyphgpt("prepare.py", str(text), *flags))
    seconds = [[finished.seconds for finished in runs] for runs in (nanogpt, glyphgpt)]
    table.add_comparison("CPU, prepare 100 MB", *seconds, unit="s", targets=("10x", "30x"))
    peaks = [f"{median(finished.peak_bytes for finished in runs) / 2**20:,.0f} MiB" for runs in (nanogpt, glyphgpt)]
    table.notes.append(f"Peak memory of preparing 100 MB: nanoGPT {peaks[0]}, glyphgpt {peaks[1]}.")
    shutil.rmtree(folder)


def make_untrained(programs: Programs, model: dict[str, int]) -> Path:
    """Save an untrained GPT-2 model of the same size for each program; return the folder of glyphgpt's."""
    (programs.nanogpt.folder / "out-shakespeare-char").mkdir(exist_ok=True)
    programs.nanogpt.run("-c", NANOGPT_UNTRAINED, json.dumps(model))
    flags = [f"--{key}={value}" for key, value in model.items()]
    flags += [*programs.path_flags("untrained"), "--max_steps=0", "--eval_tokens=100", "--overwrite"]
    programs.run_glyphgpt("train.py", *flags)
    return programs.out_dir("untrained")


def format_spread(values: list[float], unit: str) -> str:
    """Return the median with the lowest and the highest value."""
    digits = 0 if min(values) >= 100 else 2
    lowest, middle, highest = (f"{value:,.{digits}f}" for value in (min(values), median(values), max(values)))
    return f"{middle} {unit} ({lowest} to {highest})"


def read_metrics(out_dir: Path, kind: str) -> list[dict[str, float]]:
    """Return the rows of one kind of a run's metrics."""
    rows = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


@contextmanager
def prepared_programs(nanogpt: Path, runs: int, recipes: list[str]) -> Iterator[Programs]:
    """Copy nanoGPT's checkout, prepare the recipes for glyphgpt, and prepare Tiny Shakespeare for both."""
    with tempfile.TemporaryDirectory() as folder:
        programs = Programs(NanoGPT(nanogpt, Path(folder) / "nanoGPT"), Path(folder), runs)
        if (ROOT / "data" / "downloads").exists():  # for machines without a network
            shutil.copytree(ROOT / "data" / "downloads", Path(folder) / "downloads")
        for name in recipes:
            shutil.copy(ROOT / "data" / f"{name}.toml", folder)
            programs.run_glyphgpt("prepare.py", name, f"--data_dir={folder}")
        dataset = load_dataset(Path(folder) / "shakespeare_char", Path(folder))
        splits = [split.slice(0, split.tokens) for split in (dataset.train, dataset.val)]
        text = "".join(decode(dataset.tokenizer, tokens) for tokens in splits)
        target = programs.nanogpt.folder / "data" / "shakespeare_char"
        (target / "input.txt").write_text(text, encoding="utf-8", newline="")
        programs.nanogpt.run(str(target / "prepare.py"))
        yield programs


def describe_machine() -> str:
    """Return the machine's cores, torch and Python version."""
    model = platform.processor() or platform.machine()
    with Path("/proc/cpuinfo").open() as lines:
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    torch = run([sys.executable, "-c", DESCRIBE_TORCH], ROOT).output.strip()
    return f"{os.cpu_count()} cores of an {model}, {torch}, Python {platform.python_version()}"


def read_commit(folder: Path) -> str:
    """Return the short hash of a checkout's commit."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    finished = subprocess.run(git, cwd=folder, capture_output=True, text=True, check=False)
    return finished.stdout.strip() or "of an unknown commit"


def main() -> None:
    """Measure the chosen rows, and write the table."""
    cpu: list[str] = [*SPEED_ROWS, "sampling", "stream", "prepare"]
    gpu: list[str] = [*GPU_SPEED_ROWS, "gpu-stream"]
    other_rows: dict[str, Callable[[Programs, Table], None]] = {
        "sampling": compare_sampling,
        "stream": compare_cpu_stream,
        "prepare": compare_prepare,
        "gpu-stream": compare_gpu_stream,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--rows", default="cpu", help=f"cpu (all of {','.join(cpu)}), gpu (all of {','.join(gpu)}), or "
                        "names of rows, separated by commas (default %(default)s)")  # fmt: skip
    parser.add_argument("--runs", type=int, default=3, help="runs of each program, with seeds 1, 2, ... (default 3)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file for the table (default %(default)s)")
    options = parser.parse_args()
    names = {"cpu": cpu, "gpu": gpu}.get(options.rows) or options.rows.split(",")
    if unknown := set(names) - {*cpu, *gpu}:
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
    commits = [read_commit(folder) for folder in (ROOT, options.nanogpt)]
    table = Table()
    recipes = ["shakespeare_char"] + ["shakespeare"] * ("gpu-124m" in names)
    with prepared_programs(options.nanogpt, options.runs, recipes) as programs:
        for name, row in {**SPEED_ROWS, **GPU_SPEED_ROWS}.items():
            if name in names:
                compare_training_speed(programs, table, row)
        for name, compare in other_rows.items():
            if name in names:
                compare(programs, table)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    versions = f"glyphgpt {commits[0]}, nanoGPT {commits[1]}; {options.runs} runs."
    with options.results.open("a", encoding="utf-8") as file:
        file.write(f"\n## Against nanoGPT, {now}\n\n{describe_machine()}; {versions}\n\n{table.markdown()}\n")


if __name__ == "__main__":
    main()
