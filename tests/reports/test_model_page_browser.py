"""A model's page in a browser; skipped where Chromium or its driver is not installed."""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from conftest import MODERN, tiny_settings
from glyphgpt.files import BEST
from glyphgpt.inference.loading import open_checkpoint
from glyphgpt.reports.model_page import write_model_page

pytest.importorskip("selenium")
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By

TEXT = "the king, my lord,\nto be or not"
HOSTILE = "</script><b>$x_1$ {data} 😀 שלום é\n\t\0\r\u202e</SCRIPT>"


@pytest.fixture(scope="module")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a context of 16 tokens."""
    out_dir = tmp_path_factory.mktemp("runs") / "my run"
    train.main(tiny_settings(data_dir, out_dir, max_steps=30, eval_every=10, learning_rate=0.01, **MODERN))
    return out_dir


class Page:
    """The page of a run in a browser."""

    def __init__(self, browser: Chrome, run: Path, folder: Path) -> None:
        self.browser, self.run, self.path = browser, run, folder / "page.html"

    def open(self, text: str, *, view: Any = "surprise", width: int = 1200, scheme: str = "light") -> None:
        """Open the page with a text in a window of this width in pixels; below 600, on a phone."""
        checkpoint, tokenizer = open_checkpoint(self.run / BEST, Path("data"))
        write_model_page(self.path, checkpoint, tokenizer, title="my run", text=text, view=view)
        window = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.browser.get(self.path.as_uri())
        self.wait(lambda: self.find("#go").text == "Continue" and "reading" not in self.text("#numbers"))

    def wait(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        """Wait until a condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the page did not get there"
            time.sleep(0.02)

    def find(self, selector: str, index: int = 0) -> Any:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)[index]

    def text(self, selector: str) -> str:
        return str(self.find(selector).text)

    @property
    def written(self) -> str:
        """The text in the text area."""
        return str(self.find("#text").get_property("value"))

    def script(self, code: str, *args: Any) -> Any:
        return self.browser.execute_script(code, *args)

    def set(self, control: str, value: float) -> None:
        """Move a slider."""
        self.script("document.getElementById(arguments[0]).value = arguments[1]; update()", control, value)

    def heats(self) -> list[float]:
        """Return the strength of the color of each piece."""
        code = (
            "return [...document.querySelectorAll('#copy .heat')].map((span) => span.style.getPropertyValue('--heat'))"
        )
        return list(map(float, self.script(code)))

    def point(self, piece: int, *, click: bool = False) -> None:
        """Move the mouse over a piece of the text, and click it."""
        box = self.script("return spans[arguments[0]].getBoundingClientRect()", piece)
        actions = ActionChains(self.browser)
        place = int(box["x"] + box["width"] / 2), int(box["y"] + box["height"] / 2)
        actions.w3c_actions.pointer_action.move_to_location(*place)  # type: ignore[no-untyped-call]
        if click:
            actions.click()
        actions.perform()

    def messages(self) -> list[Any]:
        """Return the messages of the browser's console since the last call."""
        return list(self.browser.get_log("browser"))  # type: ignore[no-untyped-call]


@pytest.fixture
def page(browser: Chrome, run: Path, tmp_path: Path) -> Page:
    return Page(browser, run, tmp_path)


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (360, "light"), (360, "dark")])
def test_the_page_appears_without_errors_or_horizontal_scrolling(width: int, scheme: str, page: Page) -> None:
    image = pytest.importorskip("matplotlib.image")
    for text, view in (
        (TEXT, "surprise"),
        (HOSTILE * 3, "attention"),
        ("unbroken" * 30, "attention"),
        ("t", "plain"),
        ("", "plain"),
    ):
        page.open(text, view=view, width=width, scheme=scheme)
        pixels = image.imread(io.BytesIO(page.browser.get_screenshot_as_png()), format="png")
        assert pixels.shape[:2] == (800, width)
        colors = (255 * pixels).astype(np.int64) @ 256 ** np.arange(pixels.shape[2])
        assert len(np.unique(colors)) > 50, "the page is not blank"
        assert (pixels[0, 0, 0] > 0.5) == (scheme == "light")
        assert page.script("return document.documentElement.scrollWidth") <= width
        assert page.messages() == []
        assert page.script("return performance.getEntriesByType('resource').length") == 0


def test_an_empty_page_begins_to_write(page: Page) -> None:
    page.open("")
    assert len(page.written) == 1 + 300
    assert page.written.startswith("\n")


def test_a_prompt_is_continued_stopped_and_continued_again(page: Page) -> None:
    page.open("a")
    area = page.find("#text")
    area.send_keys(Keys.CONTROL, "a")
    area.send_keys("the king")
    page.set("length", 2000)
    seen = page.browser.execute_async_script("""
        const [done] = arguments, go = document.getElementById("go");
        go.click();
        setTimeout(() => { done(go.textContent); go.click(); });
    """)
    assert seen == "Stop"
    page.wait(lambda: page.text("#go") == "Continue")
    first = page.written
    assert first.startswith("the king")
    assert len(first) < 2000
    page.set("length", 20)
    page.find("#go").click()
    page.wait(lambda: page.text("#go") == "Continue")
    assert page.written.startswith(first)
    assert len(page.written) == len(first) + 20


def test_the_seed_decides_the_text_and_another_try_changes_it(page: Page) -> None:
    texts = []
    for _ in range(2):
        page.open("the ")
        page.set("length", 40)
        page.set("temperature", 1.5)
        page.find("#go").click()
        page.wait(lambda: len(page.written) == 44)
        texts.append(page.written)
    page.find("#retry").click()
    page.wait(lambda: len(page.written) == 44 and page.written != texts[0])
    assert texts[0] == texts[1]
    assert page.written.startswith("the ")


def test_a_click_on_an_alternative_continues_from_there(page: Page) -> None:
    page.open(TEXT)
    page.set("length", 10)
    page.point(4, click=True)
    page.point(12)
    assert page.text("#inspect-heading").endswith("“k”")
    assert page.script("return document.querySelector('#copy .selected').textContent") == "k"
    bars = page.browser.find_elements(By.CSS_SELECTOR, "#probs button")
    other = next(
        bar for bar in bars if "actual" not in str(bar.get_attribute("class")) and len(bar.text.split()[0]) == 1
    )
    chosen = other.text.split()[0]
    other.click()
    page.wait(lambda: page.text("#go") == "Continue")
    assert page.written.startswith("the " + chosen)
    assert len(page.written) == 15


def test_surprise_is_that_of_the_model(page: Page) -> None:
    page.open(TEXT)
    bits = np.array(page.script("return story.bits").copy()[1:])
    assert page.heats() == pytest.approx([0, *np.minimum(1, bits / 8)], abs=1e-3)
    assert f"{bits.mean():.2f} bits per character" in page.text("#numbers")
    page.point(9)
    assert f"{bits[8]:.2f} bits" in page.text("#selected")
    page.find("#views label", 2).click()
    assert not any(page.heats())


def test_attention_is_shown_for_each_head_and_word(page: Page) -> None:
    page.open(TEXT[:14], view="attention")
    page.point(10)
    heats = np.square(page.heats())
    assert sum(heats) == pytest.approx(1, abs=0.02)
    assert not any(heats[10:])
    for box in range(3):  # the mean and two heads of the first layer
        page.find("#layers label", box).click()
        page.point(10)
        code = "const {start, weights} = story.attention(10, 0, arguments[0]); return Array.from(weights)"
        heads = [page.script(code, head) for head in ([0, 1] if box == 0 else [box - 1])]
        assert np.square(page.heats())[:10] == pytest.approx(np.mean(heads, axis=0), abs=0.003)
    assert page.text("#keys-heading") == "Layer 1, head 2 looked at"
    page.find("#words").click()
    page.point(10)
    words = np.square(page.heats())
    assert words[0] == words[1] == words[2] == pytest.approx(sum(heads[0][:3]), abs=0.01)


def test_the_keyboard_selects_and_continues(page: Page) -> None:
    page.open("the king")
    page.set("length", 10)
    area = page.find("#text")
    area.send_keys(Keys.HOME)
    assert "first character" in page.text("#selected")
    area.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.text("#inspect-heading").endswith("“e”")
    area.send_keys(Keys.ESCAPE)
    assert page.text("#inspect-heading") == "What the model expects next"
    area.send_keys(Keys.CONTROL, Keys.ENTER)
    page.wait(lambda: len(page.written) == 18)


def test_unknown_characters_are_named_and_skipped(page: Page) -> None:
    page.open("the kiqng")
    assert page.text("#unknown").endswith("does not see them: “q” (U+0071)")
    assert page.script("return document.querySelector('#copy .unknown').textContent") == "q"
    assert page.script("return story.tokens.length") == 8


def test_everything_has_a_label(page: Page) -> None:
    page.open(TEXT, view="attention")
    tree = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = ("button", "slider", "textbox", "radio", "checkbox", "DisclosureTriangle")
    controls = [node for node in tree if node.get("role", {}).get("value") in roles]
    assert len(controls) > 10
    assert all(node["name"]["value"] for node in controls)


def test_the_page_describes_the_run_and_holds_no_path_or_training_text(page: Page, data_dir: Path) -> None:
    page.open(TEXT)
    assert page.browser.title == "my run"
    about = page.text("#about")
    assert "small" in about
    assert "30 steps" in about
    assert page.text("#sample-caption") == "step 30"
    source = page.path.read_text(encoding="utf-8")
    assert str(page.run.parent) not in source
    assert str(data_dir) not in source


def test_hostile_text_is_shown_as_text(page: Page) -> None:
    page.open(HOSTILE)
    assert page.written == HOSTILE.replace("\r", "\n")
    assert page.script("return document.querySelectorAll('#copy :not(span)').length") == 0


def test_the_page_runs_no_other_script_and_loads_nothing(page: Page) -> None:
    page.open(TEXT)
    refused = page.browser.execute_async_script("""
        const [done] = arguments;
        const refused = [];
        document.addEventListener("securitypolicyviolation", (event) => {
            refused.push(event.effectiveDirective);
            if (refused.length === 3) done(refused.sort());
        });
        const script = document.createElement("script");
        script.textContent = "window.harm = true";
        document.body.append(script);
        new Image().src = "data:image/gif;base64,R0lGODlhAQABAAAAACw=";
        fetch("http://localhost:9/").catch(() => {});
    """)
    assert refused == ["connect-src", "img-src", "script-src-elem"]
    assert page.script("return window.harm") is None
    assert len(page.messages()) >= 3
