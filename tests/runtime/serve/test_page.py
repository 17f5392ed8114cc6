"""The page at /, driven in a headless Chromium: what a person does with it, by mouse, by keyboard, on a phone."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from support.browser import Page, chromium, opened
from support.bundles import tint_bundle
from support.endless import endless_bundle
from support.scenes import scene
from support.served import Served, png_of, served, until
from support.stepped import stepped
from tilewright.runtime import load

ROOT = Path(__file__).parents[3]
HTML = (ROOT / "runtime" / "serve" / "page.html").read_text()
IMAGE = scene(48, 64)
browsed = pytest.mark.skipif(chromium() is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    made = {"steps": stepped, "tint": tint_bundle, "endless": endless_bundle}
    return {name: make(root / name) for name, make in made.items()}


@pytest.fixture(scope="module")
def service(bundles) -> Iterator[Served]:
    with served(*bundles.values()) as service:
        yield service


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with opened(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(browser, service) -> Iterator[Page]:
    browser.errors.clear()
    browser.look(1280, 800)
    browser.go(f"{service.url}/")
    browser.until("document.getElementById('model').value")
    yield browser
    assert not [error for error in browser.errors if '"canceled": true' not in error and "status of 4" not in error]


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "photo.png").write_bytes(png_of(IMAGE))
    return tmp_path / "photo.png"


def choose(page: Page, file: Path, model: str = "steps") -> None:
    page.run(f"$('model').value = '{model}'; $('model').onchange()")
    page.choose("#file", file)
    page.until("state.seen")


def picture(page: Page) -> np.ndarray:
    """The pixels of the restored picture, as the page shows it."""
    code = """(() => { const i = $('after'), c = document.createElement('canvas');
        c.width = i.naturalWidth; c.height = i.naturalHeight;
        const x = c.getContext('2d'); x.drawImage(i, 0, 0);
        return [c.width, c.height, [...x.getImageData(0, 0, c.width, c.height).data]]; })()"""
    width, height, values = page.run(code)
    return np.array(values, np.uint8).reshape(height, width, 4)[:, :, :3]


@browsed
def test_an_image_is_restored_part_by_part_compared_and_downloaded(page, file, bundles, tmp_path) -> None:
    choose(page, file)
    assert "64 \u00d7 48 px, becomes 64 \u00d7 48 px" in page.run("$('caption').textContent")
    page.run("window.painted = 0; const plain = paint; paint = (...a) => { painted++; plain(...a); }")
    page.run("document.querySelector('[data-name=lift]').value = '0.25'; $('go').click()")
    page.until("!state.running && state.saved")
    with load(bundles["steps"], threads=1) as restorer:
        restored = restorer(IMAGE, lift=0.25)
    assert np.array_equal(picture(page), restored) and page.run("painted") == 12  # tiles of 16 px
    assert page.run("[$('save').download, $('save').hidden, $('error').hidden]") == ["photo-restored.png", False, True]
    assert page.run("$('picture').style.getPropertyValue('--split')") == "50%"
    page.run("$('split').focus()")
    page.key("ArrowRight", 39)
    assert page.run("$('picture').style.getPropertyValue('--split')") == "51%"
    box = page.run(
        "(() => { const b = $('picture').getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; })()"
    )
    for kind, at in (("mousePressed", 0.5), ("mouseMoved", 0.25), ("mouseReleased", 0.25)):
        page.mouse(kind, box[0] + at * box[2], box[1] + box[3] / 2)
    assert page.run("$('split').value") == "25"
    page.run("$('full').click()")
    assert page.run("$('picture').getBoundingClientRect().width * devicePixelRatio") == 64


@browsed
def test_the_inputs_follow_from_the_bundle(page, file, bundles) -> None:
    choose(page, file, "tint")
    kinds = "[...document.querySelectorAll('[data-name]')].map(f => [f.dataset.name, f.type, f.min || '', f.max || ''])"
    assert page.run(kinds) == [
        ["prompt", "textarea", "", ""], ["gain", "number", "-8", "8"], ["seed", "number", "0", ""],
        ["scale", "number", "1", "16"], ["color", "select-one", "", ""], ["output_format", "select-one", "", ""],
    ]  # fmt: skip
    assert page.run("document.querySelector('[data-name=prompt]').placeholder") == "bright bright bright"
    page.run("document.querySelector('[data-name=prompt]').value = 'dim warm'")
    slide = "document.querySelector('#inputs input[type=range]')"
    page.run(f"{slide}.value = -1.52; {slide}.dispatchEvent(new Event('input'))")
    page.run("document.querySelector('[data-name=scale]').value = 2; $('form').requestSubmit()")
    page.until("!state.running && state.saved")
    with load(bundles["tint"], threads=1) as restorer:
        assert np.array_equal(picture(page), restorer(IMAGE, prompt="dim warm", gain=-1.52, scale=2))


@browsed
@pytest.mark.parametrize("event", ["paste", "drop"])
def test_an_image_can_be_pasted_or_dropped(page, event) -> None:
    numbers = ",".join(map(str, png_of(IMAGE)))
    page.run(
        f"""(() => {{ const d = new DataTransfer();
        d.items.add(new File([new Uint8Array([{numbers}])], 'other.png', {{ type: 'image/png' }}));
        document.body.dispatchEvent('{event}' === 'paste'
            ? new ClipboardEvent('paste', {{ clipboardData: d, bubbles: true }})
            : new DragEvent('drop', {{ dataTransfer: d, bubbles: true }})); }})()"""
    )
    page.until("state.seen")
    assert page.run("$('caption').textContent").startswith("other.png: 64 \u00d7 48 px")
    assert page.run("$('go').disabled") is False


@browsed
def test_an_error_is_shown_and_a_restoration_can_be_cancelled(page, file, tmp_path, service) -> None:
    (tmp_path / "cut.png").write_bytes(png_of(IMAGE)[:-300])
    page.choose("#file", tmp_path / "cut.png")
    page.until("!$('go').disabled")
    page.run("$('go').click()")
    page.until("!state.running")
    assert "replace the damaged or cut file" in page.run("$('error').textContent")
    choose(page, file, "endless")
    page.run("$('go').click()")
    until(lambda: bool(service.service.running), "it runs")
    assert page.run("[$('go').disabled, $('work').hidden, $('error').hidden]") == [True, False, True]
    page.run("$('stop').click()")
    until(lambda: not service.service.running, "it is cancelled")
    page.until("!state.running")
    assert page.run("[$('caption').textContent, $('error').hidden]") == ["Cancelled.", True]


@browsed
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_shows_all_without_scrolling_sideways_and_every_control_has_a_name(page, file, dark) -> None:
    page.look(390, 844, phone=True, dark=dark)
    assert page.run("getComputedStyle($('stage')).display") == "none"  # an empty frame says nothing
    choose(page, file, "tint")
    page.run("$('more').open = true; $('go').click()")
    page.until("!state.running && state.saved")
    assert page.run("document.documentElement.scrollWidth") == 390
    controls = "[...document.querySelectorAll('button, a, input, select, textarea')].filter(e => e.offsetParent)"
    unnamed = f"{controls}.filter(e => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map(e => e.id)"
    assert page.run(unnamed) == []
    seen = f"{controls}.filter(e => !e.classList.contains('unseen'))"
    low = f"{seen}.filter(e => e.getBoundingClientRect().height < 32).map(e => e.id)"
    assert page.run(low) == []
    assert page.run("$('view').getBoundingClientRect().width") > 300
    assert (page.run("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 21)") == dark


@browsed
def test_a_service_with_a_token_asks_for_it(browser, bundles, file) -> None:
    with served(bundles["steps"], token=b"secret") as service:
        browser.go(f"{service.url}/")
        browser.until("!$('ask').hidden")
        for token, text in (("wrong", "This is not the service's token."), ("secret", "")):
            browser.run(f"$('token').value = '{token}'; $('token').onchange()")
            browser.until(f"$('error').textContent === \"{text}\" && ($('model').value || '{token}' === 'wrong')")
        choose(browser, file)
        browser.run("$('go').click()")
        browser.until("!state.running && state.saved")


def test_the_page_needs_no_network(service) -> None:
    answer = service.client.get("/")
    assert answer.text == HTML and answer.headers["content-type"].startswith("text/html")
    places = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s'\"]*", HTML)) - {"http://www.w3.org/2000/svg"}
    assert not places and not re.search(r"\b(src|href)=\"(?!data:)", HTML)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(place) -> None:
    block = re.findall(r":root \{(.*?)\}", HTML, re.DOTALL)[place]
    named = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})", block))
    named = {n: c if len(c) == 7 else "#" + "".join(2 * d for d in c[1:]) for n, c in named.items()}
    pairs = [("text", "panel"), ("text", "page"), ("quiet", "panel"), ("quiet", "page"), ("on-accent", "accent")]
    pairs += [("accent", "page"), ("accent", "soft"), ("bad", "bad-soft"), ("text", "soft")]
    for front, back in pairs:
        low, high = sorted((luminance(named[front]), luminance(named[back])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, f"{front} on {back}"
