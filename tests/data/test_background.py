"""BackgroundWorker runs tasks in order, bounds the queue, and stops at the first failure."""

import threading

import pytest

from glyphgpt.data.background import MAX_PENDING, BackgroundWorker


def test_tasks_run_in_order_in_the_background() -> None:
    done: list[int] = []
    gate = threading.Event()
    with BackgroundWorker() as worker:
        worker.submit(gate.wait)
        for number in range(MAX_PENDING - 1):
            worker.submit(done.append, number)
        assert done == []
        gate.set()
        worker.flush()
    assert done == list(range(MAX_PENDING - 1))


def test_tasks_after_a_failure_are_skipped_and_the_failure_is_raised() -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError("no space left")

    with BackgroundWorker() as worker:
        worker.submit(done.append, 1)
        worker.submit(fail)
        worker.submit(done.append, 2)
        with pytest.raises(OSError, match="no space left"):
            worker.flush()
        worker.submit(done.append, 3)
        worker.flush()
    assert done == [1]
