"""sample.py: sampling, stop strings, scores, interactive mode, and errors."""

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import sample
import train
from conftest import ROOT, prepare_text, script, some_text, tiny_settings
from glyphgpt.errors import UserError, exit_on_error
from glyphgpt.files import BEST
from glyphgpt.settings import SampleSettings

Capture = pytest.CaptureFixture[str]
RunSample = Callable[..., str]

UNUSUAL = "nul\0 שלום عالم 🌍 é\n"


def settings(**changes: object) -> SampleSettings:
    return SampleSettings.model_validate({"max_new_tokens": 60, "device": "cpu", **changes})


@pytest.fixture(scope="module")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on the dataset `small` until samples resemble words."""
    out_dir = tmp_path_factory.mktemp("run")
    train.main(tiny_settings(data_dir, out_dir, max_steps=150, eval_every=75, learning_rate=0.01))
    return out_dir


@pytest.fixture(scope="module")
def unusual_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on a text with NUL, right-to-left letters and an emoji."""
    folder = tmp_path_factory.mktemp("unusual")
    prepare_text(UNUSUAL * 60, folder)
    train.main(tiny_settings(folder, folder / "run", max_steps=5))
    return folder / "run"


@pytest.fixture
def run_sample(run: Path, capsys: Capture) -> RunSample:
    """Return a function that calls sample.py's main with a run and returns the standard output."""

    def run_sample(path: Path = run, **changes: object) -> str:
        capsys.readouterr()
        sample.main(settings(**changes), str(path))
        return capsys.readouterr().out

    return run_sample


def standard_input(data: bytes, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_seed_determines_the_text_and_max_new_tokens_its_length(run_sample: RunSample) -> None:
    assert run_sample(seed=1) == run_sample(seed=1) != run_sample(seed=2)
    assert len(run_sample(max_new_tokens=60)) == 60 + 1
    assert run_sample(max_new_tokens=0, prompt="the king") == "the king\n"


def test_longer_sample_starts_with_the_shorter_one(run_sample: RunSample) -> None:
    assert run_sample(max_new_tokens=100).startswith(run_sample(max_new_tokens=20)[:-1])


@pytest.mark.parametrize("length", [5, 100], ids=["within the context", "beyond the context"])
@pytest.mark.parametrize("prompt", ["", "the king", some_text(50)], ids=["empty", "short", "long"])
def test_cache_does_not_change_the_text(length: int, prompt: str, run_sample: RunSample) -> None:
    changes = {"max_new_tokens": length, "prompt": prompt, "num_samples": 2}
    assert run_sample(**changes, cache=True) == run_sample(**changes, cache=False)


def test_sampling_on_a_cpu_does_not_need_torch(run: Path) -> None:
    code = f"import sys; sys.modules['torch'] = None; sys.argv = ['sample.py', {str(run)!r}, '--device=cpu']\n"
    code += "import runpy; runpy.run_path('sample.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, len(done.stdout)) == (0, "", 500 + 1)


def test_num_samples_prints_different_samples(run_sample: RunSample) -> None:
    samples = run_sample(num_samples=3, prompt="my lord").split("-" * 20 + "\n")
    assert len(set(samples)) == 3
    assert all(text.startswith("my lord") and len(text) == 7 + 60 + 1 for text in samples)


def test_prompt_from_flag_file_and_standard_input(
    run_sample: RunSample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "the king\nmy lord, "
    (tmp_path / "prompt.txt").write_bytes(prompt.encode())
    standard_input(prompt.encode(), monkeypatch)
    texts = [
        run_sample(prompt=prompt),
        run_sample(prompt_file=str(tmp_path / "prompt.txt")),
        run_sample(prompt_file="-"),
    ]
    assert texts[0].startswith(prompt)
    assert texts[0] == texts[1] == texts[2]


def test_text_depends_on_the_prompt(run_sample: RunSample) -> None:
    texts = {
        run_sample(prompt=prompt, temperature=0, max_new_tokens=10)[len(prompt) :] for prompt in ("th", "wh", "Op")
    }
    assert len(texts) == 3


def test_long_prompt_is_truncated_to_its_end(run_sample: RunSample) -> None:
    prompts = [some_text(40, seed) + "my lord, the king to be or not" for seed in (1, 2)]
    texts = [run_sample(prompt=prompt) for prompt in prompts]
    assert texts[0].startswith(prompts[0])
    assert texts[0][len(prompts[0]) :] == texts[1][len(prompts[1]) :]


def test_empty_prompt_equals_a_new_line(run_sample: RunSample) -> None:
    assert "\n" + run_sample(prompt="") == run_sample(prompt="\n")


def test_temperature_0_is_greedy_and_ignores_the_seed(run_sample: RunSample) -> None:
    assert run_sample(temperature=0, seed=1) == run_sample(temperature=0, seed=2) == run_sample(top_k=1, seed=3)
    first, second = run_sample(temperature=0, num_samples=2).split("-" * 20 + "\n")
    assert first == second


def test_sample_ends_before_the_first_stop(run_sample: RunSample) -> None:
    text = run_sample(prompt="my lord").removesuffix("\n")
    stops = (text[40:43], text[30:33])
    end = min(text.index(stop, len("my lord")) for stop in stops)
    assert run_sample(prompt="my lord", stop=stops) == text[:end] + "\n"


def test_each_sample_ends_at_its_own_stop(run_sample: RunSample) -> None:
    full = [text.removesuffix("\n") for text in run_sample(num_samples=3).split("-" * 20 + "\n")]
    stop = full[0][10:12]
    stopped = [text.removesuffix("\n") for text in run_sample(num_samples=3, stop=(stop,)).split("-" * 20 + "\n")]
    assert stopped == [text.partition(stop)[0] for text in full]


def test_unknown_characters_are_named_and_can_be_skipped(run_sample: RunSample) -> None:
    with pytest.raises(UserError, match=re.escape("'q' (U+0071), '\u05e9' (U+05E9)")) as caught:
        run_sample(prompt="the qשqking")
    assert "--skip_unknown" in str(caught.value)
    assert "\n" not in str(caught.value)
    skipped = run_sample(prompt="the qשqking", skip_unknown=True)
    assert skipped.replace("qשq", "") == run_sample(prompt="the king")


def test_prompt_of_skipped_characters_equals_an_empty_prompt(run_sample: RunSample) -> None:
    assert run_sample(prompt="字字", skip_unknown=True) == "字字" + run_sample(prompt="")


def test_many_unknown_characters_are_counted(run_sample: RunSample) -> None:
    with pytest.raises(UserError, match=r"^.* and 90 more; .*$"):
        run_sample(prompt="".join(map(chr, range(0x4E00, 0x4E00 + 100))))


def test_nul_and_right_to_left_text_are_kept(unusual_run: Path, run_sample: RunSample, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes(UNUSUAL.encode())
    text = run_sample(unusual_run, prompt_file=str(tmp_path / "prompt"))
    assert text.startswith(UNUSUAL)
    assert set(text) <= set(UNUSUAL)
    assert len(text) == len(UNUSUAL) + 60 + 1


def test_score_equals_the_validation_loss(
    run: Path, data_dir: Path, run_sample: RunSample, tmp_path: Path, capsys: Capture
) -> None:
    train.main(tiny_settings(data_dir, run, eval_only=True, eval_tokens=0))
    evaluated = capsys.readouterr().out.partition(": validation ")[2]
    validation_text = some_text(6000)[5400:]
    file = tmp_path / "validation.txt"
    file.write_bytes(validation_text.encode())
    assert run_sample(score=str(file)) == f"{file}: {evaluated}"
    file.write_bytes("qz字".join(validation_text).encode())
    with pytest.raises(UserError, match=r"'q' \(U\+0071\), 'z' \(U\+007A\), '字' \(U\+5B57\)"):
        run_sample(score=str(file))
    skipped = "(1,797 unknown characters skipped)"
    assert run_sample(score=str(file), skip_unknown=True) == f"{file} {skipped}: {evaluated}"


def test_score_reads_any_split_of_a_dataset(data_dir: Path, run_sample: RunSample, tmp_path: Path) -> None:
    text = some_text(6000)
    folder = prepare_text(text, tmp_path, "three", val_fraction=0.2, test_fraction=0.1)
    for split, part in (("train", text[:4200]), ("val", text[4200:5400]), ("test", text[5400:])):
        (tmp_path / "part").write_text(part, encoding="utf-8")
        _, loss = run_sample(score=str(tmp_path / "part")).split(": ", 1)
        name = {"train": "training", "val": "validation", "test": "test"}[split]
        assert run_sample(score=f"three:{split}", data_dir=str(tmp_path)) == f"{folder}: {name} split: {loss}"
    with pytest.raises(UserError, match=r"small:test: the dataset has no such split; it has small:train, small:val$"):
        run_sample(score="small:test", data_dir=str(data_dir))


def test_score_accepts_a_dataset(
    data_dir: Path, run_sample: RunSample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small").write_text(some_text(6000)[5400:], encoding="utf-8")
    loss = run_sample(score=str(tmp_path / "small")).removeprefix(f"{tmp_path / 'small'}: ")
    expected = f"{data_dir / 'small'}: validation split: {loss}"
    assert run_sample(score="small", data_dir=str(data_dir)) == run_sample(score=str(data_dir / "small")) == expected
    prepare_text(some_text(1000) + "z", data_dir, "other")
    with pytest.raises(UserError, match=r"other: its vocabulary differs from the model's; score its text: --score="):
        run_sample(score="other", data_dir=str(data_dir))
    monkeypatch.chdir(tmp_path)
    assert run_sample(score="small", data_dir=str(data_dir)).startswith("small: loss "), "a file has precedence"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "text.txt").write_text("the king", encoding="utf-8")
    assert run_sample(score="other", data_dir=str(data_dir)).startswith("other: loss "), "a folder has, too"


def test_score_reads_standard_input(run_sample: RunSample, monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input(b"the king", monkeypatch)
    output = run_sample(score="-")
    score = r"loss \d\.\d+, \d\.\d+ bits per character, perplexity \d+\.\d+ \(7 tokens\)"
    assert re.fullmatch(rf"-: {score}\n", output)


@pytest.mark.parametrize(("text", "count"), [("", 0), ("t", 1)])
def test_score_needs_two_tokens(text: str, count: int, run_sample: RunSample, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"^.*short\.txt: {count} tokens; a score needs at least 2$"):
        run_sample(score=str(file))


@pytest.mark.parametrize("key", ["prompt_file", "score"])
def test_missing_and_non_utf8_texts_are_rejected(key: str, run_sample: RunSample, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^.*missing: no such file or folder$"):
        run_sample(**{key: str(tmp_path / "missing")})
    (tmp_path / "latin").write_bytes("the kéng".encode("latin-1"))
    with pytest.raises(UserError, match=r"^.*latin: byte 0xe9 at offset 5 is not utf-8 text.*$"):
        run_sample(**{key: str(tmp_path / "latin")})


def type_lines(lines: list[str], patch: pytest.MonkeyPatch) -> None:
    """Replace input() by a function that returns these lines and then raises EOFError."""
    remaining = iter(lines)

    def read_line(_: str) -> str:
        for line in remaining:
            return line
        raise EOFError

    patch.setattr("builtins.input", read_line)


def test_interactive_reply_continues_the_whole_conversation(
    run_sample: RunSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    type_lines(["the king", "quiet", "my lord"], monkeypatch)
    changes = {"temperature": 0, "max_new_tokens": 20}
    output = run_sample(interactive=True, **changes)
    history = "\nthe king\n"
    first = run_sample(prompt=history, **changes).removeprefix(history).removesuffix("\n")
    history += first + "my lord\n"
    second = run_sample(prompt=history, **changes).removeprefix(history).removesuffix("\n")
    assert output == f"{first}\n{second}\n\n"
    assert second != run_sample(prompt="\nmy lord\n", **changes).removeprefix("\nmy lord\n").removesuffix("\n")


def test_interactive_with_a_vocabulary_without_new_line(
    run_sample: RunSample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_text("to be or not to be " * 60, tmp_path)
    train.main(tiny_settings(tmp_path, tmp_path / "run", max_steps=2))
    type_lines(["to be"], monkeypatch)
    output = run_sample(tmp_path / "run", interactive=True, max_new_tokens=20)
    assert len(output.strip("\n")) == 20


def test_interactive_accepts_invalid_utf8(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input(b"the \xff king\nmy lord\n", monkeypatch)
    with exit_on_error():
        sample.main(settings(interactive=True, skip_unknown=True), str(run))


def test_interactive_warns_of_unknown_characters_and_ends_at_eof(run: Path) -> None:
    flags = ["--interactive", "--device=cpu", "--max_new_tokens=40", "--prompt=my lord"]
    done = script("sample.py", str(run), *flags, text="the king\nthe quking\nmy\n")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "warning: the model has never seen 'q' (U+0071)" in done.stderr
    assert done.stdout.count("> ") == 4, "one for each line and one for the end of input"


def test_sampling_needs_only_one_file(run: Path, tmp_path: Path, run_sample: RunSample) -> None:
    shutil.copy(run / BEST, tmp_path)
    flags = ["--device=cpu", "--max_new_tokens=60", "--prompt=the king"]
    done = script("sample.py", BEST, *flags, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run_sample(prompt="the king")
    assert [path.name for path in tmp_path.iterdir()] == [BEST]


def test_samples_do_not_depend_on_the_dataset_folder(run_sample: RunSample, tmp_path: Path) -> None:
    prepare_text(some_text(2000), tmp_path)
    train.main(tiny_settings(tmp_path, tmp_path / "run"))
    before = run_sample(tmp_path / "run", data_dir=str(tmp_path))
    prepare_text("0123456789 abc\n" * 100, tmp_path, overwrite=True)
    assert run_sample(tmp_path / "run", data_dir=str(tmp_path)) == before


def test_damaged_checkpoint_is_one_line_and_status_1(run: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes((run / BEST).read_bytes()[:-1000])
    done = script("sample.py", str(truncated))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .*truncated\.safetensors: damaged.*\n", done.stderr)


@pytest.mark.parametrize(("words", "hint"), [([], ""), (["one", "a prompt"], "; a prompt is --prompt='a prompt'")])
def test_number_of_words_must_be_one(words: list[str], hint: str) -> None:
    done = script("sample.py", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: name one run or checkpoint: python sample\.py RUN .*\]{hint}\n", done.stderr)


def test_broken_pipe_is_not_an_error(run: Path) -> None:
    command = [sys.executable, str(ROOT / "sample.py"), str(run), "--device=cpu", "--max_new_tokens=100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(os.environ)) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(20)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0


def test_stop_may_contain_escapes_and_impossible_stops_are_a_warning(
    run: Path, run_sample: RunSample, capsys: Capture
) -> None:
    full = run_sample(max_new_tokens=200)
    assert run_sample(max_new_tokens=200, stop=("\\n",)) == full.partition("\n")[0] + "\n"
    sample.main(settings(stop=("%",)), str(run))
    assert capsys.readouterr().err == "warning: stop = '%' cannot occur: '%' is not in the model's vocabulary\n"


def test_novelty_compares_samples_and_validation_text_with_the_training_text(
    run_sample: RunSample, data_dir: Path
) -> None:
    output = run_sample(novelty="small", data_dir=str(data_dir), num_samples=3, max_new_tokens=200, temperature=0.5)
    title, head, samples, val, longest = output.splitlines()
    assert title.endswith("training text of small, by the length of the runs:")
    assert head.split() == ["20", "or", "more", "50", "or", "more", "100", "or", "more", "longest"]
    fractions = [[float(cell.rstrip("%")) for cell in row.split()[-4:]] for row in (samples, val)]
    for *shares, _ in fractions:
        assert 100 >= shares[0] >= shares[1] >= shares[2] >= 0
    assert fractions[1][0] > 50, "the phrases of the text repeat"
    place, copied = re.fullmatch(r"longest run of the samples, at character ([\d,]+): '(.*)'", longest).groups()  # type: ignore[union-attr]
    assert len(copied) == int(fractions[0][-1])
    text = some_text(6000)[: int(0.9 * 6000)]
    assert text[int(place.replace(",", "")) :].startswith(copied)
