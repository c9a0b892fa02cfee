"""A helper's thread works in order, some pieces behind, and stops at the first failure."""

import threading

import pytest

from glyphgpt.data.background import AHEAD, Helper


def test_work_is_done_in_order_beside_the_one_who_asks() -> None:
    done: list[int] = []
    gate = threading.Event()
    with Helper() as helper:
        helper.do(gate.wait)
        for number in range(AHEAD - 1):
            helper.do(done.append, number)
        assert done == []
        gate.set()
        helper.wait()
    assert done == list(range(AHEAD - 1))


def test_nothing_is_done_after_a_failure_which_is_told() -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError("no space left")

    with Helper() as helper:
        helper.do(done.append, 1)
        helper.do(fail)
        helper.do(done.append, 2)
        with pytest.raises(OSError, match="no space left"):
            helper.wait()
        helper.do(done.append, 3)
        helper.wait()
    assert done == [1]
