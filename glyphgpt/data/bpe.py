"""Learn a byte-pair encoding from a text, with Hugging Face's tokenizers (https://github.com/huggingface/tokenizers)."""

from collections.abc import Callable, Iterable
from threading import Thread

from glyphgpt.data.tokenizers import BPETokenizer, bytes_to_unicode
from glyphgpt.errors import optional_import


def learn_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Return a tokenizer with `vocab_size` tokens: the bytes, the most frequent merges, and the end of a document.

    It has fewer tokens if too few pairs occur twice. The memory that this takes grows with the number of different
    words.

    Raises:
        UsageError: The package tokenizers is not installed.
    """
    with optional_import("tokenizers", "--tokenizer=bpe"):
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: PLC0415  (optional)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    run_interruptibly(lambda: learner.train_from_iterator(texts, trainer))
    ids = learner.get_vocab()
    byte_of = {symbol: byte for byte, symbol in enumerate(bytes_to_unicode())}
    merged = sorted((token for token in ids if len(token) > 1), key=ids.__getitem__)
    tokens = [bytes([byte]) for byte in range(256)] + [bytes(map(byte_of.__getitem__, token)) for token in merged]
    return BPETokenizer(tokens)


def run_interruptibly(function: Callable[[], object]) -> None:
    """Call a function that does not return to Python for long in a thread, so that Ctrl-C stops the program."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:  # raised again below
            errors.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if errors:
        raise errors[0]
