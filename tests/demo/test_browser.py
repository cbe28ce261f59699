"""The page in a real browser (Debian's chromium, by playwright): draw, paint a hole, compare, reload the link."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from test_easel import described

from ar_jax.data import Info
from ar_jax.demo.easel import Easel, Request
from ar_jax.demo.settings import Board, Choice, Wish
from ar_jax.nets.conditioning import Caption
from ar_jax.options import Sampler

pages, playwright = pytest.importorskip("ar_jax.demo.page"), pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


@pytest.fixture(scope="module")
def easel(tmp_path_factory):
    return Easel(str(described(tmp_path_factory.mktemp("browser") / "mine", "causal")), Sampler())


def test_a_page_for_captions(tmp_path):
    words = Info(captions=True, text="minilm", text_rows=4, text_width=6)
    easel = Easel(str(described(tmp_path / "mine", "causal", Caption(16), words)), Sampler())
    page = pages.Page(easel, Board(easel.drawer), ["a red heart", "a snowman"], tmp_path)
    panel = [Choice().way, *(setting.value for setting in page.board.settings.values())]
    wish, _ = page.wish(("a cat\n\n a dog ", 3.0, "7", "", 0, True, True, *panel, *panel))
    assert wish == Wish((), ("a cat", "a dog"), 3, 7, Choice(), Choice())
    assert page.opened("http://here/?captions=a%20b&seed=3#top")[:4] == ["http://here/", "a b", 4, "3"]
    with pytest.raises(ValueError, match=r"all-MiniLM-L6-v2|needs"):
        list(easel.draw(Request(page.board.sampling(wish.choice), captions=wish.captions)))


@pytest.fixture(scope="module")
def address(easel, tmp_path_factory):
    page = pages.Page(easel, Board(easel.drawer), [], tmp_path_factory.mktemp("drawn"))
    yield pages.launch(page, "127.0.0.1", 0, block=False)
    page.blocks.close()


@pytest.fixture(scope="module")
def tab(address):
    """An open page, and what it asked of other servers."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 1400})
        tab.set_default_timeout(40_000)
        tab.outside, tab.faults = [], []
        inside = ("data:", "blob:", address.rstrip("/"))
        tab.on(
            "request", lambda request: tab.outside.append(request.url) if not request.url.startswith(inside) else None
        )
        tab.on("pageerror", lambda error: tab.faults.append(str(error)))
        yield tab
        browser.close()


def opened(tab, address, seed):
    tab.goto(address)
    tab.wait_for_selector("#draw")
    tab.wait_for_function(
        "seed => [...document.querySelectorAll('input, textarea')].some((x) => x.value === seed)", arg=str(seed)
    )


def until(tab, where, words):
    tab.wait_for_function(
        "([where, words]) => document.querySelector(where)?.innerText.includes(words)", arg=[where, words]
    )


def drawn(tab, number, button="#draw", of=""):
    """Clicks, and waits for the pictures of a number; what is said then."""
    tab.click(button)
    tab.wait_for_selector(f"#{of}drawn img[src*='{number:06d}_00.png']", state="attached")
    until(tab, f"#{of}told", "calls an image")
    return tab.inner_text(f"#{of}told")


def picture(tab, tmp_path):
    """The grid that is downloaded, and the facts inside."""
    with tab.expect_download() as download:
        tab.click("#file")
    download.value.save_as(tmp_path / "grid.png")
    with PngImageFile(tmp_path / "grid.png") as file:
        return np.asarray(file), json.loads(file.text["ar_jax"])


def test_the_page_in_a_browser(tab, address, easel, tmp_path):
    # a link is opened and drawn
    opened(tab, f"{address}?labels=bee&labels=cat&count=2&seed=17&guidance.weight=3", 17)
    assert "Causal" in tab.inner_text("h2 + p")
    tab.click("#draw")
    until(tab, "#told", "compiling program")
    until(tab, "#told", "calls an image: 16 of the generator")  # picture 0
    first, facts = picture(tab, tmp_path)
    assert facts["settings"] == "labels=bee&labels=cat&count=2&seed=17&guidance.weight=3.0"
    assert facts["sampling"]["guidance"]["weight"] == 3
    assert tab.url.partition("?")[2] == facts["settings"], "the address holds what was drawn"
    # a number is turned: nothing compiles
    before = easel.compiled
    tab.get_by_label("number input for temperature.value").first.fill("0.2")
    tab.get_by_label("number input for temperature.value").first.press("Enter")
    assert "compiled" not in drawn(tab, 1)
    second, facts = picture(tab, tmp_path)
    assert facts["settings"].endswith("&temperature.value=0.2")
    assert easel.compiled == before
    assert (first != second).any()
    # the address, opened anew, draws the same
    opened(tab, tab.url, 17)
    drawn(tab, 2)
    np.testing.assert_array_equal(picture(tab, tmp_path)[0], second)
    # two settings side by side
    tab.check("#compare input")
    tab.wait_for_selector("#other-told", state="attached")
    assert "16 of the generator" in drawn(tab, 4, of="other-")
    assert re.search(r"&b\.way=own$", tab.url)
    # a picture is put on the canvas, and a hole painted into it
    tab.uncheck("#compare input")
    tab.click("#drawn .thumbnail-item >> nth=0")
    view = tab.locator("#canvas .view")
    view.scroll_into_view_if_needed()
    tab.wait_for_function(
        "[...document.querySelector('#canvas .view').getContext('2d').getImageData(160, 160, 1, 1).data].slice(0, 3).join() !== '138,138,138'"
    )
    box = view.bounding_box()
    at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])  # noqa: E731
    tab.mouse.move(*at(0.3, 0.8))
    tab.mouse.down()
    tab.mouse.move(*at(0.7, 0.8), steps=5)
    tab.mouse.up()
    drawn(tab, 5, "#fill")
    filled, _ = picture(tab, tmp_path)
    side = slice(2, 10)  # of the first picture in the grid
    np.testing.assert_array_equal(filled[side, side][:4], second[side, side][:4], "above the hole nothing moves")
    # an image of one's own is moved under the frame
    own = np.random.default_rng(0).integers(256, size=(8, 8, 3)).astype(np.uint8)
    Image.fromarray(own).save(tmp_path / "own.png")
    tab.set_input_files("#canvas input[type=file]", tmp_path / "own.png")
    tab.click("#canvas [data-tool=move]")
    view.scroll_into_view_if_needed()
    box = view.bounding_box()
    tab.mouse.move(*at(0.5, 0.2))
    tab.mouse.down()
    tab.mouse.move(*at(0.5, 0.7), steps=5)
    tab.mouse.up()
    drawn(tab, 6, "#fill")
    np.testing.assert_array_equal(picture(tab, tmp_path)[0][side, side][4:], own[:4], "the image lies where it was put")
    # what cannot be done is said
    opened(tab, f"{address}?seed=5&guidance.height=3", 0)
    until(tab, "#told", "there is no setting 'guidance.height'")
    assert not tab.outside
    assert not tab.faults
