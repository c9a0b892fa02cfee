"""docs/scaling.md shows what the formulas of bench/scaling.py compute, and the formulas agree with torch."""

import pytest

import scaling
from conftest import ROOT


def test_the_page_contains_the_tables() -> None:
    assert scaling.tables() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("recompute", [False, True])
def test_kept_activations_have_the_estimated_size(recompute: bool) -> None:
    shapes = [scaling.Shape("small", layers, 64, 2, 100, 320) for layers in (2, 3)]
    fewer, more = (scaling.kept_bytes(shape, recompute=recompute) for shape in shapes)
    expected = scaling.INPUT_BYTES if recompute else scaling.BLOCK_BYTES
    assert (more - fewer) / 64 / 320 == pytest.approx(expected, rel=0.05)


def test_sharding_takes_less_memory_and_checkpointing_even_less() -> None:
    shape = scaling.SHAPES[-1]
    replicated, sharded, checkpointed = (strategy.memory(shape, 64) for strategy in scaling.STRATEGIES)
    assert replicated > sharded > checkpointed
