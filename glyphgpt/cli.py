"""The command line: read settings from TOML files and flags, print help, and format commands for messages.

Settings come from the defaults, then from files from left to right, then from flags; later values win. Nothing is
executed, and all problems are reported at once.
"""

import argparse
import difflib
import inspect
import os.path
import re
import reprlib
import shlex
import tomllib
import types
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from glyphgpt.errors import UsageError, shorten
from glyphgpt.files import BEST, CONFIG, LAST
from glyphgpt.settings import Mode, Settings

S = TypeVar("S", bound=Settings)
Values = dict[str, Any]

COMMAND_LINE = "command line"
ROOT = Path(__file__).parent.parent
"""The folder of the scripts."""
LARGE_BOUND = 10**6
"""Bounds of this size only keep the arithmetic in range; help and messages do not show them."""

NANOGPT_NAMES = {
    "always_save_checkpoint": "save_every",
    "eval_interval": "eval_every",
    "eval_iters": "eval_tokens",
    "log_interval": "log_every",
    "lr_decay_iters": "max_steps",
    "max_iters": "max_steps",
    "start": "prompt",
    "wandb_log": "wandb",
    "warmup_iters": "warmup_steps",
}
"""nanoGPT's names of settings that have other names here."""


def read_words(settings_class: type[Settings], words: Sequence[str]) -> tuple[list[str], Values]:
    """Return the plain words and the flags of a command line.

    `--key=value` and `--key value` are the same, a dash in a key is an underscore, and a switch needs no value. Values
    stay text, or None if one is missing; a setting of several values collects those of repeated flags. (argparse cannot
    do this: for `--resume FOLDER` and `--compile False` it would need to know which words are values of a switch.)
    """
    plain: list[str] = []
    flags: Values = {}
    rest = deque(words)
    while rest:
        word = rest.popleft()
        if not word.startswith("--") or word == "--":
            plain.append(word)
            continue
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        field = settings_class.model_fields.get(key)
        value: str | None = text if equals else None
        if value is None and rest and is_value(rest[0], field):
            value = rest.popleft()
        if value is None and is_switch(field):
            value = "true"
        if field and get_origin(field.annotation) is tuple:
            flags.setdefault(key, []).append(value)
        else:
            flags[key] = value
    return plain, flags


def read_toml(path: str) -> Values:
    """Read one TOML file of settings.

    Raises:
        UsageError: The file is missing, unreadable, or not TOML. The error for a Python config names its converter.
    """
    if path.endswith(".py"):
        words = ["nanogpt-config", path, f"--out={Path(path).with_suffix('.toml')}"]
        convert = shlex.join(["python", "-m", "glyphgpt.convert", *words])
        raise UsageError(f"{path}: a Python config is never executed; convert one of nanoGPT's: {convert}")
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))  # PowerShell writes a byte order mark
    except FileNotFoundError as error:
        hint = f"; did you mean {path}.toml?" if is_path(f"{path}.toml") else ""
        raise UsageError(f"{path}: no such file of settings, nor folder of a run{hint}") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot read this settings file: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        if path.endswith(".safetensors"):
            raise UsageError(f"{path}: name the run's folder instead: {Path(path).parent}") from error
        prepare = command("prepare.py", path)
        remedy = "" if path.endswith(".toml") else f"; if it is a text to train on, prepare it first: {prepare}"
        raise UsageError(f"{path}: not a TOML file of settings: {error}{remedy}") from error


def read_config(word: str, *, resume: bool) -> tuple[str, Values]:
    """Read a settings file, or the config.toml of a run's folder; return its path and its values.

    A config.toml beside a checkpoint, or any config.toml if `resume`, belongs to a run. Its out_dir becomes its folder,
    which may have been moved or copied.

    Raises:
        UsageError: The file cannot be read, or the folder holds no run.
    """
    path = Path(word)
    try:
        is_folder = path.is_dir()
    except OSError as error:  # for example because the name is too long
        raise UsageError(f"{word}: cannot read this settings file: {error.strerror}") from error
    if is_folder:
        path /= CONFIG
        if not path.exists():
            raise UsageError(f"{word}: not the folder of a run; it has no {CONFIG}")
    values = read_toml(str(path))
    if path.name == CONFIG and (resume or any((path.parent / name).exists() for name in (BEST, LAST))):
        values = relocate(values, path.parent)
    return str(path), values


def relocate(values: Values, folder: Path) -> Values:
    """Return the settings of the run that is in `folder` now.

    If data_dir no longer exists, it is looked up at the same path relative to the run: both may have moved.
    """
    data_dir, out_dir = values.get("data_dir"), values.get("out_dir")
    if isinstance(data_dir, str) and isinstance(out_dir, str) and not Path(data_dir).exists():
        moved = os.path.normpath(folder / os.path.relpath(data_dir, out_dir))
        if Path(moved).exists():
            values = {**values, "data_dir": moved}
    return {**values, "out_dir": str(folder)}


def unescape(text: str) -> str:
    r"""Replace the escapes \n, \r, \t and \\, which shells do not interpret.

    >>> unescape(r"one\ntwo\\three")
    'one\ntwo\\three'
    """
    return re.sub(r"\\([\\nrt])", lambda escape: {"n": "\n", "r": "\r", "t": "\t"}.get(escape[1], "\\"), text)


def command(script: str, *words: str | Path) -> str:
    """Return a shell command that runs one of the scripts from the working directory.

    >>> command("sample.py", "out/my run")
    "python sample.py 'out/my run'"
    """
    return shlex.join(["python", from_here(ROOT / script), *map(str, words)])


def count(number: float, noun: str) -> str:
    """Return a number with its noun, which gets an s unless the number is 1.

    >>> count(1, "thread"), count(0.5, "minute")
    ('1 thread', '0.5 minutes')
    """
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def is_path(text: str) -> bool:
    """Return whether a text is the path of something that exists."""
    return os.path.exists(text)  # noqa: PTH110  (Path.exists raises an error for a text that is too long)


def from_here(path: Path) -> str:
    """Return a path, made relative to the working directory if it is inside that directory."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def resolve(settings_class: type[S], sources: Sequence[tuple[str, Values]]) -> S:
    """Merge (name, values) sources into settings; later sources win.

    Raises:
        UsageError: Some values are not valid; one line per problem, with its source.
    """
    problems: list[str] = []
    merged: Values = {}
    for source, given in sources:
        values = {shorten(key): value for key, value in given.items()}
        if source != COMMAND_LINE:  # a file describes a run, not whether to resume or replace it
            modes = [key for key in values if key in Mode.model_fields]
            problems += [f"{source}: '{key}' is for the command line only: --{key}" for key in modes]
        try:  # flags are text to convert; TOML values have types, which must match
            checked = settings_class.model_validate(values, strict=source != COMMAND_LINE)
            merged.update({key: getattr(checked, key) for key in values})
        except ValidationError as error:
            bad_keys = dict.fromkeys(str(problem["loc"][0]) for problem in error.errors())
            problems += [explain(settings_class, source, key, values[key]) for key in bad_keys]
    if not problems:
        settings = settings_class.model_validate(merged)
        problems += settings.conflicts()
    if problems:
        raise UsageError("\n".join(problems))
    return settings


def explain(settings_class: type[Settings], source: str, key: str, value: object) -> str:
    """Return one line that says why a source's value is not valid, and what would be."""
    name = f"--{key}" if source == COMMAND_LINE else f"'{key}'"
    field = settings_class.model_fields.get(key)
    if field is None:
        renamed = NANOGPT_NAMES.get(key)
        if renamed in settings_class.model_fields:
            return f"{source}: unknown key {name}; nanoGPT's '{key}' is '{renamed}' here"
        close = difflib.get_close_matches(key, settings_class.model_fields, n=1)
        return f"{source}: unknown key {name}; " + (
            f"did you mean '{close[0]}'?" if close else "--help lists every setting"
        )
    if value is None or (isinstance(value, list) and None in value):
        return f"{source}: {name} needs a value: {expected(field)}"
    wanted = "printable text" if field.annotation is str and isinstance(value, str) else expected(field)
    digits = isinstance(value, str) and value.isdecimal() and len(value) >= len(str(LARGE_BOUND))
    large = digits or (isinstance(value, int) and abs(value) > LARGE_BOUND)  # Python does not print all numbers
    shown = "such a large number" if large else reprlib.repr(value)
    remedy = f"; write {name} {value}" if is_switch(field) and is_path(str(value)) else ""
    return f"{source}: {name} must be {wanted}, not {shown}{remedy}"


def is_switch(field: FieldInfo | None) -> bool:
    """Return whether a setting needs no value on the command line."""
    return field is not None and bool in {field.annotation, *get_args(field.annotation)}


def is_value(word: str, field: FieldInfo | None) -> bool:
    """Return whether the word after `--key` is its value. After a switch, it is one only if it is valid."""
    if field is None or not is_switch(field):
        return not word.startswith("--")
    annotation: Any = field.annotation
    try:
        TypeAdapter(annotation).validate_python(word)
    except ValidationError:
        return False
    return True


def bounds(field: FieldInfo) -> list[str]:
    """Return a setting's bounds in words, as in ["at least 0", "below 1"], without very large ones."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    of_choices = [choice for choice in get_args(field.annotation) if get_origin(choice) is Annotated]
    nested = [bound for choice in of_choices for info in choice.__metadata__ for bound in info.metadata]
    return [
        f"{phrase} {getattr(bound, name)}"
        for bound in (*field.metadata, *nested)
        for name, phrase in words.items()
        if hasattr(bound, name) and getattr(bound, name) < LARGE_BOUND
    ]


def expected(field: FieldInfo) -> str:
    """Return which values a setting accepts, as in "a whole number, at least 1"."""
    return ", ".join([type_name(field.annotation), *bounds(field)])


def type_name(annotation: Any) -> str:
    """Return a setting's type in words."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return type_name(get_args(annotation)[0])
    if origin is Literal:
        return " or ".join(repr(choice) for choice in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(choice) for choice in get_args(annotation))
    if origin is tuple:
        return type_name(get_args(annotation)[0])
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation]


def groups(settings_class: type[Settings]) -> Iterator[tuple[str, Mapping[str, FieldInfo]]]:
    """Yield each heading of a settings class in the help, and its settings by name."""
    for group in reversed(settings_class.__mro__):
        own = [key for key in inspect.get_annotations(group) if key in settings_class.model_fields]
        if own:
            yield (group.__doc__ or "").strip(), {key: settings_class.model_fields[key] for key in own}


def default_text(field: FieldInfo) -> str:
    """Return a default as it is written on the command line."""
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def metavar(annotation: Any) -> str:
    """Return a setting's type as help shows it: INT, or the choices."""
    if get_origin(annotation) is Annotated:
        return metavar(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return "|".join(metavar(choice) for choice in get_args(annotation))
    return {int: "INT", float: "NUMBER", bool: "true|false"}.get(annotation, "TEXT")


def help_text(settings_class: type[Settings], usage: str, description: str) -> str:
    """Return a script's help: every setting with its type, meaning, bounds and default."""
    parser = argparse.ArgumentParser(
        usage=usage, description=description, add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for heading, fields in groups(settings_class):
        section = parser.add_argument_group(heading)
        for key, field in fields.items():
            meaning = " ".join((field.description or "").split())
            facts = bounds(field) + [f"default {default_text(field)}"] * (field.default not in ("", ()))
            text = f"{meaning} ({'; '.join(facts)})" if facts else meaning
            section.add_argument(f"--{key}", metavar=metavar(field.annotation), help=text.replace("%", "%%"))
    return parser.format_help()


def parse(
    settings_class: type[S], words: Sequence[str], usage: str, description: str, *, files: bool
) -> tuple[S, list[str]]:
    """Return the settings and the plain words of a command line, without the script's name.

    If `files` is true, the plain words are TOML files of settings or folders of runs. `-h` or `--help` prints the help
    and exits.

    Raises:
        UsageError: The command line or a file is not valid; one line per problem.
        SystemExit: The help was printed.
    """
    if {"-h", "--help"} & set(words):
        print(help_text(settings_class, usage, description), flush=True)
        raise SystemExit(0)
    plain, flags = read_words(settings_class, words)
    plain = [os.path.expanduser(word) for word in plain]  # noqa: PTH111  (Path would change words that are not paths)
    resume = str(flags.get("resume", "false")).lower() not in ("false", "f", "no", "n", "off", "0")
    sources = [read_config(word, resume=resume) for word in plain] if files else []
    return resolve(settings_class, [*sources, (COMMAND_LINE, flags)]), plain
