"""Measure glyphgpt against nanoGPT on this machine, and add a table to bench/RESULTS.md.

    git clone https://github.com/karpathy/nanoGPT
    python bench/versus_nanogpt.py --nanogpt=nanoGPT                  every CPU row; about 80 minutes
    python bench/versus_nanogpt.py --nanogpt=nanoGPT --rows=sampling,stream --runs=5
    python bench/versus_nanogpt.py --nanogpt=nanoGPT --rows=gpu       the rows of a CUDA GPU; bench/gpu.sh does this

Both programs run as they ship, in processes of their own, in turn: nanoGPT by the commands of its README in a copy of
the checkout, ours by one committed config per row. Times are of whole processes from a cold start of Python, compiler
caches empty on a CPU and filled on a GPU, unless a row says otherwise; a row quotes the median of its runs. Validation
losses are over the whole validation split, tiled at the model's own block size; nanoGPT's saved weights are scored anew
that way.
"""

import argparse
import json
import os
import platform
import resource
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
from prepare_speed import write_text

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
SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}
BABY = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}


@dataclass(frozen=True)
class Race:
    """A row of training: one of our configs against a run of nanoGPT's README."""

    name: str
    config: str
    at_least: str
    """How many times as fast, or the validation loss."""
    aim: str
    nano: tuple[str, ...] = tuple(README_CPU)


RACES = {
    "to-1.88": Race("CPU, to 1.88", "config/quick.toml", "10x", "20x"),
    "once": Race("CPU, in nanoGPT's time", "config/shakespeare_char.toml", "<= 1.55", "<= 1.50"),
    "twice": Race("CPU, in twice that time", "config/shakespeare_char_long.toml", "<= 1.50", "<= 1.4697"),
    "five": Race("CPU, in five times that time", "config/shakespeare_char_best.toml", "<= 1.4697", "<= 1.44"),
}
GPU_RACES = {
    "gpu-to-1.4697": Race("GPU, to 1.4697", "config/shakespeare_char.toml", "8x", "20x", tuple(README_GPU)),
}


@dataclass(frozen=True)
class Pace:
    """A row of training speed: the same network, batch and settings in both programs."""

    name: str
    config: str
    nano: tuple[str, ...]
    tokens: int
    """In each of nanoGPT's steps."""
    at_least: str
    aim: str


PACES = {
    "like-for-like": Pace("CPU, like for like", "config/nanogpt_cpu.toml", (*README_CPU, *SHORT), 12 * 64, "2x", "3x"),
}
GPU_PACES = {
    "gpu-like-for-like": Pace(
        "GPU, like for like", "config/nanogpt_gpu.toml", (*README_GPU, *SHORT, "--log_interval=1"),
        64 * 256, "2x", "4x",
    ),
    "gpu-124m": Pace("GPU, GPT-2 124M", "config/gpt2.toml", tuple(GPT2_BENCH), 12 * 1024, "1.2x", "1.5x, 55% of peak"),
}  # fmt: skip
GPT2_FLOPS = 6 * 124e6 + 12 * 12 * 768 * 1024
"""Of training on one token: parameters and attention (Chowdhery et al. 2022, PaLM, appendix B)."""
H200_FLOPS = 989e12
"""Of dense bfloat16 products a second, by the vendor's data sheet."""

# Not imported here: Linux counts what this process holds into the peak memory of those it starts.
TORCH = """
import torch
print(f"torch {torch.__version__}", f"on one {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "")
"""
# Run by nanoGPT's side, in its own folder, where `model` is nanoGPT's.
NANO_SCORE = """
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
        tile = tokens[start : start + T + 1][None]
        total += model(tile[:, :-1], tile[:, 1:])[1].item() * (tile.size(1) - 1)
print(saved["iter_num"], total / (len(tokens) - 1))
"""
NANO_UNTRAINED = """
import sys, json, torch
from model import GPT, GPTConfig
torch.manual_seed(0)
shape = dict(json.loads(sys.argv[1]), vocab_size=65, dropout=0.0, bias=False)
saved = {"model_args": shape, "model": GPT(GPTConfig(**shape)).state_dict(), "config": {"dataset": "shakespeare_char"}}
torch.save(saved, "out-shakespeare-char/ckpt.pt")
"""
NANO_STREAM = """
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
class Bench:
    """Both programs, made ready in a scratch folder."""

    nanogpt: Path
    scratch: Path
    runs: int

    def nano(self, *arguments: str) -> "Finished":
        """Run nanoGPT's Python code in its folder."""
        return finish([sys.executable, *arguments], self.nanogpt)

    def ours(self, *arguments: str, warm: bool = False) -> "Finished":
        """Run one of our scripts, compiler caches empty, or warm: as earlier such runs left them."""
        with tempfile.TemporaryDirectory() as empty:
            caches = str(self.scratch / "caches") if warm else empty
            environment = {"TORCHINDUCTOR_CACHE_DIR": caches, "TRITON_CACHE_DIR": caches}
            return finish([sys.executable, *arguments], ROOT, environment)

    def out(self, name: str) -> Path:
        """Return the folder of one of our runs."""
        return self.scratch / "out" / name


@dataclass(frozen=True)
class Finished:
    """A process that ended well."""

    output: str
    seconds: float
    peak_bytes: int


@dataclass
class Table:
    """Rows as they come."""

    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """Add a row, and show it."""
        self.rows.append(cells)
        tqdm.write(" | ".join(cells))

    def markdown(self) -> str:
        """Return the table and its notes."""
        head = ("row", "nanoGPT", "glyphgpt", "ratio or loss", "at least", "aim")
        lines = [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *self.rows)]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)])


def finish(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> Finished:
    """Run a command to its end; exit with what it printed if it fails. Python caches bytecode, as it does by itself."""
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


def peak_bytes(usage: resource.struct_rusage) -> int:
    """Return the peak memory of a finished process; Linux counts it in KiB, macOS in bytes."""
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def training(bench: Bench, table: Table, races: dict[str, Race]) -> None:
    """Run configs against one run of nanoGPT's README, with another seed of ours in each run."""
    (nano_command,) = {race.nano for race in races.values()}
    warm = nano_command == tuple(README_GPU)
    nano_seconds, nano_loss = [], 0.0
    seconds: dict[str, list[float]] = {name: [] for name in races}
    losses: dict[str, list[float]] = {name: [] for name in races}
    if warm:
        for race in races.values():
            bench.ours("train.py", race.config, *places(bench, "warm-up"), "--max_steps=1", warm=True)
    for run in tqdm(range(bench.runs), unit="round", desc="training"):
        nano_seconds.append(bench.nano(*nano_command).seconds)
        steps, score = bench.nano("-c", NANO_SCORE).output.split()[-2:]
        nano_loss = float(score)
        for name, race in races.items():
            flags = (*places(bench, f"{name}-{run}"), f"--seed={1 + run}")
            seconds[name].append(bench.ours("train.py", race.config, *flags, warm=warm).seconds)
            losses[name].append(read_metrics(bench.out(f"{name}-{run}"), "val")[-1]["loss"])
            tqdm.write(f"{name}, seed {1 + run}: {seconds[name][-1]:.1f} s, loss {losses[name][-1]:.4f}")
    nano = median(nano_seconds)
    table.notes.append(f"nanoGPT's README run: {spread(nano_seconds, 's')}; its weights of step {steps} score anew")
    for name, race in races.items():
        ours, loss = median(seconds[name]), mean(losses[name])
        found = f"{loss:.4f} ({', '.join(f'{each:.4f}' for each in losses[name])})"
        table.add(
            f"{race.name} (`{race.config}`)",
            f"{nano:.0f} s, loss {nano_loss:.4f}",
            f"{ours:.1f} s = {ours / nano:.2f} of its time, loss {found}",
            f"{nano / ours:.1f}x" if race.at_least.endswith("x") else f"{loss:.4f}",
            race.at_least,
            race.aim,
        )


def pace(bench: Bench, table: Table, race: Pace) -> None:
    """Training tokens per second on the same network, once each program is running."""
    ours, nano = [], []
    for run in tqdm(range(bench.runs), unit="round", desc=race.name):
        log = bench.nano(*race.nano).output
        times = [float(line.split("time ")[1].split("ms")[0]) for line in log.splitlines() if line.startswith("iter")]
        times += [
            float(line.split("iteration: ")[1].split("ms")[0]) for line in log.splitlines() if "iteration: " in line
        ]
        nano.append(race.tokens / median(times) * 1000)
        flags = (*places(bench, f"pace-{run}"), "--max_steps=400", "--eval_every=400", "--log_every=50", "--overwrite")
        flags += ("--eval_tokens=2000", "--sample_tokens=0", "--gradient_accumulation_steps=1", "--warmup_steps=10")
        bench.ours("train.py", race.config, *flags)
        lines = read_metrics(bench.out(f"pace-{run}"), "train")
        speeds = [
            (after["tokens"] - before["tokens"]) / (after["seconds"] - before["seconds"])
            for before, after in pairwise(lines)
        ]
        ours.append(median(speeds))
    targets = (race.at_least, race.aim)
    versus(table, f"{race.name} (`{race.config}`)", nano, ours, unit="tokens/s", targets=targets)
    if "124M" in race.name:
        shares = [median(speeds) * GPT2_FLOPS / H200_FLOPS for speeds in (nano, ours)]
        table.notes.append(
            f"GPT-2 124M: {shares[0]:.0%} of an H200's peak with nanoGPT, {shares[1]:.0%} with glyphgpt."
        )


def places(bench: Bench, name: str) -> tuple[str, ...]:
    """Return the flags that say where a run of ours reads and writes."""
    return f"--data_dir={bench.scratch}", f"--out_dir={bench.out(name)}"


def sampling(bench: Bench, table: Table) -> None:
    """Ten samples of 500 characters from a model of 10.65M parameters, whole processes."""
    run_dir = untrained(bench, BABY)
    nano, ours = [], []
    for _ in tqdm(range(bench.runs), unit="round", desc="sampling"):
        nano.append(bench.nano(*README_SAMPLE).seconds)
        flags = ("--num_samples=10", "--max_new_tokens=500", "--top_k=200")
        ours.append(bench.ours("sample.py", str(run_dir), *flags).seconds)
    versus(table, "CPU, sampling 10 x 500 characters, 10.65M parameters", nano, ours, unit="s", targets=("30x", "60x"))


def stream(bench: Bench, table: Table) -> None:
    """One interactive stream from the model of 0.8M parameters, once each program is running."""
    one_stream(bench, table, "CPU, one stream, 0.8M parameters", SMALL, "cpu", targets=("10x", "25x"))


def gpu_stream(bench: Bench, table: Table) -> None:
    """The same from the model of 10.65M parameters, on a GPU."""
    one_stream(bench, table, "GPU, one stream, 10.65M parameters", BABY, "cuda", targets=("5,000", "10,000"))


def one_stream(
    bench: Bench, table: Table, name: str, shape: dict[str, int], device: str, *, targets: tuple[str, str]
) -> None:
    """Characters per second of a single text, once each program is running."""
    run_dir = untrained(bench, shape)
    nano, ours, share = [], [], []
    for _ in tqdm(range(bench.runs), unit="round", desc=name):
        nano.append(float(bench.nano("-c", NANO_STREAM, device).output.split()[-1]))
        output = bench.ours("bench/decode_speed.py", str(run_dir), f"--device={device}").output
        speed, floor = map(float, output.split()[-2:])
        ours.append(speed)
        share.append(speed / floor)
    versus(table, name, nano, ours, unit="characters/s", targets=targets)
    table.notes.append(
        f"One stream runs at {median(share):.0%} of what its bare matrix products, called one after the other, allow."
    )


def prepare(bench: Bench, table: Table) -> None:
    """100 MB of text to character shards, whole processes."""
    folder = bench.nanogpt / "data" / "large"
    folder.mkdir()
    shutil.copy(bench.nanogpt / "data" / "shakespeare_char" / "prepare.py", folder)
    text = folder / "input.txt"
    write_text(text, 100 * 10**6, accents=False)
    nano, ours = [], []
    for _ in tqdm(range(bench.runs), unit="round", desc="prepare"):
        nano.append(bench.nano(str(folder / "prepare.py")))
        ours.append(bench.ours("prepare.py", str(text), "--name=large", f"--data_dir={bench.scratch}", "--overwrite"))
    seconds = [run.seconds for run in nano], [run.seconds for run in ours]
    versus(table, "CPU, prepare 100 MB", *seconds, unit="s", targets=("10x", "30x"))
    peaks = [f"{median(run.peak_bytes for run in runs) / 2**20:,.0f} MiB" for runs in (nano, ours)]
    table.notes.append(f"Peak memory of preparing 100 MB: nanoGPT {peaks[0]}, glyphgpt {peaks[1]}.")
    shutil.rmtree(folder)


def untrained(bench: Bench, shape: dict[str, int]) -> Path:
    """Give both programs an untrained GPT-2 model of this shape, and return the folder of ours."""
    (bench.nanogpt / "out-shakespeare-char").mkdir(exist_ok=True)
    bench.nano("-c", NANO_UNTRAINED, json.dumps(shape))
    out = bench.out("untrained")
    flags = [f"--{key}={value}" for key, value in shape.items()]
    flags += [f"--data_dir={bench.scratch}", f"--out_dir={out}", "--max_steps=0", "--eval_tokens=100", "--overwrite"]
    bench.ours("train.py", *flags)
    return out


def versus(
    table: Table, name: str, nano: list[float], ours: list[float], *, targets: tuple[str, str], unit: str
) -> None:
    """Add a row of medians; the ratio is how much better ours is."""
    ratio = median(nano) / median(ours) if unit == "s" else median(ours) / median(nano)
    table.add(name, spread(nano, unit), spread(ours, unit), f"{ratio:.1f}x", *targets)


def spread(values: list[float], unit: str) -> str:
    """Tell a median with the range around it."""
    digits = 0 if min(values) >= 100 else 2
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), median(values), max(values)))
    return f"{middle} {unit} ({low} to {high})"


def read_metrics(out: Path, kind: str) -> list[dict[str, float]]:
    """Return a run's metrics of one kind."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


@contextmanager
def both_ready(nanogpt: Path, runs: int, recipes: list[str]) -> Iterator[Bench]:
    """Copy nanoGPT's checkout, prepare these recipes for us, and Tiny Shakespeare for both."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder) / "nanoGPT", Path(folder), runs)
        shutil.copytree(nanogpt, bench.nanogpt, ignore=shutil.ignore_patterns(".git", "out*"))
        if (ROOT / "data" / "downloads").exists():  # what was fetched before serves where there is no network
            shutil.copytree(ROOT / "data" / "downloads", Path(folder) / "downloads")
        for name in recipes:
            shutil.copy(ROOT / "data" / f"{name}.toml", folder)
            bench.ours("prepare.py", name, f"--data_dir={folder}")
        dataset = load_dataset(Path(folder) / "shakespeare_char", Path(folder))
        parts = [split.slice(0, split.tokens) for split in (dataset.train, dataset.val)]
        text = "".join(decode(dataset.tokenizer, part) for part in parts)
        target = bench.nanogpt / "data" / "shakespeare_char"
        (target / "input.txt").write_text(text, encoding="utf-8", newline="")
        bench.nano(str(target / "prepare.py"))
        yield bench


def machine() -> str:
    """Describe this machine."""
    model = platform.processor() or platform.machine()
    with Path("/proc/cpuinfo").open() as lines:
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    torch = finish([sys.executable, "-c", TORCH], ROOT).output.strip()
    return f"{os.cpu_count()} cores of an {model}, {torch}, Python {platform.python_version()}"


def commit(folder: Path) -> str:
    """Return the commit that a folder stands at, if git knows it."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "of an unknown commit"


def main() -> None:
    """Measure the rows asked for, and write the table."""
    cpu: list[str] = [*RACES, *PACES, "sampling", "stream", "prepare"]
    gpu: list[str] = [*GPU_RACES, *GPU_PACES, "gpu-stream"]
    others: dict[str, Callable[[Bench, Table], None]] = {
        "sampling": sampling, "stream": stream, "prepare": prepare, "gpu-stream": gpu_stream,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--rows", default="cpu", help=f"which to measure: cpu (all of {','.join(cpu)}), gpu "
                        f"({','.join(gpu)}) or some of these (default %(default)s)")  # fmt: skip
    parser.add_argument("--runs", type=int, default=3, help="runs of each program, and seeds of ours (default 3)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to add the table (default %(default)s)")
    options = parser.parse_args()
    chosen = {"cpu": cpu, "gpu": gpu}.get(options.rows) or options.rows.split(",")
    if unknown := set(chosen) - {*cpu, *gpu}:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    commits = [commit(folder) for folder in (ROOT, options.nanogpt)]
    table = Table()
    recipes = ["shakespeare_char"] + ["shakespeare"] * ("gpu-124m" in chosen)
    with both_ready(options.nanogpt, options.runs, recipes) as bench:
        for races in (RACES, GPU_RACES):
            if asked := {name: race for name, race in races.items() if name in chosen}:
                training(bench, table, asked)
        for name, race in {**PACES, **GPU_PACES}.items():
            if name in chosen:
                pace(bench, table, race)
        for name, measure in others.items():
            if name in chosen:
                measure(bench, table)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    head = (
        f"## Against nanoGPT, {now}\n\n{machine()}; glyphgpt {commits[0]}, nanoGPT {commits[1]}; {options.runs} runs."
    )
    with options.results.open("a", encoding="utf-8") as file:
        file.write(f"\n{head}\n\n{table.markdown()}\n")


if __name__ == "__main__":
    main()
