"""Runs of the scripts on pretended GPUs (pretended_gpu.py), each in a process of its own.

The processes are forked from a server that has imported torch already, which saves seconds for each.
"""

import json
import multiprocessing
import os
import runpy
import socket
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

from guard import build_guard

ROOT = Path(__file__).resolve().parents[2]
FORKS = multiprocessing.get_context("forkserver")
SECONDS = 120
"""Time for a run."""


@dataclass(frozen=True)
class Result:
    """A finished process."""

    status: int | None
    """Its exit status; None if it hung."""
    output: str
    kernels: int
    waits: Counter[str]
    """What made the host wait for the GPU, and where."""


def run(
    folder: Path, script: str, *words: str, gpus: int = 1, processes: int = 1, oom: Any = None, **environment: str
) -> Result:
    """Run a script or a test file on pretended GPUs, and return the result of its first process.

    Args:
        folder: A folder for files of the run.
        script: A path from the root of the project, or "pytest".
        words: The words of its command line.
        oom: The error to raise, a part of the name of the operation that raises it, and how many succeed before.
    """
    start_server()
    folder.mkdir(parents=True, exist_ok=True)
    if processes > 1:
        environment |= {key: str(processes) for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = [
        FORKS.Process(
            target=run_here,
            args=(folder / f"result-{rank}", script, words, gpus, oom),
            kwargs=environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
        )
        for rank in range(processes)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(SECONDS)
        child.kill()
    output = (folder / "result-0.log").read_text(encoding="utf-8")
    counts = folder / "result-0.json"
    kernels, waits = json.loads(counts.read_text(encoding="utf-8")) if counts.exists() else (0, {})
    return Result(children[0].exitcode, output, kernels, Counter(waits))


@lru_cache(maxsize=1)
def start_server() -> None:
    """Start the server, which finds the modules to import by PYTHONPATH alone."""
    build_guard()
    FORKS.set_forkserver_preload(["pretended_gpu", "train"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    ensure_running()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_here(
    result: Path, script: str, words: tuple[str, ...], gpus: int, oom: Any, **environment: Mapping[str, str]
) -> None:
    """Run a script in this process, after writing its output and counts to files; then exit with its status."""
    import pretended_gpu  # noqa: PLC0415  (only here it may change torch)

    with result.with_suffix(".log").open("wb") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    os.environ.update(environment)  # type: ignore[arg-type]
    os.chdir(ROOT)
    pretended_gpu.pretend(gpus)
    pretended_gpu.STATE.oom = oom
    status = 0
    try:
        if script == "pytest":
            import pytest  # noqa: PLC0415

            status = int(pytest.main([*words, "-p", "no:cacheprovider", "-p", "no:xdist"]))
        else:
            sys.argv = [script, *words]
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        counts = [pretended_gpu.STATE.kernels, pretended_gpu.STATE.waits]
        result.with_suffix(".json").write_text(json.dumps(counts), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
