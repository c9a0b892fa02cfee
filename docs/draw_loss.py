"""Draw docs/loss.svg, the loss curves in the README, from finished runs. Needs matplotlib.

python docs/draw_loss.py out/quick out/two_minutes
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

TARGET = Path(__file__).with_name("loss.svg")


def draw(folders: list[Path]) -> None:
    """Draw the training and validation loss of each run over the number of tokens."""
    plt.rcParams["svg.hashsalt"] = "glyphgpt"  # makes the file reproducible
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for folder, color in zip(folders, ("tab:blue", "tab:orange", "tab:green"), strict=False):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        train, val = ([row for row in rows if row["kind"] == kind] for kind in ("train", "val"))
        axes.plot([row["tokens"] for row in train], [row["loss"] for row in train], color=color, alpha=0.3, linewidth=1)
        label = f"{folder.name}: {val[-1]['loss']:.3f} after {val[-1]['step']:,} steps"
        axes.plot([row["tokens"] for row in val], [row["loss"] for row in val], "o-", color=color, label=label)
    axes.set(xlabel="characters seen", ylabel="loss, nats per character", ylim=(1.2, 4.4))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(title="validation loss (faint: of each training batch)", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    draw([Path(argument) for argument in sys.argv[1:]])
