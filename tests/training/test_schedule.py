"""The learning rate as a function of the step."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glyphgpt.checkpoint import TrainState
from glyphgpt.settings import Optimization
from glyphgpt.training.schedule import learning_rate

SCHEDULES = ["cosine", "linear", "inverse_sqrt", "constant"]


def schedule(kind: str, **changes: float) -> Optimization:
    values = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_steps": 10, "max_steps": 110}
    return Optimization.model_validate({"schedule": kind, **values, **changes})


def rate_at(step: int, settings: Optimization) -> float:
    return learning_rate(TrainState(step=step), settings)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_rate_rises_linearly_during_warmup(kind: str) -> None:
    rates = [rate_at(step, schedule(kind)) for step in range(11)]
    assert rates == pytest.approx([(step + 1) / 11 for step in range(11)])


@pytest.mark.parametrize(
    ("kind", "quarter", "half", "last", "end"),
    [
        ("cosine", 0.1 + 0.45 * (1 + math.sqrt(0.5)), 0.55, 0.1 + 0.45 * (1 - math.cos(math.pi / 100)), 0.1),
        ("linear", 0.775, 0.55, 0.109, 0.1),
        ("constant", 1, 1, 1, 1),
    ],
)
def test_rate_falls_along_the_schedule(kind: str, quarter: float, half: float, last: float, end: float) -> None:
    rates = [rate_at(step, schedule(kind)) for step in (10, 35, 60, 109, 110, 10**6)]
    assert rates == pytest.approx([1, quarter, half, last, end, end])


def test_rate_falls_as_the_inverse_square_root_of_the_step() -> None:
    rates = [rate_at(step, schedule("inverse_sqrt", max_steps=20)) for step in (10, 43, 98, 10**6)]
    assert rates == pytest.approx([1, 1 / 2, 1 / 3, 0.1])


@pytest.mark.parametrize("kind", SCHEDULES)
def test_without_warmup_the_first_rate_is_the_peak(kind: str) -> None:
    assert rate_at(0, schedule(kind, warmup_steps=0)) == 1


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("max_steps", [0, 3, 10])
def test_warmup_continues_beyond_max_steps(kind: str, max_steps: int) -> None:
    rates = [rate_at(step, schedule(kind, max_steps=max_steps)) for step in range(11)]
    assert rates == pytest.approx([(step + 1) / 11 for step in range(11)])
    after = rate_at(50, schedule(kind, max_steps=max_steps))
    assert after == pytest.approx({"constant": 1, "inverse_sqrt": math.sqrt(11 / 51)}.get(kind, 0.1))


@given(
    kind=st.sampled_from(SCHEDULES),
    warmup_steps=st.integers(0, 50),
    max_steps=st.integers(0, 200),
    peak=st.floats(1e-6, 10),
    fraction=st.floats(0, 1),
    step=st.integers(0, 300),
)
@settings(deadline=None, max_examples=200)
def test_rate_rises_then_falls_within_bounds(
    *, kind: str, warmup_steps: int, max_steps: int, peak: float, fraction: float, step: int
) -> None:
    low = peak * fraction
    optimization = schedule(kind, warmup_steps=warmup_steps, max_steps=max_steps, learning_rate=peak, min_lr=low)
    rate, next_rate = rate_at(step, optimization), rate_at(step + 1, optimization)
    tolerance = 1e-12 * peak
    assert 0 <= rate <= peak + tolerance
    if step < warmup_steps:
        assert rate < next_rate
    else:
        assert low - tolerance <= next_rate <= rate + tolerance


@pytest.mark.parametrize("kind", SCHEDULES)
def test_after_a_change_of_plan_the_rate_falls_in_a_line(kind: str) -> None:
    states = [TrainState(step=step, planned_at=40, planned_rate=0.6) for step in (40, 50, 60, 70)]
    rates = [learning_rate(state, schedule(kind, max_steps=60)) for state in states]
    assert rates == pytest.approx([0.6, 0.35, 0.1, 0.1])
