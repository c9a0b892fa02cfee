"""Generate text from a trained model, score a text under it, or show its attention.

    python sample.py out/quick                                    the run's best model
    python sample.py out/quick --prompt="ROMEO:" --num_samples=3
    python sample.py best.safetensors --interactive               any checkpoint file; ask for prompts
    python sample.py out/quick --score=my.txt                     or --score=shakespeare_char, a prepared dataset
    python sample.py out/quick --novelty=shakespeare_char         how much of its text it has copied
    python sample.py out/quick --attention="To be, or not" --out=attention.html

A checkpoint contains its vocabulary (except GPT-2's, which is downloaded once), so one file is enough. The context
grows to the model's block_size tokens. Then its older half is dropped, and it grows again.
"""

import glyphgpt.startup  # first: handles --help and usage errors before the other imports

import shlex
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from tqdm import tqdm

from glyphgpt.checkpoint import Checkpoint
from glyphgpt.cli import unescape
from glyphgpt.data.dataset import Dataset, Split, find_dataset, load_dataset
from glyphgpt.data.novelty import LENGTHS, find_copied, read_points
from glyphgpt.data.text import read_documents, read_text
from glyphgpt.data.tokenizers import Tokenizer, Tokens, decode, encode_prompt, encode_text, start_token
from glyphgpt.errors import UsageError, UserError, warn
from glyphgpt.files import META, write_atomic
from glyphgpt.inference.api import Model, open_model
from glyphgpt.inference.loading import open_checkpoint, torch_model
from glyphgpt.inference.score import encode_split
from glyphgpt.reports.model_page import write_model_page
from glyphgpt.settings import SampleSettings

SPLIT_NAMES = {"train": "training", "val": "validation", "test": "test"}


def main(settings: SampleSettings, *words: str) -> None:
    """Load a checkpoint, then sample, score a text, or write attention weights, as the settings ask.

    Raises:
        UsageError: The command line does not name exactly one run or checkpoint.
    """
    if len(words) != 1:
        prompt = f"; a prompt is --prompt={shlex.quote(' '.join(words[1:]))}" if words else ""
        raise UsageError(f"name one run or checkpoint: {glyphgpt.startup.USAGE['sample.py']}{prompt}")
    if settings.attention:
        write_attention(Path(words[0]), settings)
        return
    remedy = "the load of the GPU" if settings.score else "num_samples"
    is_open_ended = settings.score or settings.interactive or settings.novelty
    tokens = None if is_open_ended else settings.num_samples * settings.max_new_tokens
    with open_model(
        words[0],
        device=settings.device,
        dtype=settings.dtype,
        data_dir=settings.data_dir,
        remedy=remedy,
        tokens=tokens,
    ) as model:
        if settings.score:
            split, name = load_split(model.tokenizer, settings)
            print(f"{name}: {model.score_split(split)}")
            return
        settings = settings.model_copy(update={"stop": tuple(map(unescape, settings.stop))})
        warn_of_unknown_stops(model.tokenizer, settings)
        if settings.novelty:
            print_novelty(model, settings)
        elif settings.interactive:
            interact(model, settings)
        else:
            print_samples(model, settings)


def load_split(tokenizer: Tokenizer, settings: SampleSettings) -> tuple[Split, str]:
    """Return the tokens to score, and their name.

    Raises:
        UserError: There are too few tokens, or the vocabularies differ.
    """
    data_dir = Path(settings.data_dir)
    name, _, split = (settings.score, "", "") if Path(settings.score).exists() else settings.score.partition(":")
    folder = Path(name) if Path(name).exists() else find_dataset(name, data_dir)
    if (folder / META).is_file():
        dataset = load_dataset(folder, data_dir)
        if dataset.meta.tokenizer != tokenizer.to_dict():
            raise UserError(f"{folder}: its vocabulary differs from the model's; score its text: --score=FILE")
        return choose_split(dataset, split or "val"), f"{folder}: {SPLIT_NAMES[split or 'val']} split"
    documents = [[read_text(settings.score)]] if tokenizer.separator is None else read_documents(settings.score)
    encoded, unknown = encode_split(documents, tokenizer, skip=settings.skip_unknown)
    if encoded.tokens < 2:
        raise UserError(f"{settings.score}: {encoded.tokens} tokens; a score needs at least 2")
    skipped = f" ({unknown:,} unknown characters skipped)" if unknown else ""
    return encoded, f"{settings.score}{skipped}"


def choose_split(dataset: Dataset, name: str) -> Split:
    """Return a split of a dataset.

    Raises:
        UserError: There is no such split.
    """
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    if split := splits.get(name):
        return split
    names = ", ".join(f"{dataset.folder.name}:{name}" for name, split in splits.items() if split)
    raise UserError(f"--score={dataset.folder.name}:{name}: the dataset has no such split; it has {names}")


def print_novelty(model: Model, settings: SampleSettings) -> None:
    """Print how much of samples, and of as much validation text, stands in the training text."""
    data_dir = Path(settings.data_dir)
    dataset = load_dataset(find_dataset(settings.novelty, data_dir), data_dir)
    texts = write_samples(model, settings), random_pieces(dataset.val, dataset.tokenizer, settings)
    samples, val = find_copied(texts, read_points(dataset.train, dataset.tokenizer, "reading the training text"))
    print(f"characters in runs that stand in the training text of {settings.novelty}, by the length of the runs:")
    print(f"{'':16}" + "".join(f"{f'{length} or more':>14}" for length in LENGTHS) + f"{'longest':>10}")
    for name, copied in (("samples", samples), ("validation text", val)):
        cells = "".join(f"{fraction:14.1%}" for fraction in copied.fractions.values())
        print(f"{name:16}{cells}{len(copied.longest):10,}")
    if samples.longest:
        print(f"longest run of the samples, at character {samples.place:,}: {samples.longest!r}")


def write_samples(model: Model, settings: SampleSettings) -> list[str]:
    """Return samples, without the prompt; show a progress bar meanwhile."""
    prompt, texts = read_prompt(settings, has_records=model.has_records), [""] * settings.num_samples
    samples, length = model.samples(prompt, settings), settings.max_new_tokens
    for parts in tqdm(samples, "writing samples", length, leave=False, delay=1, unit="token", disable=None):
        texts = [text + part for text, part in zip(texts, parts, strict=True)]
    return texts


def random_pieces(split: Split, tokenizer: Tokenizer, settings: SampleSettings) -> list[str]:
    """Return num_samples records of a split, or pieces of max_new_tokens tokens, from random places."""
    rng = np.random.default_rng(settings.seed)
    if (ends := split.record_ends) is not None:
        chosen = rng.integers(len(ends) - 1, size=settings.num_samples)
        return [decode(tokenizer, split.slice(ends[i] + 1, ends[i + 1])) for i in chosen]
    length = min(settings.max_new_tokens, split.tokens)
    starts = rng.integers(split.tokens - length + 1, size=settings.num_samples)
    return [decode(tokenizer, split.slice(start, start + length)) for start in starts.tolist()]


def write_attention(path: Path, settings: SampleSettings) -> None:
    """Write the attention weights of a text: the model's page with this text, or a figure.

    Raises:
        UserError: The text is empty or too long, or the file could not be written.
    """
    checkpoint, tokenizer = open_checkpoint(path, Path(settings.data_dir))
    encode = encode_text if tokenizer.separator is None else encode_prompt
    tokens: Tokens = encode(settings.attention, tokenizer, skip=settings.skip_unknown).astype(np.uint32)
    out = Path(settings.out)
    if out.name.lower().endswith(".html"):
        write_model_page(out, checkpoint, tokenizer, text=settings.attention, view="attention")
    else:
        write_atomic(out, attention_figure(checkpoint, tokenizer, tokens))
    print(f"{out}: written")


def attention_figure(checkpoint: Checkpoint, tokenizer: Tokenizer, tokens: Tokens) -> bytes:
    """Return a PNG of the attention weights of tokens (T,).

    Raises:
        UserError: There are no tokens, or too many.
    """
    with torch_model(checkpoint, "cpu", "float32", "the length of the text") as (model, _):
        from glyphgpt.reports import attention_maps  # noqa: PLC0415  (imports torch)

        if not 1 <= len(tokens) <= checkpoint.config.block_size:
            length = f"{len(tokens):,} {attention_maps.UNITS[tokenizer.kind]}s"
            raise UserError(f"the text has {length}; this model's context is 1 to {checkpoint.config.block_size:,}")
        return attention_maps.render_png(attention_maps.compute_maps(model, tokenizer, tokens))


def warn_of_unknown_stops(tokenizer: Tokenizer, settings: SampleSettings) -> None:
    """Warn of stop strings that the model cannot write."""
    for stop in settings.stop:
        if unknown := tokenizer.unknown_characters(stop):
            warn(f"stop = {stop!r} cannot occur: {unknown[0]!r} is not in the model's vocabulary")


def print_samples(model: Model, settings: SampleSettings) -> None:
    """Print samples: the first one while it is generated, then the others."""
    prompt = read_prompt(settings, has_records=model.has_records)
    texts = [""] * settings.num_samples
    for number, parts in enumerate(model.samples(prompt, settings)):
        texts = [text + part for text, part in zip(texts, parts, strict=True)]
        print(parts[0] if number else prompt + parts[0], end="", flush=True)
    print()
    rule = "" if model.tokenizer.separator == "\n" else f"{'-' * 20}\n"
    for text in texts[1:]:
        print(f"{rule}{prompt}{text}")


def interact(model: Model, settings: SampleSettings) -> None:
    """Ask for text in a loop, and continue the whole conversation each time, or a record."""
    print("Type a text to continue; Ctrl-C stops a reply, Ctrl-D ends.", file=sys.stderr)
    with suppress(ImportError, OSError):
        import readline  # noqa: F401, PLC0415  (line editing, where the system has it)
    tokenizer, has_records = model.tokenizer, model.has_records  # each reply is one, and begins with what is typed
    opening = read_prompt(settings, has_records=has_records)
    history = "" if has_records else decode(tokenizer, [start_token(tokenizer)])
    end_of_line = "" if has_records or tokenizer.unknown_characters("\n") else "\n"
    for turn in range(sys.maxsize):
        try:
            line = (opening if opening else input("> ")) + end_of_line
            opening = ""
        except EOFError:
            print()
            return
        try:
            encode_text(line, tokenizer, skip=settings.skip_unknown)
        except UserError as error:
            warn(str(error))
            continue
        history = line if has_records else history + line
        for part in reply(model, history, settings.model_copy(update={"seed": settings.seed + turn})):
            print(part, end="", flush=True)
            history += part
        print()


def reply(model: Model, history: str, settings: SampleSettings) -> Iterator[str]:
    """Yield the parts of one sample that continues the history, until it ends or Ctrl-C is pressed."""
    with suppress(KeyboardInterrupt):
        for part, *_ in model.samples(history, settings):
            yield part


def read_prompt(settings: SampleSettings, *, has_records: bool) -> str:
    """Return the prompt of the settings, from the file if they name one; line ends after a record are left out."""
    prompt = read_text(settings.prompt_file) if settings.prompt_file else settings.prompt
    return prompt.rstrip("\r\n") if settings.prompt_file and has_records else prompt


if __name__ == "__main__":
    glyphgpt.startup.run("sample.py", main, broken_pipe_status=0)  # `| head` is not an error
