"""The page of attention maps in a browser; skipped where Chromium or its driver is not installed."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_attention_maps import HOSTILE, maps_of

from glyphgpt.reports.attention_maps import render_page

pytest.importorskip("selenium")
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By

TEXT = "La pizza est sortie du four\net elle était délicieuse"


def open_page(browser: Chrome, text: str, folder: Path, *, width: int = 1200, scheme: str = "light") -> None:
    """Open the page of a text in a window of this width in pixels; below 600, on a phone."""
    path = folder / "attention.html"
    path.write_text(render_page(maps_of(text), text), encoding="utf-8")
    window = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(path.as_uri())


def pixels(browser: Chrome) -> Any:
    """Return a screenshot, (height, width, 4)."""
    image = pytest.importorskip("matplotlib.image")
    return image.imread(io.BytesIO(browser.get_screenshot_as_png()), format="png")


def console_messages(browser: Any) -> list[Any]:
    """Return the messages of the browser's console since the last call."""
    return list(browser.get_log("browser"))


def texts(browser: Chrome, selector: str) -> list[str]:
    return [str(element.text) for element in browser.find_elements(By.CSS_SELECTOR, selector)]


def heats(browser: Chrome) -> list[float]:
    """Return the square root of the weight shown for each key."""
    script = "return [...document.querySelectorAll('#text span')].map((span) => span.style.getPropertyValue('--heat'))"
    return list(map(float, browser.execute_script(script)))


def selected(browser: Chrome) -> list[str]:
    """Return the texts of the selected queries, of which there should be one."""
    script = "return [...document.querySelectorAll('#text [aria-selected=true]')].map((s) => s.textContent)"
    return list(browser.execute_script(script))


def click(browser: Chrome, selector: str, index: int = 0) -> None:
    browser.find_elements(By.CSS_SELECTOR, selector)[index].click()


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (360, "light"), (360, "dark")])
def test_the_page_appears_without_errors_or_horizontal_scrolling(
    width: int, scheme: str, browser: Chrome, tmp_path: Path
) -> None:
    for text in (TEXT, HOSTILE * 3, "unbroken" * 30, "a"):
        open_page(browser, text, tmp_path, width=width, scheme=scheme)
        image = pixels(browser)
        assert image.shape[:2] == (800, width)
        colors = (255 * image).astype(np.int64) @ 256 ** np.arange(image.shape[2])
        assert len(np.unique(colors)) > 50, "the page is not blank"
        assert (image[0, 0, 0] > 0.5) == (scheme == "light")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert console_messages(browser) == []
        assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_a_click_selects_and_pins_a_query(browser: Chrome, tmp_path: Path) -> None:
    open_page(browser, TEXT, tmp_path)
    pixels_before, heats_before = pixels(browser), heats(browser)
    query = TEXT.index("elle")
    click(browser, "#text span", query)
    assert selected(browser) == ["e"]
    assert heats(browser) != heats_before
    assert (pixels(browser) != pixels_before).any()
    assert texts(browser, "#query")[0].startswith("e, character 32 of ")
    assert all(heats(browser)[: query + 1])
    assert not any(heats(browser)[query + 1 :]), "later tokens have no weight"
    click(browser, "#text span", 3)
    assert selected(browser) == ["p"]
    assert texts(browser, "#pin-hint")[0].startswith("Pinned")


def test_the_mouse_selects_until_a_click_pins(browser: Chrome, tmp_path: Path) -> None:
    open_page(browser, TEXT, tmp_path)
    spans = browser.find_elements(By.CSS_SELECTOR, "#text span")
    mouse = ActionChains(browser)
    for index in (4, 11):
        mouse.move_to_element(spans[index]).perform()
        assert selected(browser) == [TEXT[index]]
    mouse.click().move_to_element(spans[4]).perform()
    assert selected(browser) == [TEXT[11]], "pinned"
    mouse.move_to_element(spans[11]).click().move_to_element(spans[4]).perform()
    assert selected(browser) == [TEXT[4]], "a second click unpins"


def test_the_weights_are_those_of_the_selected_layer_and_head(browser: Chrome, tmp_path: Path) -> None:
    open_page(browser, TEXT, tmp_path)
    weights = maps_of(TEXT).weights
    expected = {0: weights[0].mean(0), 1: weights[0, 0], 2: weights[0, 1], 3: weights[1].mean(0), 5: weights[1, 1]}
    for box, head in expected.items():
        click(browser, "#layers label", box)
        assert np.square(heats(browser)) == pytest.approx(head[-1].numpy(), abs=0.003)
        assert texts(browser, "#keys .number")[0] == f"{100 * head[-1].max().item():.1f}\u202f%"
    assert texts(browser, "#keys-heading") == ["Attention weights, layer 2, head 2"]


def test_weights_of_words_are_means_over_queries_and_sums_over_keys(browser: Chrome, tmp_path: Path) -> None:
    open_page(browser, TEXT, tmp_path)
    click(browser, "#text span", TEXT.index("elle"))
    click(browser, "#group-words")
    assert selected(browser) == ["elle"]
    weights = maps_of(TEXT).weights[1].mean(0)
    start = TEXT.index("elle")
    on_pizza = weights[start : start + 4, 3:8].sum(1).mean().item()
    assert heats(browser)[2] ** 2 == pytest.approx(on_pizza, abs=0.003)
    assert sum(np.square(heats(browser))) == pytest.approx(1, abs=0.02)
    click(browser, "#group-words")
    assert selected(browser) == ["e"]
    assert len(heats(browser)) == len(TEXT)


def test_the_predictions_are_those_after_the_query(browser: Chrome, tmp_path: Path) -> None:
    open_page(browser, TEXT, tmp_path)
    click(browser, "#text span", 1)
    predictions = maps_of(TEXT).predictions[1]
    assert len(texts(browser, "#predictions li")) == len(predictions)
    assert texts(browser, "#predictions .number")[0] == f"{100 * predictions[0][1]:.1f}\u202f%"
    assert texts(browser, "#predictions .actual .token") == ["space ✓"]
    assert texts(browser, "#keys .token")[0] in ("La", "La␣pizza"), "a key is shown within its word"


def test_arrow_keys_move_the_query_and_escape_unpins_it(browser: Chrome, tmp_path: Path) -> None:
    open_page(browser, TEXT, tmp_path)
    text = browser.find_element(By.ID, "text")
    click(browser, "#text span", 0)
    for key, index in ((Keys.ARROW_RIGHT, 1), (Keys.ARROW_LEFT, 0), (Keys.ARROW_LEFT, 0), (Keys.END, len(TEXT) - 1)):
        text.send_keys(key)
        assert texts(browser, "#query")[0].endswith(f"character {index + 1} of {len(TEXT)}")
        assert text.get_attribute("aria-activedescendant") == f"option-{index}"
    text.send_keys(Keys.ESCAPE)
    assert not texts(browser, "#pin-hint")[0].startswith("Pinned")


def test_white_space_has_a_name(browser: Chrome, tmp_path: Path) -> None:
    open_page(browser, TEXT, tmp_path)
    for character, name in ((" ", "space"), ("\n", "new line")):
        click(browser, "#text span", TEXT.index(character))
        assert texts(browser, "#query")[0].startswith(f"{name}, character ")


def test_hostile_text_is_shown_as_text(browser: Chrome, tmp_path: Path) -> None:
    open_page(browser, HOSTILE, tmp_path)
    shown = browser.execute_script("return document.getElementById('text').textContent")
    # U+202E would reverse the direction of the text after it
    assert shown == HOSTILE.replace("\n", "↵\n").replace("\0", "␀").replace("\u202e", "U+202E")
    assert browser.execute_script("return document.querySelectorAll('#text :not(span), #about :not(bdi)').length") == 0
    assert texts(browser, "#about bdi")[0].startswith("</script><b>$x_1$␣{data}␣😀␣שלום")


def test_the_page_runs_no_other_script_and_loads_nothing(browser: Chrome, tmp_path: Path) -> None:
    open_page(browser, TEXT, tmp_path)
    refused = browser.execute_async_script("""
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
    assert browser.execute_script("return window.harm") is None
    assert len(console_messages(browser)) >= 3
