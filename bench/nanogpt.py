"""nanoGPT (https://github.com/karpathy/nanoGPT) as the benchmarks run it: unmodified, in a copy of a checkout."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from prepare_speed import peak_bytes

README_GPU = ["train.py", "config/train_shakespeare_char.py"]
README_CPU = [
    *README_GPU, "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64",
    "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000",
    "--dropout=0.0",
]  # fmt: skip
"""The trainings of its README, of 0.8M parameters on a CPU and of 10.65M on a GPU."""

# Python runs these in nanoGPT's folder, where `model` is nanoGPT's.
WRITE_META = """
import pickle, sys
with open("data/shakespeare_char/meta.pkl", "wb") as file:
    pickle.dump({"vocab_size": int(sys.argv[1])}, file)
"""
EVALUATE = """
import sys, numpy as np, torch
from model import GPT, GPTConfig
device = "cuda" if torch.cuda.is_available() else "cpu"
saved = torch.load("out-shakespeare-char/ckpt.pt", map_location=device)
model = GPT(GPTConfig(**saved["model_args"])).eval().to(device)
model.load_state_dict({name.removeprefix("_orig_mod."): weight for name, weight in saved["model"].items()})
tokens = torch.from_numpy(np.fromfile(sys.argv[1], dtype=np.uint16).astype(np.int64)).to(device)
T, total = model.config.block_size, 0.0
with torch.no_grad():
    for start in range(0, len(tokens) - 1, T):
        window = tokens[start : start + T + 1][None]
        total += model(window[:, :-1], window[:, 1:])[1].item() * (window.size(1) - 1)
print(total / (len(tokens) - 1))
"""


@dataclass(frozen=True)
class Finished:
    """A process that ended with status 0."""

    output: str
    seconds: float
    peak_bytes: int


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


class NanoGPT:
    """A copy of a checkout of nanoGPT."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        """Copy a checkout to a folder that does not exist."""
        self.folder = folder
        shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(".git", "out*"))

    def run(self, *args: str) -> Finished:
        """Run Python in nanoGPT's folder."""
        return run([sys.executable, *args], self.folder)

    def write_tokens(self, vocab_size: int, **splits: ArrayLike) -> None:
        """Write `train`, `val` and any other splits, tokens below 65,536, where its config looks for its data."""
        folder = self.folder / "data" / "shakespeare_char"
        for name, tokens in splits.items():
            np.asarray(tokens).astype(np.uint16).tofile(folder / f"{name}.bin")
        self.run("-c", WRITE_META, str(vocab_size))

    def evaluate(self, split: str) -> float:
        """Return the loss of its saved weights on a split, in consecutive windows of the model's context."""
        return float(self.run("-c", EVALUATE, f"data/shakespeare_char/{split}.bin").output.split()[-1])
