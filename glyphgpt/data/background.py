"""A thread that works beside the one that asks."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

AHEAD = 16  # pieces of work that may wait, so that neither side waits for the other's slowest


class BackgroundWorker:
    """A thread that hashes or writes while the next pieces are being read: in order, a few pieces behind at most."""

    def __init__(self) -> None:
        """Begin with nothing to do."""
        self._thread = ThreadPoolExecutor(1)
        self._work: deque[Future[None]] = deque()
        self._failed = False

    def submit(self, work: Callable[..., object], *arguments: object) -> None:
        """Do something once what went before is done; raise what that raised, and then do nothing any more."""
        if len(self._work) == AHEAD:
            self._work.popleft().result()
        self._work.append(self._thread.submit(self._run, work, arguments))

    def _run(self, work: Callable[..., object], arguments: tuple[object, ...]) -> None:
        if self._failed:  # what comes after a piece that is missing would stand in its place
            return
        try:
            work(*arguments)
        except BaseException:
            self._failed = True
            raise

    def wait(self) -> None:
        """Wait for all the work, and raise what some of it raised."""
        while self._work:
            self._work.popleft().result()

    def close(self) -> None:
        """Let go of the thread; work that has not begun is dropped."""
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> "BackgroundWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
