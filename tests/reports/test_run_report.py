"""The page of a run: what it tells, and, where Chromium and its driver are installed, how it looks and reacts."""

import base64
import hashlib
import json
import re
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from conftest import script, tiny_settings
from glyphgpt.errors import UserError
from glyphgpt.files import REPORT
from glyphgpt.reports.run_report import POINTS, content, thinned, write_report
from glyphgpt.reports.templates import render
from glyphgpt.settings import Mode
from glyphgpt.training.run import StepMetrics

HOSTILE = (
    "</script><script>alert(1)</script><b>bold</b> &amp; <!-- \0\x1b[31m\x7f \u2028 \ud800 \u202eright \U0001f30d שלום"
)
SHOWN = "</script><script>alert(1)</script><b>bold</b> &amp; <!-- ␀␛[31m␡ \u2028 \ufffd \u202eright \U0001f30d שלום"
TRAIN = {"kind": "train", "learning_rate": 0.01, "grad_norm": 1.5}


def written(
    folder: Path, rows: list[dict[str, Any]], samples: list[tuple[int, str]] | None = None, **changes: Any
) -> Path:
    """Write a run as train.py leaves it, but for its checkpoints."""
    folder.mkdir(parents=True)
    lasting = tiny_settings(folder, folder, **changes).model_dump(exclude=set(Mode.model_fields))
    (folder / "config.toml").write_bytes(tomli_w.dumps(lasting).encode())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if samples is not None:
        lines = [json.dumps({"step": step, "text": text}) + "\n" for step, text in samples]
        (folder / "samples.jsonl").write_text("".join(lines))
    return folder


def val(step: int, loss: float | None, seconds: float = 0.0) -> dict[str, Any]:
    """A row of validation."""
    return {"kind": "val", "step": step, "loss": loss, "tokens": 64 * step, "seconds": seconds}


def told(run: Path) -> dict[str, str]:
    """The headline figures of a run."""
    return {what: value for what, value, _ in content(run)["figures"]}


def test_training_writes_the_page_and_says_where(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(tiny_settings(data_dir, tmp_path, report=True))
    assert capsys.readouterr().out.endswith(f"the run as a page: {tmp_path / REPORT}\n")
    shown = content(tmp_path)
    assert (tmp_path / REPORT).read_text(encoding="utf-8").count(json.dumps(shown["samples"])) == 1
    assert shown["ended"] == "All 20 steps are done."
    assert [sample["about"].split(",")[0] for sample in shown["samples"]] == ["step 0", "step 10", "step 20"]
    assert shown["rows"]["val"]["step"] == [0, 10, 20]
    assert shown["rows"]["train"]["step"] == list(range(1, 21))
    assert (told(tmp_path)["Parameters"], told(tmp_path)["Tokens"]) == ("6,880", "1,280")
    assert shown["commands"][1][1].endswith(f"--resume {tmp_path} --max_steps=40")


def test_it_can_be_turned_off(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(tiny_settings(data_dir, tmp_path, report=False))
    assert not (tmp_path / REPORT).exists()
    assert "page" not in capsys.readouterr().out


def test_a_stopped_run_has_its_page_too_with_the_command_to_go_on(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(train.Trainer):
        def step(self, batch: torch.Tensor) -> StepMetrics:
            metrics = super().step(batch)
            if self.state.step == 6:
                signal.raise_signal(signal.SIGTERM)
            return metrics

    monkeypatch.setattr(train, "Trainer", Stopped)
    with pytest.raises(SystemExit) as ending:
        train.main(tiny_settings(data_dir, tmp_path, report=True, log_every=5))
    assert ending.value.code == 128 + signal.SIGTERM
    assert (tmp_path / REPORT).exists()
    shown = content(tmp_path)
    assert shown["ended"] == "Not at its end: step 7 of 20.", "which is told by the checkpoint alone"
    assert shown["commands"][1] == ("Train it further", f"python train.py --resume {tmp_path}")


def test_a_page_that_cannot_be_written_costs_a_warning_only(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / REPORT).mkdir()
    train.main(tiny_settings(data_dir, tmp_path, report=True))
    said = capsys.readouterr()
    assert re.fullmatch(rf"warning: {tmp_path / REPORT}: could not be written: [^\n]+\n", said.err)
    assert "best validation loss" in said.out
    assert (tmp_path / "last.safetensors").exists()


def test_patience_and_its_command_are_told(tmp_path: Path) -> None:
    run = written(tmp_path / "run", [val(0, 3.0), val(10, 2.0), val(20, 2.5), val(30, 2.0)], patience=2, max_steps=99)
    shown = content(run)
    assert shown["ended"] == "Stopped early, at step 30: no better loss in 2 evaluations."
    assert shown["commands"][1][1].endswith(" --patience=0")
    assert shown["figures"][0] == ("Best validation loss", "2.0000", "nats per token, at step 10")


@pytest.mark.parametrize(
    ("rows", "loss"),
    [
        ([val(0, 4.0)], "4.0000"),
        ([val(0, None)], "–"),
        ([val(0, 4.0), val(10, None), val(20, 3.0)], "3.0000"),
        ([{**TRAIN, "step": 1, "loss": None, "grad_norm": None, "tokens": 64, "seconds": 0.5}], "–"),
    ],
    ids=["one evaluation", "no number", "a gap", "no evaluation"],
)
def test_figures_that_are_not_there_are_dashes(rows: list[dict[str, Any]], loss: str, tmp_path: Path) -> None:
    run = written(tmp_path / "run", rows)
    assert told(run)["Best validation loss"] == loss
    assert told(run)["Parameters"] == "–", "which only a checkpoint tells"
    write_report(run, run / REPORT)


def test_a_run_without_steps_or_samples_has_a_page(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path, max_steps=0, sample_tokens=0, report=True))
    shown = content(tmp_path)
    assert (shown["samples"], shown["ended"]) == ([], "All 0 steps are done.")
    (tmp_path / "samples.jsonl").unlink()  # as older runs are
    assert content(tmp_path) == shown


def test_settings_are_written_as_in_toml(tmp_path: Path) -> None:
    run = written(tmp_path / "run", [val(0, 4.0)], dataset="grün", learning_rate=1e-5, min_lr=0.0)
    rows = {row["key"]: row for group in content(run)["settings"] for row in group["rows"]}
    assert (rows["dataset"]["value"], rows["dataset"]["default"]) == ('"grün"', '"shakespeare_char"')
    assert (rows["learning_rate"]["value"], rows["bias"]["value"]) == ("1e-05", "false")
    assert "resume" not in rows


@given(st.integers(0, 10 * POINTS))
def test_thinning_keeps_the_last_and_even_distances(length: int) -> None:
    kept = thinned(list(range(length)))
    assert len(kept) == length if length <= POINTS else POINTS / 2 < len(kept) <= POINTS
    assert kept[-1:] == list(range(length))[-1:]
    assert len({after - before for before, after in pairwise(kept)}) <= 1


@given(st.text())
def test_no_text_breaks_out_and_each_comes_back(text: str) -> None:
    page = render(REPORT, {"text": text})
    inside = page.partition(' id="data">')[2].partition("</script>")[0]
    assert "<" not in inside
    assert json.loads(inside) == {"text": text}
    page.encode()


def test_only_the_pages_own_script_and_style_are_allowed(tmp_path: Path) -> None:
    run = written(tmp_path / "run", [val(0, 4.0)], [(0, HOSTILE)])
    write_report(run, run / REPORT)
    page = (run / REPORT).read_text(encoding="utf-8")
    for name in ("style", "script"):
        [inside] = re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page
    assert not re.search(r"innerHTML|https?://(?!www\.w3\.org/2000/svg)|\bsrc=|\bhref=", page)


@pytest.mark.parametrize("line", ["7", "{}", '{"step": 1, "text": 2}', '{"step": "1", "text": ""}', "{"])
def test_samples_that_are_none_are_refused(line: str, tmp_path: Path) -> None:
    run = written(tmp_path / "run", [val(0, 4.0)])
    (run / "samples.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"samples\.jsonl: not as train.py writes it$"):
        write_report(run, run / REPORT)


def test_the_command_line_writes_into_the_runs_folder(tmp_path: Path) -> None:
    run = written(tmp_path / "run", [val(0, 4.0)])
    done = script("glyphgpt/reports/run_report.py", str(run))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run / REPORT}: written\n", "")
    assert (run / REPORT).read_bytes().startswith(b"<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "error: name one run: "),
        (["a", "b"], "error: name one run: "),
        (["missing"], "error: missing/metrics.jsonl: no metrics there; name the folder of a run\n"),
        (["a", "--output=x"], "error: command line: unknown key --output; did you mean 'out'?\n"),
    ],
)
def test_words_that_will_not_do(words: list[str], said: str) -> None:
    done = script("glyphgpt/reports/run_report.py", *words)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


class Browser:
    """Chromium, which shows pages of runs."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, run: Path, width: int = 1200) -> None:
        """Write a run's page and open it in a window of that width, in pixels."""
        write_report(run, run / REPORT)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get((run / REPORT).as_uri())
        deadline = time.monotonic() + 10
        while not self.all("svg text") and self.all("svg") and time.monotonic() < deadline:
            time.sleep(0.01)  # curves are drawn with the first frame

    def all(self, selector: str) -> list[Any]:
        """Every element of a kind."""
        return list(self.driver.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        """The first element of a kind."""
        return self.driver.find_element("css selector", selector)

    def curve(self) -> str:
        """The validation loss as it is drawn."""
        return str(self.one("path.val").get_attribute("d"))

    def text(self, selector: str) -> str:
        """An element's text, as it is and not as it is laid out."""
        return str(self.one(selector).get_attribute("textContent"))

    def complaints(self) -> list[dict[str, Any]]:
        """What the browser's console has been told since the last look."""
        return list(self.driver.get_log("browser"))


@pytest.fixture(scope="module")
def browser(browser: Any) -> Browser:
    """The same browser, which shows pages of runs."""
    return Browser(browser)


@pytest.fixture(scope="module")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, whose time does not pass evenly."""
    out_dir = tmp_path_factory.mktemp("runs") / "trained"
    train.main(tiny_settings(data_dir, out_dir, learning_rate=0.01, max_steps=30))
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [{**row, "seconds": row["step"] ** 2 / 10} for row in rows]
    (out_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out_dir


def test_the_axis_can_be_changed(run: Path, browser: Browser) -> None:
    browser.open(run)
    curves = {}
    for key, title in (("step", "steps"), ("tokens", "tokens seen"), ("seconds", "seconds")):
        browser.one(f"input[value={key}]").click()
        curves[key] = browser.curve()
        assert title in [text.text for text in browser.all("svg text")]
    assert len(browser.all("svg")) == 4
    assert curves["step"] != curves["seconds"]
    assert browser.complaints() == []


def test_pointing_at_a_curve_or_arrow_keys_read_it_out(run: Path, browser: Browser) -> None:
    browser.open(run)
    assert re.fullmatch(r"training [\d.]+ at step 30 validation [\d.]+ at step 30 ", browser.text("figcaption"))
    browser.one("svg").send_keys("\ue011")  # Home
    assert "at step 1" in browser.text("figcaption")
    browser.one("svg").send_keys("\ue014")  # arrow to the right
    assert "at step 2" in browser.text("figcaption")
    browser.driver.execute_script("document.activeElement.blur()")
    place = browser.one("svg").rect
    browser.driver.execute_cdp_cmd(
        "Input.dispatchMouseEvent",
        {"type": "mouseMoved", "x": place["x"] + place["width"] / 2, "y": place["y"] + place["height"] / 2},
    )
    assert re.search(r"training [\d.]+ at step 1[3-6] ", browser.text("figcaption"))
    assert browser.complaints() == []


def test_samples_can_be_stepped_through(run: Path, browser: Browser) -> None:
    browser.open(run)
    texts = [json.loads(line)["text"] for line in (run / "samples.jsonl").read_text().splitlines()]
    seen = [(browser.text("#sample"), browser.text("#about"))]
    while browser.one("button").is_enabled():
        browser.one("button").click()
        seen.append((browser.text("#sample"), browser.text("#about")))
    assert [text for text, _ in reversed(seen)] == texts
    assert len(set(texts)) > 1
    assert [about.split(",")[0] for _, about in reversed(seen)] == ["step 0", "step 10", "step 20", "step 30"]
    browser.one("input[type=range]").send_keys("\ue010")  # End
    assert browser.text("#sample") == texts[-1]
    assert browser.complaints() == []


@pytest.mark.parametrize("width", [320, 360, 768, 1200])
def test_no_width_scrolls_sideways(width: int, run: Path, browser: Browser) -> None:
    browser.open(run, width)
    browser.one("summary").click()
    size = "document.documentElement.scrollWidth, document.documentElement.clientWidth"
    scrolled, shown = browser.driver.execute_script(f"return [{size}]")
    assert scrolled == shown <= width
    assert browser.complaints() == []


def test_hostile_text_is_shown_as_text(tmp_path: Path, browser: Browser) -> None:
    name = "</script><b>&lt;" + "x" * 80
    run = written(tmp_path / name.replace("/", "⁄"), [val(0, 4.0)], [(0, HOSTILE)], dataset="</table><i>")
    browser.open(run, 360)
    assert browser.text("#sample") == SHOWN
    assert browser.text("#name") == str(run)
    assert '"</table><i>"' in browser.text("#changed")
    assert not browser.all("b, i, table table")
    assert len(browser.all("script")) == 2
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") == 360
    assert browser.complaints() == []


def test_a_script_or_an_image_from_elsewhere_is_refused(run: Path, browser: Browser) -> None:
    browser.open(run)
    browser.driver.execute_script(
        "const script = document.createElement('script'); script.textContent = 'window.broken = true';"
        "const image = document.createElement('img'); image.src = 'https://127.0.0.1:9/x.png';"
        "document.body.append(script, image);"
    )
    assert browser.driver.execute_script("return window.broken") is None
    refused = [complaint["message"] for complaint in browser.complaints()]
    assert len(refused) == 2
    assert all("Content Security Policy" in message for message in refused)


@pytest.mark.parametrize(
    "rows",
    [
        [val(0, 4.0)],
        [val(0, None)],
        [val(0, 4.0), val(10, 4.0)],
        [val(0, 4.0), val(10, None), val(20, -1e-7), val(30, 1e200)],
        [{**TRAIN, "step": 1, "loss": 3.0, "tokens": 64, "seconds": 0.5}],
    ],
    ids=["one evaluation", "no number", "level", "far apart", "no evaluation"],
)
def test_odd_runs_have_a_sensible_page(rows: list[dict[str, Any]], tmp_path: Path, browser: Browser) -> None:
    browser.open(written(tmp_path / "run", rows))
    drawn = "".join(element.get_attribute("outerHTML") for element in browser.all("svg"))
    assert "NaN" not in drawn
    assert "Infinity" not in drawn
    assert bool(drawn) == (rows[0]["loss"] is not None)
    assert "No samples were kept" in browser.text("main")
    assert browser.complaints() == []
