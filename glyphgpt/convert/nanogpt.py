"""From nanoGPT (https://github.com/karpathy/nanoGPT): its checkpoints, its data, its configs.

Its checkpoints and its vocabularies are pickles, and its configs are Python. Nothing in them is executed: torch's
loader takes weights only, the vocabulary's pickle is read opcode by opcode, and configs are read as syntax.
"""

import ast
import hashlib
import math
import operator
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from numpy.typing import NDArray

from glyphgpt.checkpoint import Arrays, Checkpoint, Metadata, TrainState, check_weights, save_checkpoint
from glyphgpt.cli import resolve
from glyphgpt.data.dataset import FORMAT, DatasetMeta, ShardWriter, SourceMeta, SplitMeta, write_meta
from glyphgpt.data.sources import sanitize
from glyphgpt.data.staging import dataset_dir, load_progress, staging_dir
from glyphgpt.data.tokenizers import CharTokenizer, GPT2Tokenizer, Tokenizer
from glyphgpt.errors import UsageError, UserError
from glyphgpt.files import write_atomic
from glyphgpt.settings import ConvertSettings, Network, TrainSettings

NANOGPT_TO_OURS = {
    "transformer.wte": "token_embedding",
    "transformer.wpe": "position.embedding",
    "transformer.ln_f": "norm",
    "lm_head": "head",
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.out",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
"""Our names of its modules."""

PADDED_VOCABULARY = 50304
"""Of its models of word pieces, whose last tokens mean nothing."""
PIECE_TOKENS = 1 << 22


def convert_checkpoint(path: Path, settings: ConvertSettings) -> str:
    """Turn a ckpt.pt into a checkpoint of ours, with the same logits; return what to say.

    Raises:
        UserError: it is none of nanoGPT's, holds anything but plain data, or does not fit the vocabulary.
    """
    out = new_file(settings.out, "--out=out/mine/best.safetensors", settings)
    saved = load_plain(path)
    try:
        config, weights = convert_weights(saved["model"], saved["model_args"])
        tokenizer = vocabulary(settings.meta, config["vocab_size"])
        if tokenizer["kind"] == GPT2Tokenizer.kind:
            config, weights = without_padding(config, weights)
        check_weights(config, weights)
        state = TrainState(step=int(saved.get("iter_num", 0)))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: no checkpoint of nanoGPT's GPT, or its weights and model_args differ") from error
    info = Metadata(
        model=config, tokenizer=tokenizer, settings={}, data="", val_loss=None, state=state, scaler={}
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(Checkpoint(info, weights), out)
    parameters = sum(array.size for array in weights.values())
    return f"{out}: {parameters:,} parameters, {config['vocab_size']:,} tokens; sample it: python sample.py {out}"


def new_file(name: str, example: str, settings: ConvertSettings) -> Path:
    """Return where to write.

    Raises:
        UsageError: no place is named, or something is there already.
    """
    if not name:
        raise UsageError(f"say where to write: {example}")
    if Path(name).exists() and not settings.overwrite:
        raise UsageError(f"{name} is there already; add --overwrite to replace it, or choose another --out")
    return Path(name)


def load_plain(path: Path) -> dict[str, Any]:
    """Load the tensors and plain data of a torch file; anything else in it is refused, unexecuted.

    Raises:
        UserError: it cannot be loaded.
    """
    import torch  # noqa: PLC0415  (data and configs do without)

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:  # a crafted file can make torch raise anything
        raise UserError(f"{path}: does not load as weights and plain data; nothing in it was executed") from error
    if not isinstance(saved, dict):
        raise UserError(f"{path}: no checkpoint of nanoGPT's")
    return saved


def convert_weights(model: dict[str, Any], arguments: dict[str, Any]) -> tuple[dict[str, Any], Arrays]:
    """Return the config and the weights in our names; what torch.compile put before the names is dropped."""
    shape = {key: arguments[key] for key in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias")}
    config = Network().model_dump() | {"activation": "gelu_erf", "dropout": float(arguments.get("dropout", 0))} | shape
    weights: Arrays = {}
    for name, tensor in model.items():
        plain = name.removeprefix("_orig_mod.")
        if not plain.endswith(".attn.bias"):  # the mask, which older versions of torch needed
            weights[our_name(plain)] = tensor.detach().float().numpy()
    if np.array_equal(weights["head.weight"], weights["token_embedding.weight"]):
        del weights["head.weight"]
    else:
        config["tie_embeddings"] = False
    return config, weights


def our_name(name: str) -> str:
    """Return our name of one of its tensors.

    >>> our_name("transformer.h.3.attn.c_proj.weight")
    'blocks.3.attention.out.weight'
    """
    module, _, kind = name.rpartition(".")
    block = ""
    if module.startswith("transformer.h."):
        _, _, layer, module = module.split(".", 3)
        block = f"blocks.{layer}."
    return f"{block}{NANOGPT_TO_OURS[module]}.{kind}"


def without_padding(config: dict[str, Any], weights: Arrays) -> tuple[dict[str, Any], Arrays]:
    """Drop the rows of tokens that do not exist."""
    size = GPT2Tokenizer.vocab_size
    cut = {name: array[:size] if name in ("token_embedding.weight", "head.weight") else array for name, array in
           weights.items()}  # fmt: skip
    return {**config, "vocab_size": size}, cut


def vocabulary(meta: str, vocab_size: int) -> dict[str, Any]:
    """Return the tokenizer of a meta.pkl, or GPT-2's where none is named, as plain data.

    Raises:
        UserError: it is not that of so many tokens.
    """
    if meta:
        tokenizer = characters_of(Path(meta))
        if tokenizer.vocab_size != vocab_size:
            raise UserError(f"{meta}: {tokenizer.vocab_size:,} characters, but the model has {vocab_size:,} tokens")
        return tokenizer.to_dict()
    if vocab_size not in (GPT2Tokenizer.vocab_size, PADDED_VOCABULARY):
        raise UserError(f"a model of {vocab_size:,} tokens needs its vocabulary: --meta=.../meta.pkl")
    return {"kind": GPT2Tokenizer.kind}


def characters_of(path: Path) -> CharTokenizer:
    """Read a meta.pkl.

    Raises:
        UserError: it is not a character vocabulary in the order of the code points.
    """
    try:
        itos = read_plain_pickle(path.read_bytes())["itos"]
        characters = [itos[token] for token in range(len(itos))]
        if not all(isinstance(character, str) and len(character) == 1 for character in characters):
            raise TypeError
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no character vocabulary of nanoGPT's; nothing in it was executed") from error
    return CharTokenizer("".join(characters))


def read_plain_pickle(data: bytes) -> Any:
    """Read the few opcodes that make up a pickle of dictionaries, text and whole numbers.

    Raises:
        ValueError: it holds another one.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "EMPTY_DICT":
                stack.append({})
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2":
                stack.append(argument)
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[int(argument or 0)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[int(argument or 0)])
            case "MARK":
                marks.append(len(stack))
            case "SETITEM" | "SETITEMS":
                mark = marks.pop() if opcode.name == "SETITEMS" else len(stack) - 2
                items = stack[mark:]
                del stack[mark:]
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case name:
                raise ValueError(f"a pickle with {name} in it")
    [result] = stack
    return result


def convert_dataset(folder: Path, settings: ConvertSettings) -> str:
    """Turn a folder with train.bin and val.bin, and a meta.pkl where they hold characters, into a data set of ours.

    Raises:
        UserError: files are missing, or hold ids beyond the vocabulary.
    """
    data_dir = Path(settings.data_dir)
    target = dataset_dir(settings.name or folder.resolve().name, data_dir)
    paths = [folder / "train.bin", folder / "val.bin"]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file; run nanoGPT's prepare.py there first")
    pickled = folder / "meta.pkl"
    tokenizer: Tokenizer = characters_of(pickled) if pickled.exists() else GPT2Tokenizer(data_dir)
    digest = hashlib.sha256()
    with staging_dir(target, overwrite=settings.overwrite) as new:
        load_progress(new, "")  # what a preparation of that name may have left
        train, val = (convert_split(path, new, tokenizer, digest) for path in paths)
        source = SourceMeta(
            names=[sanitize(path) for path in paths],
            bytes=sum(path.stat().st_size for path in paths),
            sha256=digest.hexdigest(),
        )
        meta = DatasetMeta(
            format=FORMAT,
            recipe="",
            tokenizer=tokenizer.to_dict(),
            vocab_size=tokenizer.vocab_size,
            val_fraction=val.tokens / (train.tokens + val.tokens),
            source=source,
            train=train,
            val=val,
        )
        write_meta(new, meta)
    return f"{target}: {train.tokens:,} tokens to train, {val.tokens:,} to validate"


def convert_split(path: Path, folder: Path, tokenizer: Tokenizer, digest: Any) -> SplitMeta:
    """Copy the 16-bit ids of a file into shards, checked."""
    writer = ShardWriter(folder, path.stem, tokenizer.vocab_size, 10**8)
    size = path.stat().st_size
    if size % 2 or size < 4:
        raise UserError(f"{path}: {size:,} bytes are not two or more ids of 16 bits")
    sizes = np.array([characters_in(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    characters = 0
    for ids in pieces(path):
        if int(ids.max()) >= tokenizer.vocab_size:
            raise UserError(
                f"{path}: holds the id {int(ids.max())}, beyond the {tokenizer.vocab_size:,} of its vocabulary"
            )
        digest.update(ids.tobytes())
        characters += int(sizes[ids].sum())
        writer.write(ids.astype(writer.dtype))
    writer.finish()
    return writer.meta(characters)


def pieces(path: Path) -> Iterator[NDArray[np.uint16]]:
    """Yield a file's ids, some million at a time."""
    ids = np.memmap(path, dtype="<u2", mode="r")
    yield from (ids[start : start + PIECE_TOKENS] for start in range(0, len(ids), PIECE_TOKENS))


def characters_in(spelling: bytes) -> int:
    """Count the characters that begin in some UTF-8 bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in spelling)


SAME = {
    "out_dir", "dataset", "batch_size", "block_size", "gradient_accumulation_steps", "n_layer", "n_head", "n_embd",
    "dropout", "bias", "learning_rate", "min_lr", "weight_decay", "beta1", "beta2", "grad_clip", "device", "dtype",
    "compile", "wandb_project",
}  # fmt: skip
RENAMED = {
    "eval_interval": "eval_every",
    "log_interval": "log_every",
    "max_iters": "max_steps",
    "warmup_iters": "warmup_steps",
    "wandb_log": "wandb",
}
DEFAULTS: dict[str, Any] = {
    "out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "dataset": "openwebtext",
    "gradient_accumulation_steps": 40, "batch_size": 12, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768,
    "dropout": 0.0, "bias": False, "learning_rate": 6e-4, "max_iters": 600_000, "weight_decay": 0.1, "beta1": 0.9,
    "beta2": 0.95, "grad_clip": 1.0, "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600_000, "min_lr": 6e-5,
}  # fmt: skip
"""Of its train.py."""
INSTEAD = {
    "always_save_checkpoint": "best and last are always saved",
    "eval_only": "say --eval_only",
    "init_from": "say --resume to go on with a run, or --init_from=RUN to begin with its weights",
}
"""Why a setting is not taken over."""
OPERATIONS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}  # fmt: skip


def convert_config(path: Path, settings: ConvertSettings) -> str:
    """Turn a config in Python into a TOML file of ours for the same training; return what to say.

    Raises:
        UserError: it is no list of plain settings.
        UsageError: it asks for what cannot be.
    """
    out = new_file(settings.out, f"--out=config/{path.stem}.toml", settings)
    values, left_out = read_config(path)
    values = DEFAULTS | values
    ours = {RENAMED.get(key, key): value for key, value in values.items() if key in SAME | RENAMED.keys()}
    evaluated = [number(values[key], f"{path}: {key}") for key in ("eval_iters", "batch_size", "block_size")]
    ours |= {
        "eval_tokens": math.prod(evaluated),
        "schedule": "cosine",
        "activation": "gelu_erf",
    }
    if not values["decay_lr"]:  # without a warm-up, too
        ours |= {"schedule": "constant", "min_lr": values["learning_rate"], "warmup_steps": 0}
    numbers = {key for key, field in TrainSettings.model_fields.items() if field.annotation is float}
    ours = {
        key: float(number(value, f"{path}: {key}")) if key in numbers and isinstance(value, int) else value
        for key, value in ours.items()
    }
    resolve(TrainSettings, [(str(path), ours)])
    if values["decay_lr"] and values["lr_decay_iters"] != values["max_iters"]:
        left_out["lr_decay_iters"] = "the learning rate falls until max_steps here"
    notes = "".join(f"# not taken over: {key}: {why}\n" for key, why in left_out.items())
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, f"# From nanoGPT's {path.name}, its defaults written out.\n{notes}{tomli_w.dumps(ours)}".encode())
    return f"{out}: {len(ours)} settings; look through it, then: python train.py {out}"


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the settings of a config, and tell which were left out, and why."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:  # ast.parse's words for bad input
        raise UserError(f"{path}: not Python that can be read: {str(error).splitlines()[0]}") from error
    values: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    known = SAME | RENAMED.keys() | {"eval_iters", "decay_lr", "lr_decay_iters"}
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=key)], value=value) if key in known:
                values[key] = evaluate(value, values, f"{path}: line {statement.lineno}")
            case ast.Assign(targets=[ast.Name(id=key)]):
                left_out[key] = INSTEAD.get(key, "there is no such setting")
            case ast.Expr(value=ast.Constant()) | ast.Import():
                pass
            case _:
                raise UserError(f"{path}: line {statement.lineno} is not a setting; write it as key = value")
    return values, left_out


def evaluate(node: ast.expr, values: dict[str, Any], place: str) -> Any:
    """Work out a constant, a name set before, or a sum or product of them."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.Name(id=name) if name in values:
            return values[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -number(evaluate(operand, values, place), place)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            sides = (number(evaluate(side, values, place), place) for side in (left, right))
            try:
                return OPERATIONS[type(op)](*sides)
            except ArithmeticError as error:
                raise UserError(f"{place}: {error}") from error
    raise UserError(f"{place}: only numbers, text and products of numbers are read; nothing is executed")


def number(value: Any, place: str) -> int | float:
    """Return a number.

    Raises:
        UserError: it is none, or beyond all reason.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 10**18:
        raise UserError(f"{place}: {str(value)[:50]} is not a number that one can reckon with")
    return value
