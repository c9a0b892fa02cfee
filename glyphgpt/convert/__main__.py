"""Convert models, data and settings from and to the formats of other programs.

    python -m glyphgpt.convert nanogpt ckpt.pt --meta=meta.pkl --out=out/mine/best.safetensors
    python -m glyphgpt.convert nanogpt-data nanoGPT/data/shakespeare_char --name=mine
    python -m glyphgpt.convert nanogpt-config train_shakespeare_char.py --out=config/mine.toml
    python -m glyphgpt.convert huggingface FOLDER --out=out/gpt2/best.safetensors
    python -m glyphgpt.convert to-huggingface out/run --out=FOLDER
    python -m glyphgpt.convert to-gguf out/run --out=model.gguf        for llama.cpp
    python -m glyphgpt.convert to-html out/run --out=model.html        for any browser

Nothing in a file is executed.
"""

import sys
from pathlib import Path

from glyphgpt.cli import parse
from glyphgpt.convert import from_huggingface, nanogpt, to_gguf, to_html, to_huggingface
from glyphgpt.errors import UsageError, exit_on_error
from glyphgpt.settings import ConvertSettings

USAGE = "python -m glyphgpt.convert KIND PATH [--key=value ...]"
KINDS = {
    "nanogpt": nanogpt.convert_checkpoint,
    "nanogpt-data": nanogpt.convert_dataset,
    "nanogpt-config": nanogpt.convert_config,
    "huggingface": from_huggingface.convert_model,
    "to-huggingface": to_huggingface.export_folder,
    "to-gguf": to_gguf.export_gguf,
    "to-html": to_html.export_page,
}
"""The kinds of conversion. Each function returns a message for the user."""


def main() -> None:
    """Run the conversion that the command line names."""
    settings, words = parse(ConvertSettings, sys.argv[1:], USAGE, __doc__ or "", files=False)
    if len(words) != 2 or words[0] not in KINDS:
        raise UsageError(f"the command line must name a kind and a path: {USAGE}; kinds: {', '.join(KINDS)}")
    print(KINDS[words[0]](Path(words[1]), settings))


if __name__ == "__main__":
    with exit_on_error():
        main()
