"""Import from nanoGPT (https://github.com/karpathy/nanoGPT): checkpoints, datasets and configs.

nanoGPT's checkpoints and vocabularies are pickles, and its configs are Python. Nothing in them is executed: torch loads
weights only, the vocabulary's pickle is read opcode by opcode, and configs are read from their syntax tree.
"""

import ast
import hashlib
import math
import operator
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from glyphgpt.checkpoint import Arrays, check_weights
from glyphgpt.cli import NANOGPT_NAMES, command, resolve
from glyphgpt.convert.common import make_checkpoint, output_path, rename_weight, write_checkpoint
from glyphgpt.data.dataset import FORMAT, DatasetMeta, ShardWriter, SourceMeta, SplitMeta, write_meta
from glyphgpt.data.staging import dataset_dir, load_progress, staging_dir
from glyphgpt.data.tokenizers import CharTokenizer, GPT2Tokenizer, Tokenizer
from glyphgpt.errors import UserError, sanitize
from glyphgpt.files import write_atomic
from glyphgpt.settings import ConvertSettings, Network, TrainSettings

NANOGPT_TO_OURS = {
    "transformer.wte": "token_embedding",
    "transformer.wpe": "position.embedding",
    "transformer.h": "blocks",
    "transformer.ln_f": "norm",
    "lm_head": "head",
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.out",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
"""Names of modules in nanoGPT, which are those of GPT-2 in Hugging Face's transformers, and here."""

PADDED_VOCAB_SIZE = 50304
"""Vocabulary size of nanoGPT's models with GPT-2's 50,257 tokens. The rest is padding."""
CHUNK_TOKENS = 1 << 22


def convert_checkpoint(path: Path, settings: ConvertSettings) -> str:
    """Convert a ckpt.pt to a checkpoint with the same logits; return a message for the user.

    Raises:
        UserError: The file is not a nanoGPT checkpoint, or does not fit the vocabulary.
    """
    out = output_path(settings, "out/mine/best.safetensors")
    saved = load_torch_file(path)
    try:
        config, weights = convert_weights(saved["model"], saved["model_args"])
        tokenizer = tokenizer_dict(settings.meta, config["vocab_size"])
        if tokenizer["kind"] == GPT2Tokenizer.kind:
            config["vocab_size"] = GPT2Tokenizer.vocab_size
            for name in weights.keys() & {"token_embedding.weight", "head.weight"}:
                weights[name] = weights[name][: GPT2Tokenizer.vocab_size]
        check_weights(config, weights)
        checkpoint = make_checkpoint(config, weights, tokenizer, step=int(saved.get("iter_num", 0)))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: not a nanoGPT checkpoint, or its weights do not fit its model_args") from error
    return write_checkpoint(checkpoint, out)


def load_torch_file(path: Path) -> dict[str, Any]:
    """Load a torch file of tensors and plain data, without executing anything.

    Raises:
        UserError: The file is missing, or holds anything else.
    """
    import torch  # noqa: PLC0415  (datasets and configs do not need it)

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Exception as error:  # a crafted file can make torch raise anything
        raise UserError(f"{path}: does not load as weights and plain data; nothing in it was executed") from error
    if not isinstance(saved, dict):
        raise UserError(f"{path}: not a nanoGPT checkpoint")
    return saved


def convert_weights(model: dict[str, Any], arguments: dict[str, Any]) -> tuple[dict[str, Any], Arrays]:
    """Convert a checkpoint's `model` and `model_args` to a config and weights of ours."""
    shape = {key: arguments[key] for key in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias")}
    config = Network().model_dump() | {"activation": "gelu_erf", "dropout": float(arguments.get("dropout", 0))} | shape
    weights: Arrays = {}
    for name, tensor in model.items():
        plain_name = name.removeprefix("_orig_mod.")  # the prefix is torch.compile's
        if not plain_name.endswith(".attn.bias"):  # the causal mask, saved with older versions of torch
            weights[rename_weight(plain_name, NANOGPT_TO_OURS)] = tensor.detach().float().numpy()
    if np.array_equal(weights["head.weight"], weights["token_embedding.weight"]):
        del weights["head.weight"]
    else:
        config["tie_embeddings"] = False
    return config, weights


def tokenizer_dict(meta: str, vocab_size: int) -> dict[str, Any]:
    """Return the tokenizer of a meta.pkl, or GPT-2's if `meta` is empty, as a dictionary.

    Raises:
        UserError: The file cannot be read, or the vocabulary does not have `vocab_size` tokens.
    """
    if meta:
        tokenizer = read_meta_pickle(Path(meta))
        if tokenizer.vocab_size != vocab_size:
            raise UserError(f"{meta}: {tokenizer.vocab_size:,} characters, but the model has {vocab_size:,} tokens")
        return tokenizer.to_dict()
    if vocab_size not in (GPT2Tokenizer.vocab_size, PADDED_VOCAB_SIZE):
        raise UserError(f"a model of {vocab_size:,} tokens needs its vocabulary; add --meta=.../meta.pkl")
    return {"kind": GPT2Tokenizer.kind}


def read_meta_pickle(path: Path) -> CharTokenizer:
    """Read the tokenizer of a meta.pkl.

    Raises:
        UserError: The file is missing, or not a character vocabulary in code point order.
    """
    try:
        itos = read_plain_pickle(path.read_bytes())["itos"]
        characters = [itos[token] for token in range(len(itos))]
        if not all(isinstance(character, str) and len(character) == 1 for character in characters):
            raise TypeError
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a nanoGPT character vocabulary; nothing in it was executed") from error
    return CharTokenizer("".join(characters))


def read_plain_pickle(data: bytes) -> Any:
    """Read a pickle of dictionaries, text and integers, which consists of a few opcodes.

    Raises:
        ValueError: The pickle has another opcode.
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
                raise ValueError(f"unsupported opcode {name}")
    [result] = stack
    return result


def convert_dataset(folder: Path, settings: ConvertSettings) -> str:
    """Convert a folder with train.bin and val.bin to a dataset; return a message for the user.

    The vocabulary is that of meta.pkl, or GPT-2's if there is no such file.

    Raises:
        UserError: A file is missing, or holds ids that are not in the vocabulary.
    """
    data_dir = Path(settings.data_dir)
    target = dataset_dir(settings.name or folder.resolve().name, data_dir)
    paths = [folder / "train.bin", folder / "val.bin"]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file; run nanoGPT's prepare.py in that folder first")
    meta_pickle = folder / "meta.pkl"
    tokenizer: Tokenizer = read_meta_pickle(meta_pickle) if meta_pickle.exists() else GPT2Tokenizer(data_dir)
    digest = hashlib.sha256()
    with staging_dir(target, overwrite=settings.overwrite) as new:
        load_progress(new, "")  # discards the files of an interrupted preparation of the same name
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
    return f"{target}: {train.tokens:,} training tokens, {val.tokens:,} validation tokens"


def convert_split(path: Path, folder: Path, tokenizer: Tokenizer, digest: Any) -> SplitMeta:
    """Convert a file of 16-bit ids to shards, and update `digest` with its bytes.

    Raises:
        UserError: The file has an odd size or fewer than two ids, or an id is not in the vocabulary.
    """
    writer = ShardWriter(folder, path.stem, tokenizer.vocab_size, shard_tokens=10**8)
    size = path.stat().st_size
    if size % 2 or size < 4:
        raise UserError(f"{path}: {size:,} bytes are not two or more ids of 16 bits")
    character_counts = np.array([count_character_starts(tokenizer.token_bytes(t)) for t in range(tokenizer.vocab_size)])
    characters = 0
    all_ids = np.memmap(path, dtype="<u2", mode="r")
    for start in range(0, len(all_ids), CHUNK_TOKENS):
        ids = all_ids[start : start + CHUNK_TOKENS]
        largest = int(ids.max())
        if largest >= tokenizer.vocab_size:
            raise UserError(f"{path}: id {largest} is not in the vocabulary of {tokenizer.vocab_size:,} tokens")
        digest.update(ids.tobytes())
        characters += int(character_counts[ids].sum())
        writer.write(ids.astype(writer.dtype))
    writer.finish()
    return writer.meta(characters)


def count_character_starts(utf8: bytes) -> int:
    """Return the number of characters that start in some UTF-8 bytes, which may begin or end within a character."""
    return sum(byte & 0xC0 != 0x80 for byte in utf8)


NANOGPT_DEFAULTS: dict[str, Any] = {
    "out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "dataset": "openwebtext",
    "gradient_accumulation_steps": 40, "batch_size": 12, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768,
    "dropout": 0.0, "bias": False, "learning_rate": 6e-4, "max_iters": 600_000, "weight_decay": 0.1, "beta1": 0.9,
    "beta2": 0.95, "grad_clip": 1.0, "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600_000, "min_lr": 6e-5,
}  # fmt: skip
"""Defaults of nanoGPT's train.py that affect training."""
OTHER_SETTINGS = ("device", "dtype", "compile", "wandb_log", "wandb_project")
"""Other settings of nanoGPT. Our defaults apply to those that a config does not set."""
SPECIAL_SETTINGS = {"eval_iters", "decay_lr", "lr_decay_iters"}
"""Settings of nanoGPT that need more than another name."""
SETTING_NAMES = {
    key: NANOGPT_NAMES.get(key, key) for key in [*NANOGPT_DEFAULTS, *OTHER_SETTINGS] if key not in SPECIAL_SETTINGS
}
"""Names of settings in nanoGPT and here."""
OMITTED_SETTINGS = {
    "always_save_checkpoint": "best and last are always saved",
    "eval_only": "use --eval_only",
    "init_from": "use --resume to continue a run, or --init_from=RUN to start from its weights",
}
"""Settings that are not converted, and why."""
OPERATIONS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}  # fmt: skip


def convert_config(path: Path, settings: ConvertSettings) -> str:
    """Convert a Python config to a TOML file for the same training; return a message for the user.

    Raises:
        UserError: The file is not a list of plain settings.
        UsageError: A value is not allowed here.
    """
    out = output_path(settings, f"config/{path.stem}.toml")
    values, omitted = read_python_config(path)
    values = NANOGPT_DEFAULTS | values
    ours = {SETTING_NAMES[key]: value for key, value in values.items() if key in SETTING_NAMES}
    eval_sizes = [check_number(values[key], f"{path}: {key}") for key in ("eval_iters", "batch_size", "block_size")]
    ours |= {"eval_tokens": math.prod(eval_sizes), "schedule": "cosine", "activation": "gelu_erf"}
    if not values["decay_lr"]:  # nanoGPT then has no warm-up either
        ours |= {"schedule": "constant", "min_lr": values["learning_rate"], "warmup_steps": 0}
    elif values["lr_decay_iters"] != values["max_iters"]:
        omitted["lr_decay_iters"] = "the learning rate falls until max_steps here"
    for key, value in ours.items():
        if TrainSettings.model_fields[key].annotation is float and isinstance(value, int):
            ours[key] = float(check_number(value, f"{path}: {key}"))
    resolve(TrainSettings, [(str(path), ours)])
    notes = "".join(f"# not converted: {key}: {reason}\n" for key, reason in omitted.items())
    header = f"# Converted from nanoGPT's {path.name}, including nanoGPT's defaults.\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, f"{header}{notes}{tomli_w.dumps(ours)}".encode())
    return f"{out}: {len(ours)} settings; check them, then train: {command('train.py', out)}"


def read_python_config(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings of a Python config, and for each other key the reason why it is not converted.

    Raises:
        UserError: The file is missing, is not Python, or has statements other than settings.
    """
    values: dict[str, Any] = {}
    omitted: dict[str, str] = {}
    known = SETTING_NAMES.keys() | SPECIAL_SETTINGS
    try:
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=key)], value=value) if key in known:
                    values[key] = eval_constant(value, values, f"{path}: line {statement.lineno}")
                case ast.Assign(targets=[ast.Name(id=key)]):
                    omitted[key] = OMITTED_SETTINGS.get(key, "there is no such setting")
                case ast.Expr(value=ast.Constant()) | ast.Import():
                    pass
                case _:
                    raise UserError(f"{path}: line {statement.lineno} is not a setting; write it as key = value")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (ValueError, SyntaxError) as error:
        raise UserError(f"{path}: not a Python file: {str(error).splitlines()[0]}") from error
    except (RecursionError, MemoryError) as error:  # MemoryError is the parser's stack overflow
        raise UserError(f"{path}: an expression is nested too deeply; write the value itself") from error
    return values, omitted


def eval_constant(node: ast.expr, values: dict[str, Any], location: str) -> Any:
    """Return the value of a constant, of an earlier setting, or of arithmetic with them.

    Raises:
        UserError: The expression is anything else; nothing is executed.
    """
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.Name(id=name) if name in values:
            return values[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -check_number(eval_constant(operand, values, location), location)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            operands = (check_number(eval_constant(side, values, location), location) for side in (left, right))
            try:
                return OPERATIONS[type(op)](*operands)
            except ArithmeticError as error:
                raise UserError(f"{location}: {error}") from error
    raise UserError(f"{location}: neither a number, text nor arithmetic with numbers; write the value itself")


def check_number(value: Any, location: str) -> int | float:
    """Return a number unchanged.

    Raises:
        UserError: The value is not a number, or too large to compute with.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 10**18:
        raise UserError(f"{location}: {str(value)[:50]} is not a number within 10^18")
    return value
