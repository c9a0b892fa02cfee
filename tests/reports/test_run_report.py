"""The report of a run: its data, and its page in a browser, where Chromium and its driver are installed."""

import base64
import hashlib
import json
import re
import signal
import sys
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
from conftest import page_json, script, tiny_settings
from glyphgpt.data.dataset import load_dataset
from glyphgpt.data.tokenizers import decode
from glyphgpt.errors import UserError
from glyphgpt.files import REPORT
from glyphgpt.reports import run_report
from glyphgpt.reports.run_report import MAX_POINTS, LiveReport, page_data, subsample, write_report
from glyphgpt.reports.templates import render
from glyphgpt.settings import Mode

HOSTILE = (
    "</script><script>alert(1)</script><b>bold</b> &amp; <!-- \0\x1b[31m\x7f \u2028 \ud800 \u202eright \U0001f30d שלום"
)
VISIBLE_HOSTILE = (
    "</script><script>alert(1)</script><b>bold</b> &amp; <!-- ␀␛[31m␡ \u2028 \ufffd \u202eright \U0001f30d שלום"
)
TRAIN = {"kind": "train", "learning_rate": 0.01, "grad_norm": 1.5}


def write_run(
    folder: Path, rows: list[dict[str, Any]], samples: list[tuple[int, str]] | None = None, **changes: Any
) -> Path:
    """Write a run's folder as train.py does, without checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = tiny_settings(folder, folder, **changes).model_dump(exclude=set(Mode.model_fields))
    (folder / "config.toml").write_bytes(tomli_w.dumps(settings).encode())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if samples is not None:
        lines = [json.dumps({"step": step, "text": text}) + "\n" for step, text in samples]
        (folder / "samples.jsonl").write_text("".join(lines))
    return folder


def val(step: int, loss: float | None, seconds: float = 0.0) -> dict[str, Any]:
    """Return a validation row."""
    return {"kind": "val", "step": step, "loss": loss, "tokens": 64 * step, "seconds": seconds}


def highlights(run: Path) -> dict[str, str]:
    """Return the numbers at the top of a run's page."""
    return {name: value for name, value, _ in page_data(run)["highlights"]}


def test_training_writes_a_report_and_logs_its_path(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(tiny_settings(data_dir, tmp_path, report=True))
    assert capsys.readouterr().out.endswith(f"report: {tmp_path / REPORT}\n")
    data = page_data(tmp_path)
    assert (tmp_path / REPORT).read_text(encoding="utf-8").count(json.dumps(data["samples"])) == 1
    assert data["outcome"] == "All 20 steps done."
    assert [sample["caption"].split(",")[0] for sample in data["samples"]] == ["step 10", "step 20"]
    assert data["rows"]["val"]["step"] == [10, 20]
    assert data["rows"]["train"]["step"] == list(range(1, 21))
    assert (highlights(tmp_path)["Parameters"], highlights(tmp_path)["Tokens"]) == ("6,880", "1,280")
    assert data["commands"][1][1].endswith(f"--resume {tmp_path} --max_steps=40")


def test_the_report_can_be_turned_off(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(tiny_settings(data_dir, tmp_path, report=False))
    assert not (tmp_path / REPORT).exists()
    assert "report:" not in capsys.readouterr().out


def test_an_interrupted_run_has_a_report_with_the_command_to_resume(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InterruptedTrainer(train.Trainer):
        def step(self, batch: torch.Tensor) -> train.Update:
            metrics = super().step(batch)
            if self.state.step == 6:
                signal.raise_signal(signal.SIGTERM)
            return metrics

    monkeypatch.setattr(train, "Trainer", InterruptedTrainer)
    with pytest.raises(SystemExit) as stop:
        train.main(tiny_settings(data_dir, tmp_path, report=True, log_every=5))
    assert stop.value.code == 128 + signal.SIGTERM
    assert (tmp_path / REPORT).exists()
    data = page_data(tmp_path)
    assert data["outcome"] == "Interrupted at step 6 of 20.", "step 6 is in the checkpoint, but not in the metrics"
    assert data["commands"][1] == ("Continue training", f"python train.py --resume {tmp_path}")


def test_a_run_that_is_interrupted_before_its_first_row_has_a_report(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class InterruptedTrainer(train.Trainer):
        def step(self, batch: torch.Tensor) -> train.Update:
            signal.raise_signal(signal.SIGTERM)
            return super().step(batch)

    settings = tiny_settings(data_dir, tmp_path, report=True, log_every=5)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "Trainer", InterruptedTrainer)
        train.main(settings)
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-2].startswith("interrupted at step 1 of 20 by SIGTERM, saved; resume it: ")
    assert "warning" not in captured.err
    assert page_data(tmp_path)["outcome"] == "Interrupted at step 1 of 20."
    train.main(settings.model_copy(update={"resume": True}))
    assert page_data(tmp_path)["outcome"] == "All 20 steps done."


def test_the_report_is_written_during_the_run(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages: list[dict[str, Any]] = []

    class ReadingTrainer(train.Trainer):
        def step(self, batch: torch.Tensor) -> train.Update:
            pages.append(page_json(tmp_path / REPORT))
            self.report.next_time = 0  # evaluations of a small run are close together
            return super().step(batch)

    monkeypatch.setattr(train, "Trainer", ReadingTrainer)
    train.main(tiny_settings(data_dir, tmp_path, report=True))
    assert capsys.readouterr().out.index(f"report: {tmp_path / REPORT}, renewed") < 200
    assert [page["running"] for page in pages] == [True] * 20
    assert (pages[0]["outcome"], pages[9]["outcome"]) == ("Running: step 0 of 20.",) * 2
    assert re.fullmatch(r"Running: step 10 of 20, about [\d.]+ s left\.", pages[10]["outcome"])
    assert [len(page["samples"]) for page in pages] == [0] * 10 + [1] * 10
    assert page_json(tmp_path / REPORT)["running"] is False


def test_writing_the_report_takes_a_small_part_of_the_time(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, written = [100.0], []

    def write(*_: object, **__: object) -> None:
        written.append(clock[0])
        clock[0] += 0.1  # as long as a page takes

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(run_report, "write_report", write)
    report = LiveReport(tmp_path, lambda _: None, enabled=True)
    report.begin()
    for _ in range(200):
        clock[0] += 0.2
        report.renew()
    assert len(written) == 1 + 8
    report.finish(load_dataset(data_dir / "small", data_dir))
    assert len(written) == 10


def test_the_report_of_a_finished_run_says_what_is_copied_and_shows_the_gap(data_dir: Path, tmp_path: Path) -> None:
    dataset = load_dataset(data_dir / "small", data_dir)
    start = 2000
    copy = decode(dataset.tokenizer, dataset.train.slice(start, start + 30))
    rows = [{"kind": "train", "step": step, "loss": 1 / step, "tokens": step, "seconds": step} for step in (10, 20)]
    run = write_run(tmp_path / "run", [*rows, val(20, 0.5, seconds=100)], samples=[(10, copy), (20, f"?{copy}?!!")])
    data = page_data(run, dataset=dataset)
    assert re.search(r"last sample .*: 88% \(the longest has 30 characters\); of the validation text", data["novelty"])
    assert highlights(run)["Gap to training loss"] == "+0.4250", "0.5 minus the mean of 1/10 and 1/20"
    assert page_data(run)["novelty"] == "", "without the dataset"
    rows[-1]["seconds"] = 0.001
    too_short = write_run(tmp_path / "short", rows, samples=[(20, copy)])
    assert page_data(too_short, dataset=dataset)["novelty"] == ""


def test_training_only_warns_if_the_report_cannot_be_written(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / REPORT).mkdir()
    train.main(tiny_settings(data_dir, tmp_path, report=True))
    captured = capsys.readouterr()
    assert re.fullmatch(rf"warning: {tmp_path / REPORT}: could not be written: [^\n]+\n", captured.err)
    assert "best validation loss" in captured.out
    assert (tmp_path / "last.safetensors").exists()


def test_a_run_stopped_early_is_reported_with_the_command_to_resume(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path, patience=2, max_steps=50, learning_rate=1e-30, min_lr=0))
    data = page_data(tmp_path)
    assert data["outcome"] == "Stopped early at step 30: no better loss in 2 evaluations."
    assert data["commands"][1][1].endswith(" --patience=0")


def test_the_best_evaluation_is_the_first_with_the_lowest_loss(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [val(0, 3.0), val(10, 2.0), val(20, 2.5), val(30, 2.0)])
    assert page_data(run)["highlights"][0] == ("Best validation loss", "2.0000", "nats per token, at step 10")


@pytest.mark.parametrize(
    ("last_rows", "loss"),
    [
        ([{**val(20, 2.25), "kind": "best"}], "2.2500"),
        ([{**val(20, 2.25), "kind": "best"}, val(30, 2.5)], "2.0000"),  # the run was continued
    ],
    ids=["at the end", "before"],
)
def test_the_best_loss_is_that_on_the_whole_split_at_the_end(
    last_rows: list[dict[str, Any]], loss: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", [val(10, 2.0), val(20, 2.5), *last_rows], [(20, "to be")])
    data = page_data(run)
    assert data["highlights"][0] == ("Best validation loss", loss, "nats per token, at step 10")
    assert data["rows"].keys() == {"train", "val"}, "the curve is of evaluations of the same text"
    assert data["samples"][0]["caption"] == "step 20, validation loss 2.5000"


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
def test_missing_numbers_are_dashes(rows: list[dict[str, Any]], loss: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows)
    assert highlights(run)["Best validation loss"] == loss
    assert highlights(run)["Parameters"] == "–", "only a checkpoint has the vocabulary size"
    write_report(run, run / REPORT)


def test_a_run_without_steps_or_samples_has_a_report(data_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_settings(data_dir, tmp_path, max_steps=0, sample_tokens=0, report=True))
    data = page_data(tmp_path)
    assert (data["samples"], data["outcome"]) == ([], "All 0 steps done.")
    (tmp_path / "samples.jsonl").unlink()  # as in older runs
    assert page_data(tmp_path) | {"written": 0} == data | {"written": 0}


def test_settings_are_formatted_as_in_toml(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [val(0, 4.0)], dataset="grün", learning_rate=1e-5, min_lr=0.0)
    rows = {row["key"]: row for group in page_data(run)["settings"] for row in group["rows"]}
    assert (rows["dataset"]["value"], rows["dataset"]["default"]) == ('"grün"', '"shakespeare_char"')
    assert (rows["learning_rate"]["value"], rows["bias"]["value"]) == ("1e-05", "false")
    assert "resume" not in rows


@given(st.integers(0, 10 * MAX_POINTS))
def test_subsampling_keeps_the_last_row_and_equal_distances(length: int) -> None:
    kept = subsample(list(range(length)))
    assert len(kept) == length if length <= MAX_POINTS else MAX_POINTS / 2 < len(kept) <= MAX_POINTS
    assert kept[-1:] == list(range(length))[-1:]
    assert len({after - before for before, after in pairwise(kept)}) <= 1


@given(st.text())
def test_any_text_survives_in_the_page_without_markup(text: str) -> None:
    page = render(REPORT, {"text": text})
    inside = page.partition(' id="data">')[2].partition("</script>")[0]
    assert "<" not in inside
    assert json.loads(inside) == {"text": text}
    page.encode()


def test_the_page_allows_only_its_own_script_and_style(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [val(0, 4.0)], [(0, HOSTILE)])
    write_report(run, run / REPORT)
    page = (run / REPORT).read_text(encoding="utf-8")
    for name in ("style", "script"):
        [inside] = re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page
    assert not re.search(r"innerHTML|https?://(?!www\.w3\.org/2000/svg)|\bsrc=|\bhref=", page)


@pytest.mark.parametrize("line", ["7", "{}", '{"step": 1, "text": 2}', '{"step": "1", "text": ""}', "{"])
def test_malformed_samples_are_refused(line: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [val(0, 4.0)])
    (run / "samples.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"samples\.jsonl: not as train.py writes it$"):
        write_report(run, run / REPORT)


def test_the_command_line_writes_into_the_runs_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [val(0, 4.0)])
    done = script("glyphgpt/reports/run_report.py", str(run))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{run / REPORT}: written\n", "")
    assert (run / REPORT).read_bytes().startswith(b"<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name one run: "),
        (["a", "b"], "name one run: "),
        (["missing"], "missing/metrics.jsonl: no metrics there; name the folder of a run"),
        (["a", "--output=x"], "command line: unknown key --output; did you mean 'out'?"),
    ],
)
def test_command_line_mistakes(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run_report.py", *words])
    with pytest.raises(UserError) as error:
        run_report.main()
    assert str(error.value).startswith(message)


class Browser:
    """Opens reports in Chromium."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, run: Path, width: int = 1200) -> None:
        """Write a run's report and open it in a window of this width in pixels; below 600, on a phone."""
        write_report(run, run / REPORT)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get((run / REPORT).as_uri())
        deadline = time.monotonic() + 10
        while not self.all("svg text") and self.all("svg") and time.monotonic() < deadline:
            time.sleep(0.01)  # the page draws its curves in the first animation frame

    def all(self, selector: str) -> list[Any]:
        """Return the elements that match a CSS selector."""
        return list(self.driver.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        """Return the first element that matches a CSS selector."""
        return self.driver.find_element("css selector", selector)

    def curve(self) -> str:
        """Return the path of the validation loss."""
        return str(self.one("path.val").get_attribute("d"))

    def text(self, selector: str) -> str:
        """Return the text content of the first element that matches, as it is before layout."""
        return str(self.one(selector).get_attribute("textContent"))

    def console_messages(self) -> list[dict[str, Any]]:
        """Return the messages of the browser's console since the last call."""
        return list(self.driver.get_log("browser"))


@pytest.fixture(scope="module")
def browser(browser: Any) -> Browser:
    """The shared browser, wrapped."""
    return Browser(browser)


@pytest.fixture(scope="module")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run; its times are replaced so that steps and seconds are not proportional."""
    out_dir = tmp_path_factory.mktemp("runs") / "trained"
    train.main(tiny_settings(data_dir, out_dir, learning_rate=0.01, max_steps=30))
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [{**row, "seconds": row["step"] ** 2 / 10} for row in rows]
    (out_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out_dir


def test_the_x_axis_can_be_changed(run: Path, browser: Browser) -> None:
    browser.open(run)
    curves = {}
    for key, title in (("step", "steps"), ("tokens", "tokens seen"), ("seconds", "seconds")):
        browser.one(f"input[value={key}]").click()
        curves[key] = browser.curve()
        assert title in [text.text for text in browser.all("svg text")]
    assert len(browser.all("svg")) == 4
    assert curves["step"] != curves["seconds"]
    assert browser.console_messages() == []


def test_the_mouse_and_arrow_keys_read_points_of_a_curve(run: Path, browser: Browser) -> None:
    browser.open(run)
    assert re.fullmatch(r"training [\d.]+ at step 30 validation [\d.]+ at step 30 ", browser.text("figcaption"))
    browser.one("svg").send_keys("\ue011")  # Home
    assert "at step 1" in browser.text("figcaption")
    browser.one("svg").send_keys("\ue014")  # right arrow
    assert "at step 2" in browser.text("figcaption")
    browser.driver.execute_script("document.activeElement.blur()")
    chart = browser.one("svg").rect
    browser.driver.execute_cdp_cmd(
        "Input.dispatchMouseEvent",
        {"type": "mouseMoved", "x": chart["x"] + chart["width"] / 2, "y": chart["y"] + chart["height"] / 2},
    )
    assert re.search(r"training [\d.]+ at step 1[3-6] ", browser.text("figcaption"))
    assert browser.console_messages() == []


def test_the_buttons_and_the_slider_select_a_sample(run: Path, browser: Browser) -> None:
    browser.open(run)
    texts = [json.loads(line)["text"] for line in (run / "samples.jsonl").read_text().splitlines()]
    seen = [(browser.text("#sample"), browser.text("#caption"))]
    while browser.one("button").is_enabled():
        browser.one("button").click()
        seen.append((browser.text("#sample"), browser.text("#caption")))
    assert [text for text, _ in reversed(seen)] == texts
    assert len(set(texts)) > 1
    assert [caption.split(",")[0] for _, caption in reversed(seen)] == ["step 10", "step 20", "step 30"]
    browser.one("input[type=range]").send_keys("\ue010")  # End
    assert browser.text("#sample") == texts[-1]
    assert browser.console_messages() == []


def test_the_page_of_an_unfinished_run_renews_itself_in_its_place(tmp_path: Path, browser: Browser) -> None:
    rows, samples = [val(0, 4.0), val(1, 3.5, 10)], [(0, "one"), (1, "two"), (2, "three")]
    run = write_run(tmp_path / "run", rows, samples[:2], max_steps=4)
    write_report(run, run / REPORT, running=True)
    browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.driver.get((run / REPORT).as_uri())
    assert re.fullmatch(r"Written \d+ s ago\. This page renews itself\.", browser.text("#age"))
    browser.driver.execute_script("""
        document.querySelector("input[value=seconds]").click();
        document.getElementById("all").open = true;
        document.querySelector("[aria-label='previous sample']").click();
        scrollTo(0, 300);
    """)
    write_run(run, [*rows, val(2, 3.25, 20)], samples, max_steps=4)
    write_report(run, run / REPORT, running=True)
    deadline = time.monotonic() + 20
    outcome = "return document.getElementById('outcome')?.textContent ?? ''"  # at once, as the page may be replaced
    while "step 2 of 4" not in browser.driver.execute_script(outcome):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.2)  # for the first frame, after which the page scrolls
    place = "return [xKey, document.getElementById('all').open, scrollY]"
    assert browser.driver.execute_script(place) == ["seconds", True, 300]
    assert browser.text("#sample") == "one"
    assert browser.console_messages() == []


def test_the_page_of_a_run_that_died_says_so(tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", [val(0, 4.0), val(1, 3.5, 10)], [], max_steps=4)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 1000)
    write_report(run, run / REPORT, running=True)
    browser.driver.get((run / REPORT).as_uri())
    assert re.match(r"Nothing was written for 17 min\. .* continued with the command below\.", browser.text("#age"))


@pytest.mark.parametrize("width", [320, 360, 768, 1200])
def test_no_width_needs_horizontal_scrolling(width: int, run: Path, browser: Browser) -> None:
    browser.open(run, width)
    browser.one("summary").click()
    size = "document.documentElement.scrollWidth, document.documentElement.clientWidth"
    content, window = browser.driver.execute_script(f"return [{size}]")
    assert content == window <= width
    assert browser.console_messages() == []


def test_hostile_text_is_shown_as_text(tmp_path: Path, browser: Browser) -> None:
    name = "</script><b>&lt;" + "x" * 80
    run = write_run(tmp_path / name.replace("/", "⁄"), [val(0, 4.0)], [(0, HOSTILE)], dataset="</table><i>")
    browser.open(run, 360)
    assert browser.text("#sample") == VISIBLE_HOSTILE
    assert browser.text("#name") == str(run)
    assert '"</table><i>"' in browser.text("#changed")
    assert not browser.all("b, i, table table")
    assert len(browser.all("script")) == 2
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") == 360
    assert browser.console_messages() == []


def test_injected_scripts_and_images_are_blocked(run: Path, browser: Browser) -> None:
    browser.open(run)
    browser.driver.execute_script(
        "const script = document.createElement('script'); script.textContent = 'window.broken = true';"
        "const image = document.createElement('img'); image.src = 'https://127.0.0.1:9/x.png';"
        "document.body.append(script, image);"
    )
    assert browser.driver.execute_script("return window.broken") is None
    messages = [entry["message"] for entry in browser.console_messages()]
    assert len(messages) == 2
    assert all("Content Security Policy" in message for message in messages)


@pytest.mark.parametrize(
    "rows",
    [
        [val(0, 4.0)],
        [val(0, None)],
        [val(0, 4.0), val(10, 4.0)],
        [val(0, 4.0), val(10, None), val(20, -1e-7), val(30, 1e200)],
        [{**TRAIN, "step": 1, "loss": 3.0, "tokens": 64, "seconds": 0.5}],
    ],
    ids=["one evaluation", "no number", "constant", "large range", "no evaluation"],
)
def test_unusual_runs_have_a_valid_page(rows: list[dict[str, Any]], tmp_path: Path, browser: Browser) -> None:
    browser.open(write_run(tmp_path / "run", rows))
    charts = "".join(element.get_attribute("outerHTML") for element in browser.all("svg"))
    assert "NaN" not in charts
    assert "Infinity" not in charts
    assert bool(charts) == (rows[0]["loss"] is not None)
    assert "This run has no samples." in browser.text("main")
    assert browser.console_messages() == []
