"""Runs of the scripts on pretended GPUs (pretended_gpu.py), each in a process of its own.

The processes are forked from a server, this file as a program, which has imported torch already: that saves seconds.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120
"""Time for a run."""


@dataclass(frozen=True)
class Result:
    """A finished process."""

    status: int
    """Its exit status."""
    output: str
    kernels: int
    waits: Counter[str]
    """What made the host wait for the GPU, and where."""


def run(folder: Path, script: str, *words: str, gpus: int = 1, processes: int = 1, oom: Any = None) -> Result:
    """Run a script or a test file on pretended GPUs, and return the result of its first process.

    Args:
        folder: A folder for files of the run.
        script: A path from the root of the project, or "pytest".
        words: The words of its command line.
        oom: The error to raise, a part of the name of the operation that raises it, and how many succeed before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    requests = [
        {
            "result": str(folder / f"result-{rank}"),
            "script": script,
            "words": words,
            "gpus": gpus,
            "oom": oom,
            "environment": process_environment(rank, processes, port) if processes > 1 else {},
        }
        for port in [free_port()]
        for rank in range(processes)
    ]
    inputs, outputs = server().stdin, server().stdout
    assert inputs
    assert outputs
    inputs.write(json.dumps(requests) + "\n")
    inputs.flush()
    statuses = json.loads(outputs.readline())
    output = (folder / "result-0.log").read_text(encoding="utf-8")
    counts = folder / "result-0.json"
    kernels, waits = json.loads(counts.read_text(encoding="utf-8")) if counts.exists() else (0, {})
    return Result(statuses[0], output, kernels, Counter(waits))


@lru_cache(maxsize=1)
def server() -> "subprocess.Popen[str]":
    """Start the server, which ends with this process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        cwd=ROOT,
        env=environment,
    )


def process_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun would set."""
    sizes = {key: str(processes) for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    return {**sizes, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def serve() -> None:
    """Read lists of requests, run the processes of each list together, and write their exit statuses."""
    import pretended_gpu  # noqa: F401, PLC0415

    import train  # noqa: F401, PLC0415

    for line in os.fdopen(os.dup(0), encoding="utf-8"):  # the scripts want an unread sys.stdin
        children = []
        for request in json.loads(line):
            if (child := os.fork()) == 0:
                run_here(**request)
            children.append(child)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


def run_here(
    *, result: str, script: str, words: list[str], gpus: int, oom: list[Any] | None, environment: dict[str, str]
) -> None:
    """Run a script in this process; write its output and counts to files, and exit with its status."""
    import pretended_gpu  # noqa: PLC0415  (only here it may change torch)

    with Path(f"{result}.log").open("wb") as log, Path(os.devnull).open("rb") as nothing:
        for file, descriptor in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(file.fileno(), descriptor)
    signal.alarm(SECONDS)
    os.environ.update(environment)
    pretended_gpu.pretend(gpus)
    pretended_gpu.STATE.oom = (oom[0], oom[1], oom[2]) if oom else None
    status = 1
    try:
        if script == "pytest":
            import pytest  # noqa: PLC0415

            status = int(pytest.main([*words, "-p", "no:cacheprovider", "-p", "no:xdist"]))
        else:
            sys.argv = [script, *words]
            runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    counts = [pretended_gpu.STATE.kernels, pretended_gpu.STATE.waits]
    Path(f"{result}.json").write_text(json.dumps(counts), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
