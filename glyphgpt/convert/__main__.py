"""Bring models, data and settings from other programs, and take models to them.

    python -m glyphgpt.convert nanogpt ckpt.pt --meta=meta.pkl --out=out/mine/best.safetensors
    python -m glyphgpt.convert nanogpt-data nanoGPT/data/shakespeare_char --name=mine
    python -m glyphgpt.convert nanogpt-config train_shakespeare_char.py --out=config/mine.toml
    python -m glyphgpt.convert huggingface FOLDER --out=out/gpt2/best.safetensors
    python -m glyphgpt.convert to-huggingface out/run --out=FOLDER
    python -m glyphgpt.convert to-gguf out/run --out=model.gguf        for llama.cpp

Nothing that comes from a file is executed.
"""

import sys
from pathlib import Path

from glyphgpt.cli import parse
from glyphgpt.convert import from_huggingface, nanogpt, to_gguf, to_huggingface
from glyphgpt.errors import UsageError, exit_on_error
from glyphgpt.settings import ConvertSettings

USAGE = "python -m glyphgpt.convert KIND PLACE [--key=value ...]"
KINDS = {
    "nanogpt": nanogpt.convert_checkpoint,
    "nanogpt-data": nanogpt.convert_dataset,
    "nanogpt-config": nanogpt.convert_config,
    "huggingface": from_huggingface.checkpoint,
    "to-huggingface": to_huggingface.folder,
    "to-gguf": to_gguf.model,
}


def main() -> None:
    """Convert what the command line names."""
    settings, words = parse(ConvertSettings, sys.argv[1:], USAGE, __doc__ or "", files=False)
    if len(words) != 2 or words[0] not in KINDS:
        raise UsageError(f"say what to convert: {USAGE}; kinds: {', '.join(KINDS)}")
    print(KINDS[words[0]](Path(words[1]), settings))


if __name__ == "__main__":
    with exit_on_error():
        main()
