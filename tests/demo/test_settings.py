"""What can be set, links, the canvas' messages and the files of drawings: the page without gradio."""

import base64
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from safetensors.numpy import save_file
from test_easel import described

import ar_jax.demo
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.jacobi import Jacobi
from ar_jax.decode.logits import Filter
from ar_jax.demo import __main__ as command
from ar_jax.demo import canvas, pictures
from ar_jax.demo.settings import Board, Choice, Wish
from ar_jax.nets.conditioning import Caption
from ar_jax.options import Sampler
from ar_jax.sampler import open_drawer

SHAPE = 8, 8, 3


@pytest.fixture(scope="module")
def boards(tmp_path_factory):
    """Of a model of each kind, where no judge of images lies."""
    place = tmp_path_factory.mktemp("boards")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return {name: Board(open_drawer(str(described(place / name, name)), Sampler())) for name in ("causal", "masked")}


def test_settings_are_those_of_the_model_with_its_words(boards):
    settings = boards["causal"].settings
    weight, top_p, cache, window = (
        settings[name] for name in ("guidance.weight", "filter.top_p", "decoder.cache", "decoder.window")
    )
    assert (weight.kind, weight.value, weight.doc) == (float, 1.5, "Of the condition; 1 is unguided.")
    assert (top_p.least, top_p.most) == (0, 1)
    assert cache.choices == ("own", "int8")
    assert (window.value, window.ways) == (16, ("jacobi",))
    assert {name for name, setting in settings.items() if setting.turned} == {
        "guidance.weight", "guidance.last", "temperature.value", "filter.top_k", "filter.top_p",
    }  # fmt: skip
    assert "fields" not in settings
    steps = boards["masked"].settings["order.steps"]
    assert (steps.kind, steps.value, steps.turned) == (int, 5, False)
    assert steps.doc.startswith("of decoding, at most one per slot")
    assert "order.steps" not in settings


def test_ways_that_need_a_judge_are_there_where_it_is(boards, tmp_path, monkeypatch):
    assert boards["causal"].ways == ("own", "jacobi")
    assert list(boards["causal"].missing) == ["best_of", "search"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    save_file({"Dense_0/kernel": np.zeros((2, 2), np.float32)}, "checkpoints/judge_mnist5k.safetensors")
    board = Board(open_drawer(str(described(tmp_path / "run", "causal")), Sampler()))
    assert board.ways == ("own", "best_of", "jacobi", "search")
    assert board.settings["decoder.candidates"].ways == ("best_of", "search")
    words = Info(captions=True, text="minilm", text_rows=2, text_width=4)
    board = Board(open_drawer(str(described(tmp_path / "words", "causal", Caption(16), words)), Sampler()))
    assert board.ways == ("own", "jacobi")
    assert board.missing["search"] == "its judge looks at the label, but this model is not asked for one"


def test_choices_become_ways_to_sample(boards):
    board = boards["causal"]
    made = board.sampling(
        Choice("jacobi", {"guidance.weight": 3, "decoder.window": "8", "filter.banned": "1,2", "decoder.segments": 2})
    )
    assert (made.guidance, made.filter, made.decoder) == (Interval(3.0), Filter(banned=(1, 2)), Jacobi(8))
    assert board.sampling(Choice()).decoder == board.sampling(Choice(values={"decoder.window": 4})).decoder
    assert boards["masked"].sampling(Choice(values={"order.steps": 3})).fields == (("order.steps", 3),)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("guidance.height=3", r"there is no setting 'guidance.height'; this model has guidance.weight, "),
        ("guidance.weight=warm", r"guidance.weight is 'warm'; it must be a number"),
        ("guidance.weight=nan", r"guidance.weight is nan; it must be"),
        ("temperature.value=-1", r"temperature.value is -1.0; it must be a finite number of 0 or more"),
        ("filter.top_p=1.5", r"filter.top_p is 1.5; it must be 0 to 1"),
        ("filter.top_k=2.5", r"filter.top_k is '2.5'; it must be a whole number"),
        ("decoder.cache=int4", r"decoder.cache is 'int4'; it must be one of own, int8"),
        ("filter.banned=1;2", r"--filter.banned is '1;2'; give numbers"),
        ("soft=perhaps", r"soft is 'perhaps'; it must be true or false"),
        ("seed=18446744073709551616", r"seed is 18446744073709551616; it must be 0 to"),
        ("b.way=sideways", r"there is no way 'sideways' to sample; there are own, jacobi"),
        ("way=search", r"the way 'search' to sample cannot be used here: decoder\.judge\.network\.path is 'checkpoints/judge_mnist5k"),
        ("b.decoder.window=0&b.way=jacobi", r"decoder.window is 0; it must be 1 or more"),
    ],
)
def test_links_that_do_not_fit_are_refused_in_a_sentence(boards, query, message):
    with pytest.raises(ValueError, match=message):
        boards["causal"].read(query)


def test_a_link_holds_all_settings_and_only_what_differs(boards):
    board = boards["causal"]
    wish = Wish(
        ("bee", "a & b"), (), 9, 2**63 + 1, Choice(values={"guidance.weight": 3.25, "soft": True, "filter.banned": "1,2"}),
        Choice("jacobi", {"decoder.window": 8}),
    )  # fmt: skip
    link = board.link(wish)
    assert board.read(f"?{link}") == wish
    assert link.startswith("labels=bee&labels=a%20%26%20b&count=9&seed=9223372036854775809&guidance.weight=3.25&")
    assert board.link(Wish(choice=Choice(values={"guidance.weight": 1.5, "soft": False}))) == ""
    assert board.read("").other is None
    assert board.read("captions=a&captions=b").captions == ("a", "b")


def test_without_gradio_the_command_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "ar_jax.demo.page", raising=False)
    monkeypatch.delattr(ar_jax.demo, "page", raising=False)
    run = described(tmp_path / "mine", "causal")
    with pytest.raises(SystemExit, match=r"ar_jax\.demo: the page is made with gradio, .*; pip install 'gradio>=6'"):
        command.main([str(run)])


# The canvas


def said(image, **more):
    return json.dumps(json.loads(canvas.message(image)) | more)


def test_an_image_under_the_frame(tmp_path):
    image = np.random.default_rng(0).integers(256, size=SHAPE).astype(np.uint8)
    hole = np.zeros(SHAPE, np.uint8)
    hole[2:4, 5] = 255
    given = canvas.read(said(image, hole=json.loads(canvas.message(hole))["image"]), SHAPE)
    np.testing.assert_array_equal(given.image, image)
    np.testing.assert_array_equal(given.free, hole[..., 0] > 0)
    moved = canvas.read(said(image, at=[-0.25, 0.5]), SHAPE)  # two pixels up, four to the right
    np.testing.assert_array_equal(moved.image[:6, 4:], image[2:, :4])
    assert not moved.free[:6, 4:].any()
    assert moved.free.sum() == 64 - 24
    small = canvas.read(said(image, zoom=0.5, at=[0.25, 0.25]), SHAPE)
    assert (~small.free).sum() == 16
    assert not small.free[2:6, 2:6].any()
    wide = canvas.read(
        said(np.repeat(np.repeat(image, 2, 0), 4, 1), at=[0, -0.5], hole=json.loads(canvas.message(hole))["image"]),
        SHAPE,
    )
    assert wide.free.sum() == 2, "the middle of a wide image fills the frame"
    assert canvas.read(said(image), SHAPE, scales=2).free.all(), "finer scales of a whole image are drawn anew"
    assert canvas.read(said(image, at=[0.5, 0]), (8, 8, 1)).image.shape == (8, 8, 1)


def test_a_photo_lies_as_viewers_show_it():
    image = np.zeros((8, 8, 3), np.uint8)
    image[0] = 255
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter to the right
    Image.fromarray(image).save(file, format="PNG", exif=exif)
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    given = canvas.read(json.dumps({"image": url, "at": [0.5, 0]}), SHAPE)
    assert (given.image[4:, -1] == 255).all()
    assert (given.image[4:, :-1] == 0).all()


PLAIN = np.zeros(SHAPE, np.uint8)
EPS = (
    "data:image/png;base64," + base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n").decode()
)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("", "there is no image on the canvas"),
        ("{", "the canvas says what is no JSON"),
        ("[1]", "there is no image on the canvas"),
        (json.dumps({"image": "/etc/passwd"}), "the image on the canvas is no data URL"),
        (json.dumps({"image": "data:image/png;base64,@@"}), "the image on the canvas is no base64"),
        (json.dumps({"image": EPS}), "the image on the canvas cannot be read"),
        (said(PLAIN), "nothing is left to draw"),
        (said(PLAIN, at=[2, 0]), "nothing of the image is kept"),
        (said(PLAIN, zoom=1e-9), "zoom of the canvas is 1e-09; it must be 0.1 to 8"),
        (said(PLAIN, zoom=float("nan")), "zoom and at of the canvas"),
        (said(PLAIN, at="up"), "zoom and at of the canvas"),
        (said(PLAIN, at=[1, 2, 3]), "zoom and at of the canvas"),
        (said(PLAIN, hole=7), "the hole on the canvas is no data URL"),
    ],
)
def test_what_a_stranger_says_of_the_canvas_is_looked_at(message, words):
    with pytest.raises(ValueError, match=words):
        canvas.read(message, SHAPE)


def test_files_hold_the_settings(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(2, *SHAPE)).astype(np.uint8)
    grid, *each = pictures.save(tmp_path, 3, images, {"run": "mine", "settings": "seed=1"}, ("ant", "bee"))
    for path, image, name in zip(each, images, ("ant", "bee"), strict=True):
        with PngImageFile(path) as file:
            np.testing.assert_array_equal(np.asarray(file), image)
            facts = json.loads(file.text["ar_jax"])
        assert facts == {"run": "mine", "settings": "seed=1", "image": each.index(path), "condition": name}
    with PngImageFile(grid) as file:
        assert json.loads(file.text["ar_jax"]) == {"run": "mine", "settings": "seed=1"}
