"""A worker thread that runs tasks in order while the main thread continues."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

MAX_PENDING = 16  # tasks; bounds the memory of their arguments, and still evens out slow tasks


class BackgroundWorker:
    """Runs tasks in order in one thread, for example to hash or write one chunk while the next is read.

    At most MAX_PENDING tasks are pending. After a task has failed, later ones are skipped, so that no output has a gap.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()
        self._failed = False

    def submit(self, task: Callable[..., object], *arguments: object) -> None:
        """Queue a task; if the queue is full, first wait for the oldest task and raise its exception, if any."""
        if len(self._pending) == MAX_PENDING:
            self._pending.popleft().result()
        self._pending.append(self._executor.submit(self._run, task, arguments))

    def _run(self, task: Callable[..., object], arguments: tuple[object, ...]) -> None:
        if self._failed:
            return
        try:
            task(*arguments)
        except BaseException:
            self._failed = True
            raise

    def flush(self) -> None:
        """Wait for all tasks, and raise the exception of the first that failed."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """End the thread after the current task, and cancel the pending tasks."""
        self._executor.shutdown(cancel_futures=True)

    def __enter__(self) -> "BackgroundWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
