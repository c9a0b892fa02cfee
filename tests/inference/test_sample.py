"""What sample.py promises: the text that was asked for, from one file, on any machine; clear words otherwise."""

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sample
import train
from conftest import ROOT, prepare_text, script, some_text, tiny_settings
from glyphgpt import checkpoint as checkpoints
from glyphgpt.errors import UsageError, UserError, exit_on_error
from glyphgpt.settings import SampleSettings

Capture = pytest.CaptureFixture[str]
Ask = Callable[..., str]

ODD = "nul\0 שלום عالم 🌍 é\n"


def settings(**changes: object) -> SampleSettings:
    return SampleSettings.model_validate({"max_new_tokens": 60, "device": "cpu", **changes})


@pytest.fixture(scope="module")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the data set `small`, far enough that it writes almost words."""
    out_dir = tmp_path_factory.mktemp("run")
    train.main(tiny_settings(data_dir, out_dir, max_steps=150, eval_every=75, learning_rate=0.01))
    return out_dir


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a text with a NUL, right-to-left letters and an emoji."""
    folder = tmp_path_factory.mktemp("odd")
    prepare_text(ODD * 60, folder)
    train.main(tiny_settings(folder, folder / "run", max_steps=5))
    return folder / "run"


@pytest.fixture
def ask(run: Path, capsys: Capture) -> Ask:
    """Return a function that samples from the run, in process, and returns what was printed."""

    def ask(place: Path = run, **changes: object) -> str:
        capsys.readouterr()
        sample.main(settings(**changes), str(place))
        return capsys.readouterr().out

    return ask


def standard_input(data: bytes, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_the_same_seed_gives_the_same_text(ask: Ask) -> None:
    assert ask(seed=1) == ask(seed=1) != ask(seed=2)
    assert len(ask(max_new_tokens=60)) == 60 + 1
    assert ask(max_new_tokens=0, prompt="the king") == "the king\n"


def test_a_longer_sample_begins_like_a_shorter_one(ask: Ask) -> None:
    assert ask(max_new_tokens=100).startswith(ask(max_new_tokens=20)[:-1])


@pytest.mark.parametrize("length", [5, 100], ids=["within the context", "far beyond it"])
@pytest.mark.parametrize("prompt", ["", "the king", some_text(50)], ids=["no", "short", "long"])
def test_the_cache_does_not_change_the_text(length: int, prompt: str, ask: Ask) -> None:
    form = {"max_new_tokens": length, "prompt": prompt, "num_samples": 2}
    assert ask(**form, cache=True) == ask(**form, cache=False)


def test_a_cpu_samples_without_torch(run: Path) -> None:
    program = f"import sys; sys.modules['torch'] = None; sys.argv = ['sample.py', {str(run)!r}, '--device=cpu']\n"
    program += "import runpy; runpy.run_path('sample.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, len(done.stdout)) == (0, "", 500 + 1)


def test_weights_that_are_no_numbers_are_refused(ask: Ask, run: Path, tmp_path: Path) -> None:
    checkpoint = checkpoints.load_checkpoint(run / "best.safetensors")
    checkpoint.model["norm.weight"][3] = np.nan
    checkpoints.save_checkpoint(checkpoint, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=r"nan\.safetensors: some weights are not finite; use an earlier checkpoint"):
        ask(tmp_path / "nan.safetensors")


def test_a_tokenizer_of_another_size_is_refused(ask: Ask, run: Path, tmp_path: Path) -> None:
    checkpoint = checkpoints.load_checkpoint(run / "best.safetensors")
    checkpoint.metadata.tokenizer["characters"] = "abc"
    checkpoints.save_checkpoint(checkpoint, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors: its tokenizer and its network differ"):
        ask(tmp_path / "other.safetensors")


def test_running_out_of_memory_is_one_line(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("glyphgpt.inference.numpy_gpt.np.empty", fail)
    with pytest.raises(UserError, match=r"^out of memory; lower num_samples$"):
        ask(num_samples=3)


def test_num_samples_prints_so_many_different_ones(ask: Ask) -> None:
    samples = ask(num_samples=3, prompt="my lord").split("-" * 20 + "\n")
    assert len(set(samples)) == 3
    assert all(text.startswith("my lord") and len(text) == 7 + 60 + 1 for text in samples)


def test_a_prompt_comes_from_the_command_line_a_file_or_standard_input(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "the king\nmy lord, "
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    standard_input(prompt.encode(), monkeypatch)
    texts = [ask(prompt=prompt), ask(prompt_file=str(tmp_path / "prompt.txt")), ask(prompt_file="-")]
    assert texts[0].startswith(prompt)
    assert texts[0] == texts[1] == texts[2]


def test_the_prompt_is_what_the_text_goes_on_from(ask: Ask) -> None:
    texts = {ask(prompt=prompt, temperature=0, max_new_tokens=10)[len(prompt) :] for prompt in ("th", "wh", "Op")}
    assert len(texts) == 3


def test_only_the_end_of_a_long_prompt_is_seen(ask: Ask) -> None:
    prompts = [some_text(40, seed) + "my lord, the king to be or not" for seed in (1, 2)]
    texts = [ask(prompt=prompt) for prompt in prompts]
    assert texts[0].startswith(prompts[0])
    assert texts[0][len(prompts[0]) :] == texts[1][len(prompts[1]) :]


def test_an_empty_prompt_starts_like_a_new_line(ask: Ask) -> None:
    assert "\n" + ask(prompt="") == ask(prompt="\n")


def test_temperature_0_takes_the_likeliest_whatever_the_seed(ask: Ask) -> None:
    assert ask(temperature=0, seed=1) == ask(temperature=0, seed=2) == ask(top_k=1, seed=3)
    first, second = ask(temperature=0, num_samples=2).split("-" * 20 + "\n")
    assert first == second


def test_a_sample_ends_before_the_first_stop(ask: Ask) -> None:
    text = ask(prompt="my lord").removesuffix("\n")
    stops = (text[40:43], text[30:33])
    end = min(text.index(stop, len("my lord")) for stop in stops)
    assert ask(prompt="my lord", stop=stops) == text[:end] + "\n"


def test_each_sample_has_its_own_stop(ask: Ask) -> None:
    whole = [text.removesuffix("\n") for text in ask(num_samples=3).split("-" * 20 + "\n")]
    stop = whole[0][10:12]
    stopped = [text.removesuffix("\n") for text in ask(num_samples=3, stop=(stop,)).split("-" * 20 + "\n")]
    assert stopped == [text.partition(stop)[0] for text in whole]


def test_unknown_characters_are_named_and_can_be_skipped(ask: Ask) -> None:
    with pytest.raises(UserError, match=re.escape("'q' (U+0071), '\u05e9' (U+05E9)")) as failure:
        ask(prompt="the qשqking")
    assert "--skip_unknown" in str(failure.value)
    assert "\n" not in str(failure.value)
    skipped = ask(prompt="the qשqking", skip_unknown=True)
    assert skipped.replace("qשq", "") == ask(prompt="the king")


def test_a_prompt_of_unknown_characters_only_counts_as_empty_when_skipped(ask: Ask) -> None:
    assert ask(prompt="字字", skip_unknown=True) == "字字" + ask(prompt="")


def test_very_many_unknown_characters_are_counted(ask: Ask) -> None:
    with pytest.raises(UserError, match=r"^.* and 90 more; .*$"):
        ask(prompt="".join(map(chr, range(0x4E00, 0x4E00 + 100))))


def test_nul_and_right_to_left_text_pass_through(odd_run: Path, ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(ODD.encode())
    text = ask(odd_run, prompt_file=str(tmp_path / "prompt"))
    assert text.startswith(ODD)
    assert set(text) <= set(ODD)
    assert len(text) == len(ODD) + 60 + 1


def test_score_is_the_loss_that_evaluation_tells(
    run: Path, data_dir: Path, ask: Ask, tmp_path: Path, capsys: Capture
) -> None:
    train.main(tiny_settings(data_dir, run, eval_only=True, eval_tokens=0))
    evaluated = capsys.readouterr().out.partition(": validation ")[2]
    validation_text = some_text(6000)[5400:]
    file = tmp_path / "validation.txt"
    file.write_bytes(validation_text.encode())
    assert ask(score=str(file), dtype="float32") == f"{file}: 600 tokens, {evaluated}"
    file.write_bytes("qz字".join(validation_text).encode())
    with pytest.raises(UserError, match=r"'q' \(U\+0071\), 'z' \(U\+007A\), '字' \(U\+5B57\)"):
        ask(score=str(file))
    left_out = "(1,797 unknown characters skipped)"
    assert ask(score=str(file), skip_unknown=True, dtype="float32") == f"{file}: 600 tokens {left_out}, {evaluated}"


def test_score_takes_a_data_set_too(data_dir: Path, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small").write_text(some_text(6000)[5400:], encoding="utf-8")
    loss = ask(score=str(tmp_path / "small")).partition(" 600 tokens, ")[2]
    said = f"{data_dir / 'small'}: validation split: 600 tokens, {loss}"
    assert ask(score="small", data_dir=str(data_dir)) == ask(score=str(data_dir / "small")) == said
    prepare_text(some_text(1000) + "z", data_dir, "other")
    with pytest.raises(UserError, match=r"other: its vocabulary differs from the model's; score its text: --score="):
        ask(score="other", data_dir=str(data_dir))
    monkeypatch.chdir(tmp_path)
    assert ask(score="small", data_dir=str(data_dir)).startswith("small: 600 tokens, "), "a file comes first"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "text.txt").write_text("the king", encoding="utf-8")
    assert ask(score="other", data_dir=str(data_dir)).startswith("other: 8 tokens, "), "and so does a folder of texts"


def test_score_reads_standard_input(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input(b"the king", monkeypatch)
    shown = ask(score="-")
    assert re.fullmatch(r"-: 8 tokens, loss \d\.\d+, \d\.\d+ bits per character, perplexity \d+\.\d+\n", shown)


@pytest.mark.parametrize(("text", "count"), [("", 0), ("t", 1)])
def test_too_little_to_score_is_refused(text: str, count: int, ask: Ask, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"^.*short\.txt: {count} tokens; a score needs at least 2$"):
        ask(score=str(file))


@pytest.mark.parametrize("key", ["prompt_file", "score"])
def test_a_text_that_is_missing_or_not_utf8_is_refused(key: str, ask: Ask, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^.*nothing: no such file or folder$"):
        ask(**{key: str(tmp_path / "nothing")})
    (tmp_path / "latin").write_bytes("the kéng".encode("latin-1"))
    with pytest.raises(UserError, match=r"^.*latin: byte 0xe9 at offset 5 is not utf-8 text.*$"):
        ask(**{key: str(tmp_path / "latin")})


def type_lines(lines: list[str], patch: pytest.MonkeyPatch) -> None:
    """Answer input() with these lines, and then with the end of input."""
    left = iter(lines)

    def answer(_: str) -> str:
        for line in left:
            return line
        raise EOFError

    patch.setattr("builtins.input", answer)


def test_interactive_replies_as_samples_of_all_the_text_so_far(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    type_lines(["the king", "quiet", "my lord"], monkeypatch)
    form = {"temperature": 0, "max_new_tokens": 20}
    shown = ask(interactive=True, **form)
    history = "\nthe king\n"
    first = ask(prompt=history, **form).removeprefix(history).removesuffix("\n")
    history += first + "my lord\n"
    second = ask(prompt=history, **form).removeprefix(history).removesuffix("\n")
    assert shown == f"{first}\n{second}\n\n"
    assert second != ask(prompt="\nmy lord\n", **form).removeprefix("\nmy lord\n").removesuffix("\n")


def test_interactive_works_for_a_model_that_has_never_seen_a_new_line(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_text("to be or not to be " * 60, tmp_path)
    train.main(tiny_settings(tmp_path, tmp_path / "run", max_steps=2))
    type_lines(["to be"], monkeypatch)
    shown = ask(tmp_path / "run", interactive=True, max_new_tokens=20)
    assert len(shown.strip("\n")) == 20


def test_interactive_bytes_that_are_no_text_are_no_traceback(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input(b"the \xff king\nmy lord\n", monkeypatch)
    with exit_on_error():
        sample.main(settings(interactive=True, skip_unknown=True), str(run))


def test_interactive_warns_of_unknown_characters_and_ends_at_the_end_of_input(run: Path) -> None:
    flags = ["--interactive", "--device=cpu", "--max_new_tokens=40", "--prompt=my lord"]
    done = script("sample.py", str(run), *flags, text="the king\nthe quking\nmy\n")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "warning: the model has never seen 'q' (U+0071)" in done.stderr
    assert done.stdout.count("> ") == 4, "one for each line, and one that the end of input answers"


def test_one_file_is_all_that_sampling_needs(run: Path, tmp_path: Path, ask: Ask) -> None:
    shutil.copy(run / "best.safetensors", tmp_path)
    flags = ["--device=cpu", "--max_new_tokens=60", "--prompt=the king"]
    done = script("sample.py", "best.safetensors", *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ask(prompt="the king")
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]


def test_preparing_the_data_anew_does_not_change_what_a_model_says(ask: Ask, tmp_path: Path) -> None:
    prepare_text(some_text(2000), tmp_path)
    train.main(tiny_settings(tmp_path, tmp_path / "run"))
    before = ask(tmp_path / "run", data_dir=str(tmp_path))
    prepare_text("0123456789 abc\n" * 100, tmp_path, overwrite=True)
    assert ask(tmp_path / "run", data_dir=str(tmp_path)) == before


def test_a_run_is_sampled_at_its_best_and_any_file_by_its_name(run: Path, ask: Ask, tmp_path: Path) -> None:
    best, last = (ask(run / name) for name in ("best.safetensors", "last.safetensors"))
    assert ask(run) == best
    shutil.copy(run / "last.safetensors", tmp_path)
    assert ask(tmp_path) == last


def broken_checkpoints(folder: Path, run: Path) -> dict[str, str]:
    """Write files that are no good checkpoints; return their names with what is said of each."""
    whole = (run / "best.safetensors").read_bytes()
    flipped = bytearray(whole)
    flipped[-7] ^= 4
    files = {
        "missing": (None, "no such checkpoint"),
        "empty": (b"", "not a checkpoint of glyphgpt, or truncated"),
        "text": (b"Who's there?\n" * 100, "not a checkpoint of glyphgpt, or truncated"),
        "pickle": (b"\x80\x04\x95" + b"a" * 5000, "not a checkpoint of glyphgpt, or truncated"),
        "cut in the header": (whole[:300], "not a checkpoint of glyphgpt, or truncated"),
        "cut in the weights": (whole[:-1000], "damaged"),
        "flipped": (bytes(flipped), "damaged"),
        "longer": (whole + b"more", "damaged"),
    }
    for name, (content, _) in files.items():
        if content is not None:
            (folder / name).write_bytes(content)
    save_file({"weight": torch.ones(3)}, folder / "foreign")
    (folder / "folder").mkdir()
    said = {name: said for name, (_, said) in files.items()}
    return {**said, "foreign": "not a checkpoint of glyphgpt", "folder": "no checkpoint in this folder; train first"}


def test_files_that_are_no_good_checkpoints_are_refused(run: Path, ask: Ask, tmp_path: Path) -> None:
    for name, said in broken_checkpoints(tmp_path, run).items():
        with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path / name))}: .*{said}.*$") as failure:
            ask(tmp_path / name)
        assert (failure.value.status, "\n" in str(failure.value)) == (1, False)


def test_a_refused_checkpoint_is_one_line_and_status_1(run: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((run / "best.safetensors").read_bytes()[:-1000])
    done = script("sample.py", str(cut))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .*cut\.safetensors: damaged.*\n", done.stderr)


@pytest.mark.parametrize("words", [[], ["one", "two"]])
def test_other_than_one_word_shows_the_usage(words: list[str]) -> None:
    done = script("sample.py", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: name one run or checkpoint: python sample\.py RUN .*\n", done.stderr)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(ask: Ask) -> None:
    with pytest.raises(UsageError, match=r"^device = 'cuda' is not on this machine; available: auto, cpu.*$"):
        ask(device="cuda")


def test_a_reader_that_has_seen_enough_is_no_error(run: Path) -> None:
    command = [sys.executable, str(ROOT / "sample.py"), str(run), "--device=cpu", "--max_new_tokens=100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(20)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0


def test_a_stop_may_name_a_new_line_and_one_that_never_comes_is_told(run: Path, ask: Ask, capsys: Capture) -> None:
    whole = ask(max_new_tokens=200)
    assert ask(max_new_tokens=200, stop=("\\n",)) == whole.partition("\n")[0] + "\n"
    sample.main(settings(stop=("%",)), str(run))
    assert capsys.readouterr().err == "warning: stop = '%' cannot occur: '%' is not in the model's vocabulary\n"
