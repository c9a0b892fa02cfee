"""Files and flags become typed settings, or one line for each problem."""

import os
import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli_w
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from glyphgpt.cli import NANOGPT_NAMES, explain, help_text, metavar, parse, resolve
from glyphgpt.errors import UsageError
from glyphgpt.settings import (
    ConvertSettings,
    Mode,
    PlotSettings,
    PrepareSettings,
    ReportSettings,
    SampleSettings,
    Settings,
    TrainSettings,
    TranslateSettings,
)

CLASSES: list[type[Settings]] = [TrainSettings, SampleSettings, PrepareSettings]


def read(settings_class: type[Settings], *words: str) -> Any:
    return parse(settings_class, words, "usage", "description", files=settings_class is TrainSettings)[0]


def problems(settings_class: type[Settings], *words: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        read(settings_class, *words)
    return str(caught.value).splitlines()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings")


def write_toml(folder: Path, text: str, name: str = "some.toml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def test_later_files_override_earlier_ones_and_flags_override_files(folder: Path) -> None:
    first = write_toml(folder, "n_layer = 5\nn_head = 5\nn_embd = 500\n", "first.toml")
    second = write_toml(folder, "n_layer = 6\nn_embd = 600\n", "second.toml")
    settings = read(TrainSettings, "--n_layer=7", first, second)
    assert (settings.n_layer, settings.n_embd, settings.n_head, settings.block_size) == (7, 600, 5, 64)


@pytest.mark.parametrize(
    "words",
    [["--n_layer=7"], ["--n_layer", "7"], ["--n-layer=7"], ["--n-layer", "7"], ["--n_layer=3", "--n_layer=7"]],
    ids=" ".join,
)
def test_flag_syntax(words: list[str]) -> None:
    assert read(TrainSettings, *words).n_layer == 7


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--resume"], True),
        (["--resume=True"], True),
        (["--resume=true"], True),
        (["--resume", "true"], True),
        (["--resume=False"], False),
        (["--resume", "False"], False),
        (["--resume", "--seed=1"], True),
    ],
    ids=str,
)
def test_switch_syntax(words: list[str], value: bool) -> None:
    assert read(TrainSettings, *words).resume is value


@pytest.mark.parametrize(
    ("words", "value"),
    [([], "auto"), (["--compile", "auto"], "auto"), (["--compile"], True), (["--compile", "false"], False)],
    ids=str,
)
def test_compile_accepts_auto_and_works_as_a_switch(words: list[str], value: object) -> None:
    assert read(TrainSettings, *words).compile == value


@pytest.mark.parametrize("switch", ["--resume", "--compile"])
def test_file_after_a_bare_switch_is_not_its_value(folder: Path, switch: str) -> None:
    file = write_toml(folder, "n_layer = 9")
    settings = read(TrainSettings, switch, file)
    assert (settings.model_dump()[switch[2:]], settings.n_layer) == (True, 9)


def test_stop_may_be_repeated() -> None:
    assert read(SampleSettings, "--stop=a=b", "--stop", "\n", "--stop=").stop == ("a=b", "\n", "")


def test_values_may_start_with_a_dash_or_contain_an_equals_sign() -> None:
    assert read(SampleSettings, "--prompt", "- a=b").prompt == "- a=b"
    assert read(SampleSettings, "--prompt=--resume").prompt == "--resume"


def test_plain_words_are_returned_in_order() -> None:
    assert parse(PrepareSettings, ["a.txt", "--name", "b", "-", "c"], "", "", files=False)[1] == ["a.txt", "-", "c"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n_layers=3"], "unknown key --n_layers; did you mean 'n_layer'?"),
        (["--n-layers=3"], "unknown key --n_layers; did you mean 'n_layer'?"),
        (["--zzz"], "unknown key --zzz; --help lists every setting"),
        (["--=3"], "unknown key --; --help lists every setting"),
        (["--max_iters=3"], "unknown key --max_iters; nanoGPT's 'max_iters' is 'max_steps' here"),
        (["--eval_iters", "3"], "unknown key --eval_iters; nanoGPT's 'eval_iters' is 'eval_tokens' here"),
        (["--n_layer=six"], "--n_layer must be a whole number, at least 1, not 'six'"),
        (["--n_layer=2.5"], "--n_layer must be a whole number, at least 1, not '2.5'"),
        (["--n_layer=0"], "--n_layer must be a whole number, at least 1, not '0'"),
        (["--n_layer="], "--n_layer must be a whole number, at least 1, not ''"),
        (["--dropout=1"], "--dropout must be a number, at least 0, below 1, not '1'"),
        (["--learning_rate=0"], "--learning_rate must be a number, above 0, not '0'"),
        (["--learning_rate=nan"], "--learning_rate must be a number, above 0, not 'nan'"),
        (["--min_lr=inf"], "--min_lr must be a number, at least 0, not 'inf'"),
        (["--resume=perhaps"], "--resume must be true or false, not 'perhaps'"),
        (["--compile=perhaps"], "--compile must be 'auto' or true or false, not 'perhaps'"),
        (["--eval_tokens=all"], "--eval_tokens must be 'auto' or a whole number, at least 0, not 'all'"),
        (["--eval_tokens=-1"], "--eval_tokens must be 'auto' or a whole number, at least 0, not '-1'"),
        (["--position=Rotary"], "--position must be 'learned' or 'sinusoidal' or 'rotary', not 'Rotary'"),
        (["--n_layer"], "--n_layer needs a value: a whole number, at least 1"),
        (["--n_layer", "--resume"], "--n_layer needs a value: a whole number, at least 1"),
        (["--dataset"], "--dataset needs a value: text"),
    ],
    ids=str,
)
def test_messages_for_wrong_flags(words: list[str], message: str) -> None:
    assert problems(TrainSettings, *words) == [f"command line: {message}"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--start=x"], "unknown key --start; nanoGPT's 'start' is 'prompt' here"),
        (["--top_p=0"], "--top_p must be a number, above 0, at most 1, not '0'"),
        (["--stop"], "--stop needs a value: text"),
        (["--stop=a", "--stop"], "--stop needs a value: text"),
    ],
    ids=str,
)
def test_messages_for_wrong_flags_of_sampling(words: list[str], message: str) -> None:
    assert problems(SampleSettings, *words) == [f"command line: {message}"]


@pytest.mark.parametrize("settings_class", [TrainSettings, SampleSettings])
def test_seed_must_fit_torchs_generator(settings_class: type[Settings]) -> None:
    assert read(settings_class, f"--seed={2**63 - 1}").seed == 2**63 - 1
    [line] = problems(settings_class, f"--seed={2**63}")
    assert line.startswith("command line: --seed must be a whole number, at least 0")


def test_every_nanogpt_name_maps_to_a_setting() -> None:
    assert set(NANOGPT_NAMES.values()) <= {*TrainSettings.model_fields, *SampleSettings.model_fields}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('n_layer = "6"', "'n_layer' must be a whole number, at least 1, not '6'"),
        ("n_layer = 6.0", "'n_layer' must be a whole number, at least 1, not 6.0"),
        ("n_layer = true", "'n_layer' must be a whole number, at least 1, not True"),
        ("n_layer = -1", "'n_layer' must be a whole number, at least 1, not -1"),
        ('dropout = "0.1"', "'dropout' must be a number, at least 0, below 1, not '0.1'"),
        ("dropout = inf", "'dropout' must be a number, at least 0, below 1, not inf"),
        ("bias = 1", "'bias' must be true or false, not 1"),
        ('bias = "true"', "'bias' must be true or false, not 'true'"),
        ('compile = "true"', "'compile' must be 'auto' or true or false, not 'true'"),
        ("dataset = 3", "'dataset' must be text, not 3"),
        ("n_layers = 6", "unknown key 'n_layers'; did you mean 'n_layer'?"),
        ("[model]\nn_layer = 6", "unknown key 'model'; --help lists every setting"),
        ("overwrite = true", "'overwrite' is for the command line only: --overwrite"),
        ("warmup_iters = 6", "unknown key 'warmup_iters'; nanoGPT's 'warmup_iters' is 'warmup_steps' here"),
    ],
    ids=str,
)
def test_messages_for_wrong_values_in_a_file(folder: Path, text: str, message: str) -> None:
    file = write_toml(folder, text)
    assert problems(TrainSettings, file) == [f"{file}: {message}"]


def test_integer_is_accepted_as_a_float(folder: Path) -> None:
    value = read(TrainSettings, write_toml(folder, "learning_rate = 1")).learning_rate
    assert isinstance(value, float)
    assert value == 1.0


def test_all_problems_are_reported_with_their_sources(folder: Path) -> None:
    first = write_toml(folder, "n_layers = 6\ndropout = 2.0", "first.toml")
    second = write_toml(folder, 'batch_size = "12"', "second.toml")
    assert sorted(problems(TrainSettings, first, second, "--patience=x", "--eval_interval=3", "--dtype")) == sorted(
        [
            f"{first}: 'dropout' must be a number, at least 0, below 1, not 2.0",
            f"{first}: unknown key 'n_layers'; did you mean 'n_layer'?",
            f"{second}: 'batch_size' must be a whole number, at least 1, not '12'",
            "command line: --patience must be a whole number, at least 0, not 'x'",
            "command line: unknown key --eval_interval; nanoGPT's 'eval_interval' is 'eval_every' here",
            "command line: --dtype needs a value: 'auto' or 'float32' or 'bfloat16' or 'float16'",
        ]
    )


@pytest.mark.parametrize("text", ["n_layer 6", "n_layer = six", "a = 1\na = 2", "n_layer = 6 n_head = 2"])
def test_file_that_is_not_toml(folder: Path, text: str) -> None:
    file = write_toml(folder, text)
    with pytest.raises(tomllib.TOMLDecodeError) as reason:
        tomllib.loads(text)
    assert problems(TrainSettings, file) == [f"{file}: not a TOML file of settings: {reason.value}"]


def test_file_that_is_not_utf_8(folder: Path) -> None:
    file = folder / "latin.toml"
    file.write_bytes(b'dataset = "caf\xe9"')
    [line] = problems(TrainSettings, str(file))
    assert line.startswith(f"{file}: not a TOML file of settings: 'utf-8' codec can't decode byte 0xe9 in position 14")


@pytest.mark.parametrize(
    "text",
    ["n_layer = " + "[" * 5000 + "]" * 5000, "n_layer = " + "9" * 5000, "dropout = 0x" + "f" * 5000],
    ids=["deep nesting", "many digits", "many hexadecimal digits"],
)
def test_extreme_values_in_a_file_are_rejected(folder: Path, text: str) -> None:
    file = write_toml(folder, text)
    assert problems(TrainSettings, file)[0].startswith(f"{file}: ")


def test_missing_file_and_folder_that_is_not_a_run(folder: Path) -> None:
    missing = folder / "missing.toml"
    assert problems(TrainSettings, str(missing)) == [f"{missing}: no such file of settings, nor folder of a run"]
    assert problems(TrainSettings, "9" * 5000) == [f"{'9' * 5000}: cannot read this settings file: File name too long"]
    assert problems(TrainSettings, str(folder)) == [f"{folder}: not the folder of a run; it has no config.toml"]


def test_a_word_that_is_something_else_is_recognized(folder: Path) -> None:
    text, checkpoint = folder / "my.txt", folder / "last.safetensors"
    text.write_text("a text to train on", encoding="utf-8")
    checkpoint.write_bytes(b"\xe0")
    write_toml(folder, "n_layer = 1", "quick.toml")
    [line] = problems(TrainSettings, str(text))
    assert line.endswith(f"; if it is a text to train on, prepare it first: python prepare.py {text}")
    assert problems(TrainSettings, str(checkpoint)) == [f"{checkpoint}: name the run's folder instead: {folder}"]
    assert problems(TrainSettings, str(folder / "quick")) == [
        f"{folder / 'quick'}: no such file of settings, nor folder of a run; did you mean {folder / 'quick.toml'}?"
    ]
    [line] = problems(TrainSettings, f"--resume={folder}")
    assert line.startswith("command line: --resume must be true or false, not ")
    assert line.endswith(f"; write --resume {folder}")


def test_python_config_is_never_executed(folder: Path) -> None:
    marker = folder / "executed"
    config = write_toml(folder, f"open({str(marker)!r}, 'w')\nn_layer = 6\n", "config.py")
    assert problems(TrainSettings, config) == [
        f"{config}: a Python config is never executed; convert one of nanoGPT's: python -m glyphgpt.convert "
        f"nanogpt-config {config} --out={folder / 'config.toml'}"
    ]
    assert not marker.exists()


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--n_embd=10", "--n_head=4"], ["n_embd = 10 is not a multiple of n_head = 4"]),
        (
            ["--n_embd=12", "--n_head=4", "--position=rotary"],
            ["position = 'rotary' needs an even head size; n_embd / n_head is 3"],
        ),
        (
            ["--n_embd=9", "--n_head=3", "--position=sinusoidal"],
            ["position = 'sinusoidal' needs an even n_embd, not 9"],
        ),
        (["--min_lr=0.1", "--learning_rate=0.01"], ["min_lr = 0.1 is above learning_rate = 0.01"]),
        (["--init_from=resume"], ["init_from = 'resume' is nanoGPT's; use --resume here"]),
        (["--resume", "--overwrite"], ["resume and overwrite contradict each other; choose one"]),
        (
            ["--n_head=3", "--min_lr=2"],
            ["n_embd = 128 is not a multiple of n_head = 3", "min_lr = 2.0 is above learning_rate = 0.001"],
        ),
    ],
    ids=str,
)
def test_conflicting_training_settings(words: list[str], messages: list[str]) -> None:
    assert problems(TrainSettings, *words) == messages


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt=a", "--prompt_file=b"], "prompt and prompt_file contradict each other; choose one"),
        (["--interactive", "--num_samples=2"], "interactive shows one sample at a time; leave num_samples out"),
        (
            ["--interactive", "--prompt_file=-"],
            "interactive reads standard input; pass the prompt with --prompt",
        ),
        (["--interactive", "--score=a"], "score and interactive contradict each other; choose one"),
    ],
    ids=str,
)
def test_conflicting_sampling_settings(words: list[str], message: str) -> None:
    assert problems(SampleSettings, *words) == [message]


def test_conflicts_between_sources_are_detected(folder: Path) -> None:
    file = write_toml(folder, "n_head = 3")
    assert read(TrainSettings, file, "--n_embd=9").n_embd == 9
    assert problems(TrainSettings, file, "--n_embd=10") == ["n_embd = 10 is not a multiple of n_head = 3"]


@hypothesis_settings(deadline=None, max_examples=40)
@given(
    st.fixed_dictionaries(
        {
            "dataset": st.text(st.characters(exclude_categories=["Cc", "Cs"])),
            "n_layer": st.integers(1, 10**6),
            "learning_rate": st.floats(1e-3, 1e30, allow_nan=False),
            "dropout": st.floats(0, 1, exclude_max=True),
            "bias": st.booleans(),
            "compile": st.sampled_from(["auto", True, False]),
            "position": st.sampled_from(["learned", "rotary"]),
        }
    )
)
def test_saved_settings_can_be_read_again(folder: Path, values: dict[str, Any]) -> None:
    settings = TrainSettings.model_validate(values)
    saved = write_toml(folder, tomli_w.dumps(settings.model_dump(exclude=set(Mode.model_fields))))
    assert read(TrainSettings, saved) == settings


@pytest.mark.parametrize("settings_class", CLASSES)
def test_help_shows_every_setting_with_its_meaning_and_default(settings_class: type[Settings]) -> None:
    entries = re.split(r"^  --", help_text(settings_class, "usage", "description"), flags=re.MULTILINE)[1:]
    shown = {entry.split()[0]: "".join(entry.split()) for entry in entries}
    assert shown.keys() == settings_class.model_fields.keys()
    for key, field in settings_class.model_fields.items():
        assert field.description, f"{key} has no docstring"
        assert "".join(field.description.split()) in shown[key]
        if field.default not in ("", ()):
            default = str(field.default).lower() if isinstance(field.default, bool) else field.default
            assert f"default{default})" in shown[key]


@pytest.mark.parametrize("settings_class", CLASSES)
def test_every_setting_has_a_description_of_its_values(settings_class: type[Settings]) -> None:
    for key, field in settings_class.model_fields.items():
        line = explain(settings_class, "command line", key, None)
        assert line.startswith(f"command line: --{key} needs a value: ")
        assert ("TEXT" in metavar(field.annotation)) == (str in (field.annotation, *get_args(field.annotation)))


def test_help_shows_types_bounds_and_headings() -> None:
    shown = " ".join(help_text(TrainSettings, "usage", "description").split())
    assert "--n_layer INT Number of blocks. (at least 1; default 4)" in shown
    assert "--compile auto|true|false Compile the model with torch.compile" in shown
    assert "--eval_tokens auto|INT Tokens of each evaluation" in shown
    assert "(at least 0; default auto)" in shown
    assert "(at least 0; below 1; default 0.0)" in shown
    for heading in (
        "Data and results:",
        "The network:",
        "Optimization:",
        "Hardware:",
        "Mode (on the command line only):",
    ):
        assert heading in shown


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["--n_layers=3", "--help"]], ids=" ".join)
def test_help_is_shown_before_any_check(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        read(TrainSettings, *words)
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith("usage: usage\n\ndescription\n")


def as_argument(word: bytes) -> str:
    """Return bytes as Python receives them in sys.argv."""
    return os.fsdecode(word.replace(b"\0", b""))


KEYS = st.sampled_from(sorted({key for each in CLASSES for key in each.model_fields} | NANOGPT_NAMES.keys()))
WORDS = st.one_of(
    st.binary(max_size=12).map(as_argument),
    st.builds("--{}".format, KEYS),
    st.builds("--{}={}".format, KEYS, st.binary(max_size=12).map(as_argument)),
    st.builds("--{}".format, st.binary(max_size=12).map(as_argument)),
    st.sampled_from(["-", "--", "--=", "-h", "true", "auto", "0", "1e3", ".py", "x/.py", "--stop"]),
)


@hypothesis_settings(deadline=None, max_examples=150)
@given(st.sampled_from(CLASSES), st.lists(WORDS, max_size=5))
@example(TrainSettings, ["--\udcff=1"])
@example(SampleSettings, ["--stop", "--stop"])
def test_any_command_line_is_accepted_or_a_usage_error(settings_class: type[Settings], words: list[str]) -> None:
    try:
        assert isinstance(read(settings_class, *words), settings_class)
    except SystemExit as error:
        assert error.code == 0
        assert {"-h", "--help"} & set(words)
    except UsageError as error:
        assert str(error)


TOML = st.one_of(
    st.text(max_size=40),
    st.builds("{} = {}".format, KEYS, st.text(max_size=12)),
    st.builds("{} = {}".format, KEYS, st.sampled_from(["{}", "[]", "[[1]]", "1979-05-27", "07:32:00", "nan", "''"])),
)


@hypothesis_settings(deadline=None, max_examples=150)
@given(text=TOML)
def test_any_file_is_accepted_or_a_usage_error(folder: Path, text: str) -> None:
    file = write_toml(folder, text)
    try:
        assert isinstance(read(TrainSettings, file), TrainSettings)
    except UsageError as error:
        assert str(error)


@pytest.mark.parametrize("name", ["a\0b", "two\nlines", "\x1b[31m", "\udcff"])
def test_unprintable_text_is_rejected(name: str) -> None:
    with pytest.raises(UsageError, match=r"^x\.toml: 'out_dir' must be printable text, not [^\n]*$"):
        resolve(TrainSettings, [("x.toml", {"out_dir": name})])


@pytest.mark.parametrize("key", ["n_layer", "n_embd", "batch_size", "max_steps", "ngram_rows", "eval_every"])
def test_huge_sizes_are_rejected(key: str) -> None:
    with pytest.raises(UsageError, match=rf"--{key} must be a whole number, at least [01], not such a large number$"):
        resolve(TrainSettings, [("command line", {key: "9" * 30})])


def path_settings() -> list[tuple[type[Settings], str]]:
    """Return every setting of every script that names a file or folder."""
    classes = (TrainSettings, SampleSettings, PrepareSettings, ConvertSettings, PlotSettings, ReportSettings)
    words = ("dir", "out", "file", "meta", "reference", "init_from", "score", "dataset", "vocabulary")
    return [
        (settings_class, key)
        for settings_class in (*classes, TranslateSettings)
        for key, field in settings_class.model_fields.items()
        if field.annotation is str and any(word in key for word in words) and key != "dropout"
    ]


@pytest.mark.parametrize(("settings_class", "key"), path_settings())
def test_tilde_is_expanded_in_every_path(
    settings_class: type[Settings], key: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/jane")
    name, other_flags = "x", []
    if key == "out" and settings_class is SampleSettings:
        name, other_flags = "x.png", ["--attention=text"]
    assert getattr(read(settings_class, f"--{key}=~/{name}", *other_flags), key) == f"/home/jane/{name}"
    if settings_class is TrainSettings:
        assert getattr(read(settings_class, write_toml(folder, f'{key} = "~/x"')), key) == "/home/jane/x"
    assert parse(settings_class, ["~/a/*.txt"], "", "", files=False)[1] == ["/home/jane/a/*.txt"]


def test_settings_file_may_start_with_a_byte_order_mark(folder: Path) -> None:
    """PowerShell writes such files."""
    assert read(TrainSettings, write_toml(folder, "\ufeffmax_steps = 7")).max_steps == 7
