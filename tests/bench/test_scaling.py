"""The page on scaling shows what its formulas give, and the formulas count as torch does."""

import pytest

import scaling
from conftest import ROOT


def test_the_page_holds_the_tables() -> None:
    assert scaling.tables() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_as_large_as_on_paper(recompute: bool) -> None:
    shapes = [scaling.Shape("small", layers, 64, 2, 100, 320) for layers in (2, 3)]
    fewer, more = (scaling.kept_bytes(shape, recompute=recompute) for shape in shapes)
    assert (more - fewer) / 64 / 320 == pytest.approx(4 if recompute else scaling.BLOCK_BYTES, rel=0.05)


def test_sharing_takes_less_memory_and_checkpointing_less_still() -> None:
    shape = scaling.SHAPES[-1]
    copies, shares, recomputed = (way.memory(shape, 64) for way in scaling.WAYS)
    assert copies > shares > recomputed
