"""Load a trained model for inference. A CPU samples without torch, whose import takes longer than most samples."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from glyphgpt.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from glyphgpt.data.tokenizers import Tokenizer, tokenizer_from_dict
from glyphgpt.errors import UserError
from glyphgpt.inference.numpy_gpt import NumpyGPT

if TYPE_CHECKING:
    from glyphgpt.inference.torch_lm import TorchLM
    from glyphgpt.runtime import Runtime
    from model import GPT


def open_checkpoint(path: Path, data_dir: Path) -> tuple[Checkpoint, Tokenizer]:
    """Load the checkpoint of a run or file, without its optimizer state, and its tokenizer.

    Raises:
        UserError: There is no checkpoint, it is damaged, or its parts do not belong together.
    """
    checkpoint = load_checkpoint(find_checkpoint(path), with_optimizer=False)
    tokenizer = tokenizer_from_dict(checkpoint.metadata.tokenizer, data_dir)
    if tokenizer.vocab_size != checkpoint.config.vocab_size:
        raise UserError(f"{checkpoint.path}: its tokenizer and its network differ in vocabulary size")
    return checkpoint, tokenizer


@contextmanager
def language_model(checkpoint: Checkpoint, device: str, dtype: str, remedy: str) -> Iterator["NumpyGPT | TorchLM"]:
    """Yield a checkpoint's model on a device, ready to decode; `remedy` names what to lower when memory runs out.

    Raises:
        UserError: The config and the weights do not belong together, or memory ran out.
    """
    if device == "cpu" or (device == "auto" and not has_gpu_driver()):
        try:
            yield NumpyGPT(checkpoint.config, checkpoint.model)
        except MemoryError as error:
            raise UserError(f"out of memory; lower {remedy}") from error
        return
    with torch_model(checkpoint, device, dtype, f"{remedy}, or use --device=cpu") as (model, runtime):
        from glyphgpt.inference.torch_lm import TorchLM  # noqa: PLC0415  (imports torch)

        on_cpu = runtime.device.type == "cpu"
        yield NumpyGPT(checkpoint.config, checkpoint.model) if on_cpu else TorchLM(model, runtime)


@contextmanager
def torch_model(checkpoint: Checkpoint, device: str, dtype: str, remedy: str) -> Iterator[tuple["GPT", "Runtime"]]:
    """Yield a checkpoint's torch model in evaluation mode on a device; `remedy` names what to lower without memory.

    Raises:
        UserError: The config and the weights do not belong together, or memory ran out.
    """
    from glyphgpt.runtime import init_runtime, oom_hint  # noqa: PLC0415  (imports torch)
    from glyphgpt.training.torch_state import build_model  # noqa: PLC0415

    with oom_hint(remedy), init_runtime(device, dtype) as runtime:
        yield build_model(checkpoint).to(runtime.device).eval(), runtime


def has_gpu_driver() -> bool:
    """Return whether CUDA's driver is installed. This check is faster than importing torch."""
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True
