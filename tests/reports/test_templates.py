"""Pages as a browser shows them; skipped where Chromium or its driver is not installed."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_attention_maps import HOSTILE, read_characters

from glyphgpt.reports.attention_maps import page

pytest.importorskip("selenium")
from selenium.webdriver import ActionChains, Chrome, Keys
from selenium.webdriver.common.by import By

TEXT = "La pizza est sortie du four\net elle était délicieuse"


def show(browser: Chrome, text: str, folder: Path, *, width: int = 1200, scheme: str = "light") -> None:
    """Open a text's page in a window, or a phone, of so many pixels."""
    path = folder / "attention.html"
    path.write_text(page(read_characters(text), text), encoding="utf-8")
    window = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
    preferred = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", preferred)
    browser.get(path.as_uri())


def pixels(browser: Chrome) -> Any:
    """What the window shows, (height, width, 4)."""
    image = pytest.importorskip("matplotlib.image")
    return image.imread(io.BytesIO(browser.get_screenshot_as_png()), format="png")


def complaints(browser: Any) -> list[Any]:
    """What the browser has written to its console since it was last asked."""
    return list(browser.get_log("browser"))


def texts(browser: Chrome, selector: str) -> list[str]:
    return [str(element.text) for element in browser.find_elements(By.CSS_SELECTOR, selector)]


def heats(browser: Chrome) -> list[float]:
    """How warm each place of the text is."""
    script = "return [...document.querySelectorAll('#text span')].map((span) => span.style.getPropertyValue('--heat'))"
    return list(map(float, browser.execute_script(script)))


def pointed(browser: Chrome) -> list[str]:
    """What is outlined in the text."""
    script = "return [...document.querySelectorAll('#text [aria-selected=true]')].map((s) => s.textContent)"
    return list(browser.execute_script(script))


def click(browser: Chrome, selector: str, number: int = 0) -> None:
    browser.find_elements(By.CSS_SELECTOR, selector)[number].click()


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (360, "light"), (360, "dark")])
def test_the_page_shows_without_errors_and_without_scrolling_sideways(
    width: int, scheme: str, browser: Chrome, tmp_path: Path
) -> None:
    for text in (TEXT, HOSTILE * 3, "unbroken" * 30, "a"):
        show(browser, text, tmp_path, width=width, scheme=scheme)
        shown = pixels(browser)
        assert shown.shape[:2] == (800, width)
        colours = (255 * shown).astype(np.int64) @ 256 ** np.arange(shown.shape[2])
        assert len(np.unique(colours)) > 50, "not blank"
        assert (shown[0, 0, 0] > 0.5) == (scheme == "light")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert complaints(browser) == []
        assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_pointing_and_clicking_change_the_picture(browser: Chrome, tmp_path: Path) -> None:
    show(browser, TEXT, tmp_path)
    before, first = pixels(browser), heats(browser)
    click(browser, "#text span", TEXT.index("elle"))
    assert pointed(browser) == ["e"]
    assert heats(browser) != first
    assert (pixels(browser) != before).any()
    assert texts(browser, "#place")[0].startswith("e, character 32 of ")
    last = TEXT.index("elle")
    assert all(heats(browser)[: last + 1])
    assert not any(heats(browser)[last + 1 :]), "what comes after is not seen"
    click(browser, "#text span", 3)
    assert pointed(browser) == ["p"]
    assert texts(browser, "#pinned")[0].startswith("Pinned")


def test_the_mouse_points_until_a_click_pins(browser: Chrome, tmp_path: Path) -> None:
    show(browser, TEXT, tmp_path)
    spans = browser.find_elements(By.CSS_SELECTOR, "#text span")
    mouse = ActionChains(browser)
    for place in (4, 11):
        mouse.move_to_element(spans[place]).perform()
        assert pointed(browser) == [TEXT[place]]
    mouse.click().move_to_element(spans[4]).perform()
    assert pointed(browser) == [TEXT[11]], "pinned"
    mouse.move_to_element(spans[11]).click().move_to_element(spans[4]).perform()
    assert pointed(browser) == [TEXT[4]], "another click lets go"


def test_the_weights_shown_are_those_of_the_layer_and_head(browser: Chrome, tmp_path: Path) -> None:
    show(browser, TEXT, tmp_path)
    weights = read_characters(TEXT).weights
    expected = {0: weights[0].mean(0), 1: weights[0, 0], 2: weights[0, 1], 3: weights[1].mean(0), 5: weights[1, 1]}
    for choice, head in expected.items():
        click(browser, "#layers label", choice)
        assert np.square(heats(browser)) == pytest.approx(head[-1].numpy(), abs=0.003)
        strongest = max(float(weight) for weight in head[-1])
        assert texts(browser, "#seen .number")[0] == f"{100 * strongest:.1f}\u202f%"
    assert texts(browser, "#looks") == ["Looks at: layer 2, head 2"]


def test_words_are_means_over_who_looks_and_sums_over_where(browser: Chrome, tmp_path: Path) -> None:
    show(browser, TEXT, tmp_path)
    click(browser, "#text span", TEXT.index("elle"))
    click(browser, "#words")
    assert pointed(browser) == ["elle"]
    weights = read_characters(TEXT).weights[1].mean(0)
    start = TEXT.index("elle")
    to_pizza = weights[start : start + 4, 3:8].sum(1).mean().item()
    assert heats(browser)[2] ** 2 == pytest.approx(to_pizza, abs=0.003)
    assert sum(np.square(heats(browser))) == pytest.approx(1, abs=0.02)
    click(browser, "#words")
    assert pointed(browser) == ["e"]
    assert len(heats(browser)) == len(TEXT)


def test_probabilities_are_those_after_the_place(browser: Chrome, tmp_path: Path) -> None:
    show(browser, TEXT, tmp_path)
    click(browser, "#text span", 1)
    chances = read_characters(TEXT).chances[1]
    assert len(texts(browser, "#next li")) == len(chances)
    assert texts(browser, "#next .number")[0] == f"{100 * chances[0][1]:.1f}\u202f%"
    assert texts(browser, "#next .came .piece") == ["space ✓"]
    assert texts(browser, "#seen .piece")[0] in ("La", "La␣pizza"), "a place is shown within its word"


def test_arrows_move_and_escape_lets_go(browser: Chrome, tmp_path: Path) -> None:
    show(browser, TEXT, tmp_path)
    text = browser.find_element(By.ID, "text")
    click(browser, "#text span", 0)
    for key, place in ((Keys.ARROW_RIGHT, 1), (Keys.ARROW_LEFT, 0), (Keys.ARROW_LEFT, 0), (Keys.END, len(TEXT) - 1)):
        text.send_keys(key)
        assert texts(browser, "#place")[0].endswith(f"character {place + 1} of {len(TEXT)}")
        assert text.get_attribute("aria-activedescendant") == f"unit-{place}"
    text.send_keys(Keys.ESCAPE)
    assert not texts(browser, "#pinned")[0].startswith("Pinned")


def test_white_space_has_a_name(browser: Chrome, tmp_path: Path) -> None:
    show(browser, TEXT, tmp_path)
    for character, name in ((" ", "space"), ("\n", "new line")):
        click(browser, "#text span", TEXT.index(character))
        assert texts(browser, "#place")[0].startswith(f"{name}, character ")


def test_hostile_text_is_shown_as_text(browser: Chrome, tmp_path: Path) -> None:
    show(browser, HOSTILE, tmp_path)
    shown = browser.execute_script("return document.getElementById('text').textContent")
    marked = HOSTILE.replace("\n", "↵\n").replace("\0", "␀").replace("\u202e", "U+202E")  # lest it turn the rest
    assert shown == marked
    assert browser.execute_script("return document.querySelectorAll('#text :not(span), #about :not(bdi)').length") == 0
    assert texts(browser, "#about bdi")[0].startswith("</script><b>$x_1$␣{data}␣😀␣שלום")


def test_the_page_runs_no_other_script_and_loads_nothing(browser: Chrome, tmp_path: Path) -> None:
    show(browser, TEXT, tmp_path)
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
    assert len(complaints(browser)) >= 3
