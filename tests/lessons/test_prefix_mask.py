"""With a prefix mask, a source sees all of itself, and a translation only what precedes it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import prepare_text, script, some_text, tiny_model
from prefix_mask import Translator, Way, find_sources, prefix_mask

END, TAB = 10, 9
ROW = torch.tensor([[END, 1, 2, 3, TAB, 4, 5, END, 6, 7, TAB, 8]])


@pytest.mark.parametrize("prefix", [True, False])
def test_tokens_see_what_the_mask_says(prefix: bool) -> None:
    """A token sees another one if its logits change with it."""
    torch.manual_seed(0)
    model = tiny_model(position="learned", ngram=1, token_shift=False, block_size=12).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    translator = Translator(model, Way(prefix=prefix, learns_source=False), END, TAB)
    mask = prefix_mask(ROW, find_sources(ROW, END, TAB), END)[0, 0]
    expected = mask if prefix else torch.ones(12, 12, dtype=torch.bool).tril()

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        for attention in translator.attentions:
            attention.mask = mask[None, None]
        with torch.no_grad():
            return model(tokens)[0]

    before, seen = logits(ROW), torch.zeros(12, 12, dtype=torch.bool)
    for place in range(12):
        changed = ROW.clone()
        changed[0, place] = (changed[0, place] + 1) % 11
        seen[:, place] = (logits(changed) - before).abs().amax(-1) > 1e-6
    assert seen.equal(expected)


def test_the_mask_opens_sources_only() -> None:
    mask = prefix_mask(ROW, find_sources(ROW, END, TAB), END)[0, 0]
    ahead = {(int(i), int(j)) for i, j in mask.nonzero() if j > i}
    assert ahead == {(i, j) for i in range(4) for j in range(i + 1, 4)} | {(7, 8), (7, 9), (8, 9)}


def test_sources_have_no_loss() -> None:
    model = tiny_model(vocab_size=11, block_size=12)
    translator = Translator(model, Way(prefix=False, learns_source=False), END, TAB)
    inputs, targets = ROW[:, :-1], ROW[:, 1:]
    losses = torch.nn.functional.cross_entropy(model(inputs)[0], targets[0], reduction="none")
    translation = [4, 5, 6, 10]  # places of the tab and of a translation
    assert translator(inputs, targets).item() == pytest.approx(losses[translation].mean().item())
    assert translator.loss(inputs, targets, with_source=True).item() == pytest.approx(losses.mean().item())


def test_the_lesson_prints_a_loss_for_each_way(tmp_path: Path) -> None:
    pairs = [f"the king {number}\tgood night {number}" for number in range(300)]
    prepare_text("\n".join(pairs), tmp_path, "pairs", records="lines")
    done = script("lessons/prefix_mask.py", "--dataset=pairs", f"--data_dir={tmp_path}", "--max_steps=40")
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    losses = {name: float(loss) for name, loss in rows}
    assert len(losses) == 3
    assert np.mean(list(losses.values())) < 2.5
    prepare_text(some_text(3000), tmp_path, "plain")
    done = script("lessons/prefix_mask.py", "--dataset=plain", f"--data_dir={tmp_path}")
    assert done.stderr.startswith(f"error: {tmp_path / 'plain'}: has no pairs; prepare lines of text, tab, translation")
