"""A thread that works beside the one that asks."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

AHEAD = 16  # pieces of work that may wait, so that neither side waits for the other's slowest


class Helper:
    """A thread that hashes or writes while the next pieces are being read: in order, a few pieces behind at most."""

    def __init__(self) -> None:
        """Begin with nothing to do."""
        self._thread = ThreadPoolExecutor(1)
        self._work: deque[Future[object]] = deque()

    def do(self, work: Callable[..., object], *arguments: object) -> None:
        """Do something once what went before is done; raise what something before raised."""
        if len(self._work) == AHEAD:
            self._work.popleft().result()
        self._work.append(self._thread.submit(work, *arguments))

    def wait(self) -> None:
        """Wait for all the work, and raise what some of it raised."""
        while self._work:
            self._work.popleft().result()

    def __enter__(self) -> "Helper":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
