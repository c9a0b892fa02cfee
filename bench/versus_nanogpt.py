"""Compare glyphgpt with nanoGPT on this machine, and add a table to bench/RESULTS.md.

    git clone https://github.com/karpathy/nanoGPT
    python bench/versus_nanogpt.py --nanogpt=nanoGPT                  every CPU row; about 80 minutes
    python bench/versus_nanogpt.py --nanogpt=nanoGPT --rows=sampling,stream --runs=5
    python bench/versus_nanogpt.py --nanogpt=nanoGPT --rows=gpu       the rows of a CUDA GPU, as in bench/gpu.sh

Both programs run unmodified and alternately, in processes of their own: nanoGPT with the commands of its README, in a
copy of the checkout, and glyphgpt with one committed config for each row. Unless a row says otherwise, times are those
of whole processes from a cold start of Python, with empty compiler caches on a CPU and filled ones on a GPU. A row
quotes the median of its runs. Validation losses cover the whole validation split, in consecutive windows of the model's
block size; the script evaluates nanoGPT's saved weights in the same way.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

from tqdm import tqdm

from glyphgpt.data.dataset import load_dataset
from glyphgpt.data.tokenizers import decode
from prepare_speed import peak_bytes, write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "RESULTS.md"
SHAKESPEARE = "config/train_shakespeare_char.py"
README_CPU = (
    f"train.py {SHAKESPEARE} --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
).split()
README_GPU = ["train.py", SHAKESPEARE]
README_SAMPLE = ["sample.py", "--out_dir=out-shakespeare-char", "--device=cpu"]
SHORT = ["--max_iters=200", "--eval_interval=1000"]
GPT2_BENCH = ["bench.py", "--real_data=False"]
SMALL_MODEL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}
BABY_MODEL = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}


@dataclass(frozen=True)
class TrainingRow:
    """A row that compares time and loss of a config with those of a training in nanoGPT's README."""

    title: str
    config: str
    minimum: str
    """A speedup such as 10x, or a validation loss."""
    target: str
    nanogpt_args: tuple[str, ...] = tuple(README_CPU)


TRAINING_ROWS = {
    "loss-1.88": TrainingRow("CPU, time to loss 1.88", "config/quick.toml", "10x", "20x"),
    "1x-time": TrainingRow("CPU, loss in nanoGPT's time", "config/shakespeare_char.toml", "<= 1.55", "<= 1.50"),
    "2x-time": TrainingRow("CPU, loss in 2x its time", "config/shakespeare_char_long.toml", "<= 1.50", "<= 1.4697"),
    "5x-time": TrainingRow("CPU, loss in 5x its time", "config/shakespeare_char_best.toml", "<= 1.4697", "<= 1.44"),
}
GPU_TRAINING_ROWS = {
    "gpu-loss-1.4697": TrainingRow(
        "GPU, time to loss 1.4697", "config/shakespeare_char.toml", "8x", "20x", tuple(README_GPU)
    ),
}


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
NANOGPT_EVALUATE = """
import numpy as np, torch
from model import GPT, GPTConfig
device = "cuda" if torch.cuda.is_available() else "cpu"
saved = torch.load("out-shakespeare-char/ckpt.pt", map_location=device)
model = GPT(GPTConfig(**saved["model_args"])).eval().to(device)
model.load_state_dict({name.removeprefix("_orig_mod."): weight for name, weight in saved["model"].items()})
tokens = torch.from_numpy(np.fromfile("data/shakespeare_char/val.bin", dtype=np.uint16).astype(np.int64)).to(device)
T, total = model.config.block_size, 0.0
with torch.no_grad():
    for start in range(0, len(tokens) - 1, T):
        window = tokens[start : start + T + 1][None]
        total += model(window[:, :-1], window[:, 1:])[1].item() * (window.size(1) - 1)
print(saved["iter_num"], total / (len(tokens) - 1))
"""
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

    nanogpt: Path
    scratch: Path
    runs: int

    def run_nanogpt(self, *args: str) -> "Finished":
        """Run Python in nanoGPT's folder."""
        return run([sys.executable, *args], self.nanogpt)

    def run_glyphgpt(self, *args: str, warm: bool = False) -> "Finished":
        """Run one of glyphgpt's scripts, with empty compiler caches, or with those of earlier warm runs."""
        with tempfile.TemporaryDirectory() as empty:
            cache = str(self.scratch / "cache") if warm else empty
            environment = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
            return run([sys.executable, *args], ROOT, environment)

    def out_dir(self, name: str) -> Path:
        """Return the folder of a run of glyphgpt."""
        return self.scratch / "out" / name

    def path_flags(self, name: str) -> tuple[str, ...]:
        """Return the flags of a run of glyphgpt for its data and its folder."""
        return f"--data_dir={self.scratch}", f"--out_dir={self.out_dir(name)}"


@dataclass(frozen=True)
class Finished:
    """A process that ended with status 0."""

    output: str
    seconds: float
    peak_bytes: int


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


def run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> Finished:
    """Run a command; exit with its output if it fails. Python caches bytecode, as it does by default."""
    environment = {"PYTHONDONTWRITEBYTECODE": "", **(environment or {})}
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if status:
        sys.exit(f"{' '.join(command[:3])} ... failed:\n{text[-2000:]}")
    return Finished(text, seconds, peak_bytes(usage))


def compare_training(programs: Programs, table: Table, rows: dict[str, TrainingRow]) -> None:
    """Compare configs with one training of nanoGPT's README; every run of a config has another seed."""
    (nanogpt_args,) = {row.nanogpt_args for row in rows.values()}
    warm = nanogpt_args == tuple(README_GPU)
    nanogpt_times, nanogpt_loss = [], 0.0
    times: dict[str, list[float]] = {name: [] for name in rows}
    losses: dict[str, list[float]] = {name: [] for name in rows}
    if warm:
        for row in rows.values():
            programs.run_glyphgpt("train.py", row.config, *programs.path_flags("warm-up"), "--max_steps=1", warm=True)
    for number in tqdm(range(programs.runs), unit="round", desc="training"):
        nanogpt_times.append(programs.run_nanogpt(*nanogpt_args).seconds)
        step, loss = programs.run_nanogpt("-c", NANOGPT_EVALUATE).output.split()[-2:]
        nanogpt_loss = float(loss)
        for name, row in rows.items():
            flags = (*programs.path_flags(f"{name}-{number}"), f"--seed={1 + number}")
            times[name].append(programs.run_glyphgpt("train.py", row.config, *flags, warm=warm).seconds)
            scored = programs.run_glyphgpt("train.py", row.config, *flags, "--eval_only", "--eval_tokens=0").output
            losses[name].append(float(scored.split("validation loss ")[1].split(",")[0]))
            tqdm.write(f"{name}, seed {1 + number}: {times[name][-1]:.1f} s, loss {losses[name][-1]:.4f}")
    nanogpt_seconds = median(nanogpt_times)
    spread = format_spread(nanogpt_times, "s")
    table.notes.append(f"Training of nanoGPT's README: {spread}; the loss is that of its weights of step {step}.")
    for name, row in rows.items():
        seconds, mean_loss = median(times[name]), mean(losses[name])
        each_loss = ", ".join(f"{loss:.4f}" for loss in losses[name])
        table.add(
            f"{row.title} (`{row.config}`)",
            f"{nanogpt_seconds:.0f} s, loss {nanogpt_loss:.4f}",
            f"{seconds:.1f} s = {seconds / nanogpt_seconds:.2f} of its time, loss {mean_loss:.4f} ({each_loss})",
            f"{nanogpt_seconds / seconds:.1f}x" if row.minimum.endswith("x") else f"{mean_loss:.4f}",
            row.minimum,
            row.target,
        )


def compare_training_speed(programs: Programs, table: Table, row: SpeedRow) -> None:
    """Compare the tokens per second of training, without the start of the programs."""
    glyphgpt, nanogpt = [], []
    for number in tqdm(range(programs.runs), unit="round", desc=row.title):
        log = programs.run_nanogpt(*row.nanogpt_args).output
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
        nanogpt.append(programs.run_nanogpt(*README_SAMPLE).seconds)
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
        nanogpt.append(float(programs.run_nanogpt("-c", NANOGPT_STREAM, device).output.split()[-1]))
        output = programs.run_glyphgpt("bench/decode_speed.py", str(run_dir), f"--device={device}").output
        speed, bound = map(float, output.split()[-2:])
        glyphgpt.append(speed)
        fractions.append(speed / bound)
    table.add_comparison(title, nanogpt, glyphgpt, unit="characters/s", targets=targets)
    table.notes.append(f"{title}: glyphgpt reaches {median(fractions):.0%} of the speed of its matrix products alone.")


def compare_prepare(programs: Programs, table: Table) -> None:
    """Compare the seconds and the peak memory of whole processes that prepare 100 MB of text as characters."""
    folder = programs.nanogpt / "data" / "large"
    folder.mkdir()
    shutil.copy(programs.nanogpt / "data" / "shakespeare_char" / "prepare.py", folder)
    text = folder / "input.txt"
    write_text(text, 100 * 10**6, accents=False)
    nanogpt, glyphgpt = [], []
    flags = ("--name=large", f"--data_dir={programs.scratch}", "--overwrite")
    for _ in tqdm(range(programs.runs), unit="round", desc="prepare"):
        nanogpt.append(programs.run_nanogpt(str(folder / "prepare.py")))
        glyphgpt.append(programs.run_glyphgpt("prepare.py", str(text), *flags))
    seconds = [[finished.seconds for finished in runs] for runs in (nanogpt, glyphgpt)]
    table.add_comparison("CPU, prepare 100 MB", *seconds, unit="s", targets=("10x", "30x"))
    peaks = [f"{median(finished.peak_bytes for finished in runs) / 2**20:,.0f} MiB" for runs in (nanogpt, glyphgpt)]
    table.notes.append(f"Peak memory of preparing 100 MB: nanoGPT {peaks[0]}, glyphgpt {peaks[1]}.")
    shutil.rmtree(folder)


def make_untrained(programs: Programs, model: dict[str, int]) -> Path:
    """Save an untrained GPT-2 model of the same size for each program; return the folder of glyphgpt's."""
    (programs.nanogpt / "out-shakespeare-char").mkdir(exist_ok=True)
    programs.run_nanogpt("-c", NANOGPT_UNTRAINED, json.dumps(model))
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
        programs = Programs(Path(folder) / "nanoGPT", Path(folder), runs)
        shutil.copytree(nanogpt, programs.nanogpt, ignore=shutil.ignore_patterns(".git", "out*"))
        if (ROOT / "data" / "downloads").exists():  # for machines without a network
            shutil.copytree(ROOT / "data" / "downloads", Path(folder) / "downloads")
        for name in recipes:
            shutil.copy(ROOT / "data" / f"{name}.toml", folder)
            programs.run_glyphgpt("prepare.py", name, f"--data_dir={folder}")
        dataset = load_dataset(Path(folder) / "shakespeare_char", Path(folder))
        splits = [split.slice(0, split.tokens) for split in (dataset.train, dataset.val)]
        text = "".join(decode(dataset.tokenizer, tokens) for tokens in splits)
        target = programs.nanogpt / "data" / "shakespeare_char"
        (target / "input.txt").write_text(text, encoding="utf-8", newline="")
        programs.run_nanogpt(str(target / "prepare.py"))
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
    cpu: list[str] = [*TRAINING_ROWS, *SPEED_ROWS, "sampling", "stream", "prepare"]
    gpu: list[str] = [*GPU_TRAINING_ROWS, *GPU_SPEED_ROWS, "gpu-stream"]
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
        for rows in (TRAINING_ROWS, GPU_TRAINING_ROWS):
            if chosen := {name: row for name, row in rows.items() if name in names}:
                compare_training(programs, table, chosen)
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
