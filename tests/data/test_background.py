"""A helper's thread works in order, some pieces behind, and stops at the first failure."""

import threading

import pytest

from glyphgpt.data.background import AHEAD, BackgroundWorker


def test_work_is_done_in_order_beside_the_one_who_asks() -> None:
    done: list[int] = []
    gate = threading.Event()
    with BackgroundWorker() as helper:
        helper.submit(gate.wait)
        for number in range(AHEAD - 1):
            helper.submit(done.append, number)
        assert done == []
        gate.set()
        helper.wait()
    assert done == list(range(AHEAD - 1))


def test_nothing_is_done_after_a_failure_which_is_told() -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError("no space left")

    with BackgroundWorker() as helper:
        helper.submit(done.append, 1)
        helper.submit(fail)
        helper.submit(done.append, 2)
        with pytest.raises(OSError, match="no space left"):
            helper.wait()
        helper.submit(done.append, 3)
        helper.wait()
    assert done == [1]
