"""The device guard of pretended GPUs (pretended_gpu.cpp), compiled once for each version of torch."""

import os
import subprocess
import sysconfig
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".pytest_cache" / "pretended_gpu"


def build_guard() -> Path:
    """Return the compiled library, which is compiled first if there is none yet."""
    source, spec = Path(__file__).with_name("pretended_gpu.cpp"), find_spec("torch")
    assert spec
    assert spec.origin
    package = Path(spec.origin).parent
    library = CACHE / f"{version('torch')}-{sysconfig.get_platform()}-{source.stat().st_mtime_ns}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        flags = ["-O0", "-std=c++20", "-shared", "-fPIC", "-o", str(unfinished), str(source)]
        paths = [f"-I{package}/include", f"-I{package}/include/torch/csrc/api/include", f"-L{package}/lib"]
        subprocess.run(["g++", *flags, *paths, "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{package}/lib"], check=True)
        unfinished.replace(library)
    return library
