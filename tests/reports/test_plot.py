"""Plots of runs, and the metrics that they read."""

import sys
from pathlib import Path

import pytest

import train
from conftest import script, tiny_settings
from glyphgpt.errors import UserError
from glyphgpt.files import PLOT
from glyphgpt.reports import plot
from glyphgpt.reports.plot import read_metrics, write_plot

PNG = b"\x89PNG\r\n"
ROWS = [
    '{"kind": "train", "step": 1, "loss": 4.0, "learning_rate": 0.1, "grad_norm": 1, "tokens": 64, "seconds": 1.0}\n',
    '{"kind": "train", "step": 2, "loss": null, "learning_rate": 0.1, "grad_norm": 1, "tokens": 128, "seconds": 1.5}\n',
    '{"kind": "val", "step": 2, "loss": 3.9, "tokens": 128, "seconds": 2.0}\n',
]


def write_run(folder: Path, *lines: str) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_training_does_not_need_matplotlib(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    train.main(tiny_settings(data_dir, tmp_path))
    with pytest.raises(UserError, match=r"^a plot needs matplotlib: pip install matplotlib$"):
        write_plot([tmp_path], tmp_path / PLOT)


def test_several_runs_can_be_compared(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, *ROWS) for name in ("one", "$\\bad$_")]
    write_plot(runs[:1], tmp_path / "one.png")
    write_plot(runs, tmp_path / "both.png")
    one, both = ((tmp_path / name).read_bytes() for name in ("one.png", "both.png"))
    assert one.startswith(PNG)
    assert both.startswith(PNG)
    assert one != both


def test_reading_drops_an_incomplete_last_row_and_adds_the_throughput(tmp_path: Path) -> None:
    rows = read_metrics(write_run(tmp_path / "run", *ROWS, '{"kind": "tr'))
    assert [row["step"] for row in rows] == [1, 2, 2]
    assert [row.get("tokens_per_second") for row in rows] == [None, 128.0, None]


def test_evaluation_of_the_best_model_is_read_but_not_drawn(tmp_path: Path) -> None:
    """It is on more of the text than the points of the validation curve, and of a model that may be much older."""
    run = write_run(tmp_path / "run", *ROWS)
    write_plot([run], tmp_path / "before.png")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "best", "step": 2, "loss": 3.5, "tokens": 128, "seconds": 2.5}\n')
    assert read_metrics(run)[-1] == {"kind": "best", "step": 2, "loss": 3.5, "tokens": 128, "seconds": 2.5}
    write_plot([run], tmp_path / "after.png")
    assert (tmp_path / "before.png").read_bytes() == (tmp_path / "after.png").read_bytes()


@pytest.mark.parametrize(
    "line", ["[]", "7", "{}", '{"kind": "train", "step": "x"}', ROWS[0].replace("4.0", '"4"'), "{"]
)
def test_malformed_metrics_are_refused(tmp_path: Path, line: str) -> None:
    run = write_run(tmp_path / "run", line.strip() + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: not as train.py writes it$"):
        write_plot([run], run / PLOT)


def test_the_command_line_writes_into_the_runs_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", *ROWS)
    done = script("glyphgpt/reports/plot.py", str(run))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run / PLOT}: written\n", "")
    assert (run / PLOT).read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name one or more runs: "),
        (["a", "b"], "a plot of several runs needs a file: --out=FILE.png"),
        (["missing"], "missing/metrics.jsonl: no metrics there; name the folder of a run"),
        (["a", "--output=x"], "command line: unknown key --output; did you mean 'out'?"),
    ],
)
def test_command_line_mistakes(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["plot.py", *words])
    with pytest.raises(UserError) as error:
        plot.main()
    assert str(error.value).startswith(message)
