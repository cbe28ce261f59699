"""The two commands end to end: a tiny tokenizer and generator of real digits."""

import contextlib
import dataclasses
import json
import re
import resource
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ar_jax import sample
from ar_jax.data import Data, Info, batches, open_source
from ar_jax.decode.guidance import Interval
from ar_jax.decode.sampling import Sampling, read_sampling
from ar_jax.files.models import open_model, write_json
from ar_jax.machine.sharding import make_mesh
from ar_jax.sampler import Drawn, in_batches
from ar_jax.train import __main__ as train
from ar_jax.train.checkpoint import save_params

CONFIG = """
from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.generators.causal import Causal
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.optim import Optim


def get_config():
    return Experiment(
        name="whole",
        data=Data(name="mnist5k", size=32, crop="random"),
        tokenizer=TokenizerStage(
            module=VQGAN((32, 32), features=4, mult=(1, 1, 2), res_blocks=0, latent=4, codes=16, code_features=4, groups=2),
            losses=Losses(lpips=0.0, adversarial=0.0),
            steps=4, batch=8, optim=Optim(lr=1e-3), log_every=2, preview_every=4, preview_images=4, save_every=2,
        ),
        generator=GeneratorStage(
            module=Causal(Transformer(2, 16, 2, hidden=24, dropout=0.1), Label(16), dropout=0.1),
            steps=6, batch=8, optim=Optim(lr=1e-2, ema=0.5), log_every=3, preview_every=6, preview_images=4,
            save_every=3, sampling=Sampling(Interval(2.0)),
        ),
    )
"""
QUIET = ("--tokenizer.preview-every", "0", "--generator.preview-every", "0")


def one_device(shape):
    return make_mesh(shape, jax.devices()[:1])


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One device unless a test says otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", one_device)
        patch.setattr(sample, "make_mesh", one_device)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    (root / "tiny.py").write_text(CONFIG)
    return root


def trained(place, *overrides):
    train.main([str(place / "tiny.py"), "--out", str(place), *map(str, overrides)])


@pytest.fixture(scope="module")
def run(place):
    trained(place)
    return place / "whole"


def metrics(run, stage):
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(command, *arguments):
    """The message of a command that must fail, and its exit code."""
    with pytest.raises(SystemExit) as caught:
        command([str(argument) for argument in arguments])
    assert caught.value.code not in (None, 0)
    return str(caught.value.code)


@contextlib.contextmanager
def full_disk(allowed):
    """No file can grow beyond `allowed` bytes, for root too: writes then fail as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, hard))  # Python ignores the signal that comes with it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# train.py


def test_a_run_folder_holds_both_stages_and_how_they_came_about(run, place):
    for stage, steps in (("tokenizer", ["2", "4"]), ("generator", ["3", "6"])):
        assert (run / stage / "model.json").is_file()
        assert sorted(path.name for path in (run / stage / "checkpoints").iterdir() if path.is_dir()) == steps
        assert list((run / stage).glob("events.out.tfevents*"))
    assert (run / "config.py").read_text() == CONFIG
    facts = json.loads((run / "run.json").read_text())
    assert facts["overrides"] == ["--out", str(place)]
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["experiment"]["generator"]["optim"]["lr"] == 1e-2
    model = open_model(run, "generator")
    assert model.info.classes == model.module.conditioning.classes == 10
    assert model.module.spec.n == 64
    assert read_sampling(model.settings["sampling"]) == Sampling(Interval(2.0))


def test_metrics_tell_loss_gradient_pace_and_quality(run):
    tokenizer, generator = metrics(run, "tokenizer"), metrics(run, "generator")
    assert [line["step"] for line in tokenizer] == [2, 4, 4]
    assert [line["step"] for line in generator] == [3, 6, 6]
    pace = {"loss", "grad_norm", "lr", "skipped", "images_per_second", "steps_per_second"}
    for line in (*tokenizer[:2], *generator[:2]):
        assert pace <= line.keys()
        assert all(np.isfinite(value) for value in line.values())
        assert line["images_per_second"] == pytest.approx(8 * line["steps_per_second"], rel=1e-3)
        assert line["images_per_second_per_chip"] == line["images_per_second"], "of one device"
        assert line["seconds_per_step"] == pytest.approx(1 / line["steps_per_second"], rel=1e-3)
        assert 0 <= line["input_wait"] <= 1
    assert {"psnr", "usage", "code_perplexity", "reconstruction", "codebook", "commit"} <= tokenizer[0].keys()
    held_out = {"held_out/psnr", "held_out/ssim", "held_out/usage", "held_out/code_perplexity"}
    assert tokenizer[2].keys() == {"step"} | held_out
    assert 0 < tokenizer[2]["held_out/usage"] <= 1
    assert generator[2].keys() == {"step", "held_out/loss"}
    assert generator[0]["loss"] == pytest.approx(np.log(16), abs=0.7)  # 16 codes, hardly trained
    assert generator[0]["lr"] == 0.01


def test_previews_are_grids_of_reconstructions_and_of_samples(run):
    with Image.open(run / "tokenizer" / "samples" / "0000004.png") as sheet:
        assert (sheet.size, sheet.mode) == ((10 * 34 + 2, 34 + 2), "RGB")  # 4 images, each beside its reconstruction
        shown = np.asarray(sheet)[2:34, 2:34]
    source = open_source(open_data(run, split="test"))
    np.testing.assert_array_equal(shown, source[0]["image"])
    with Image.open(run / "generator" / "samples" / "0000006.png") as sheet:
        drawn = np.asarray(sheet)[2:34]
    assert len({drawn[:, 2 + 34 * i : 34 + 34 * i].tobytes() for i in range(4)}) == 4, "four different images"


def open_data(run, **changes):
    data = open_model(run, "tokenizer").settings["data"]
    return Data(**data | changes)


def test_the_same_command_again_trains_nothing_and_says_so(run, place, capsys):
    before = content(run)
    trained(place)
    said = capsys.readouterr().out
    assert "tokenizer: all 4 updates are done (checkpoint 4" in said
    assert "generator: all 6 updates are done (checkpoint 6" in said
    assert content(run) == before


def test_a_run_stopped_twice_ends_in_the_same_numbers_as_one_that_was_not(run, place, capsys):
    name = ("--name", "stopped", *QUIET)
    trained(place, *name, "--tokenizer.steps", 2, "--generator.steps", 0)
    assert not (place / "stopped" / "generator" / "checkpoints").exists()
    trained(place, *name, "--generator.steps", 3)
    trained(place, *name)
    said = capsys.readouterr()
    assert "tokenizer: resumed at update 2" in said.out + said.err
    assert "generator: resumed at update 3" in said.out + said.err
    for stage in ("tokenizer", "generator"):
        for average in (True, False):
            whole, stopped = (open_model(folder, stage).params(average=average) for folder in (run, place / "stopped"))
            jax.tree.map(np.testing.assert_array_equal, whole, stopped)
        last = [line for line in metrics(run, stage) if "loss" in line][-1]
        again = [line for line in metrics(place / "stopped", stage) if "loss" in line][-1]
        assert (again["step"], again["loss"]) == (last["step"], last["loss"])
    different = jax.tree.map(
        lambda a, b: bool((a != b).any()),
        open_model(run, "generator").params(),
        open_model(run, "generator").params(average=False),
    )
    assert any(jax.tree.leaves(different)), "the average must differ from the weights"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("--generator.module.backbone.layers", 3), "another generator: module.backbone.layers is 2 there and 3 here"),
        (("--tokenizer.module.codes", 32), "another tokenizer: module.codes is 16 there and 32 here"),
    ],
)
def test_another_network_in_the_same_run_is_refused_and_its_first_field_named(run, place, override, message):
    before = content(run)
    said = refused(train.main, place / "tiny.py", "--out", place, *override)
    assert message in said
    assert "Give --name for a new run" in said
    assert content(run) == before, "what the run folder says of itself must stay true"


def test_a_mistyped_override_is_refused_with_the_near_name(place, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main([str(place / "tiny.py"), "--generator.optim.weight-deca", "0.1"])
    assert caught.value.code not in (None, 0)
    said = capsys.readouterr()
    assert "--generator.optim.weight-decay" in said.out + said.err
    assert not Path("runs/whole").exists()


def test_a_value_of_the_wrong_kind_is_refused(place, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main([str(place / "tiny.py"), "--generator.steps", "many"])
    assert caught.value.code not in (None, 0)
    said = capsys.readouterr()
    assert "generator.steps" in said.out + said.err


@pytest.mark.parametrize("name", ["configs/none.py", "none", "tests"])
def test_an_unknown_config_is_refused(name):
    assert f"'{name}' is no config file" in refused(train.main, name)


def test_a_file_without_get_config_is_refused(tmp_path):
    (tmp_path / "other.py").write_text("x = 1\n")
    assert "defines no get_config()" in refused(train.main, tmp_path / "other.py")


def test_the_config_kept_in_a_run_folder_goes_on_with_the_run(run, place, capsys):
    train.main([str(run / "config.py"), "--out", str(place)])
    assert "generator: all 6 updates are done" in capsys.readouterr().out
    assert (run / "config.py").read_text() == CONFIG


def test_a_disk_that_fills_up_while_checkpointing_ends_the_run_and_keeps_its_newest_checkpoint(run, place, capsys):
    shutil.copytree(run, place / "full")
    more = (place / "tiny.py", "--out", place, "--name", "full", *QUIET, "--generator.steps", 7)
    with full_disk(10000):
        said = refused(train.main, *more)
    assert "train.py: could not write a checkpoint" in said
    assert "newest complete checkpoint is step 6" in said
    kept, whole = (open_model(folder, "generator").params() for folder in (place / "full", run))
    jax.tree.map(np.testing.assert_array_equal, kept, whole)
    train.main([str(word) for word in more])
    said = capsys.readouterr()
    assert "generator: resumed at update 6" in said.out + said.err
    assert (place / "full" / "generator" / "checkpoints" / "7").is_dir()


# sample.py


def sampled(run, out, *options):
    sample.main([str(run), "--out", str(out), *map(str, options)])
    return out


@pytest.fixture(scope="module")
def drawn(run, place):
    """Twelve images as an .npz, drawn five at a time."""
    return sampled(run, place / "twelve.npz", "--count", 12, "--batch", 5)


def images_of(file):
    with np.load(file) as arrays:
        assert arrays.files == ["arr_0"]
        return arrays["arr_0"]


def test_an_npz_holds_uint8_images_and_nothing_else_is_left(drawn, place):
    images = images_of(drawn)
    assert (images.dtype, images.shape) == (np.uint8, (12, 32, 32, 3))
    assert len({image.tobytes() for image in images}) == 12
    assert not list(place.glob(".twelve*"))


def assert_same_images(a, b):
    """Tokens are the same to the bit; decoded in batches of another size, a pixel may round to the next of 256 levels."""
    apart = np.abs(images_of(a).astype(int) - images_of(b))
    assert apart.max() <= 1
    assert (apart > 0).mean() < 1e-3


def test_images_do_not_depend_on_the_batch_size(run, drawn, tmp_path):
    assert_same_images(sampled(run, tmp_path / "a.npz", "--count", 12, "--batch", 2), drawn)


def test_images_do_not_depend_on_the_number_of_devices(run, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "make_mesh", make_mesh)
    assert jax.device_count() == 8
    assert_same_images(sampled(run, tmp_path / "a.npz", "--count", 12, "--batch", 8), drawn)
    said = refused(sample.main, run, "--out", tmp_path / "b.npz", "--batch", 12)
    assert "--batch is 12; it must be a positive multiple of the 8 batch shares" in said


def test_images_can_be_resized(run, drawn, tmp_path):
    sampled(run, tmp_path / "large.npz", "--count", 12, "--batch", 5, "--resize", 64)
    large = images_of(tmp_path / "large.npz")
    assert large.shape == (12, 64, 64, 3)
    shrunk = large.reshape(12, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.corrcoef(shrunk.ravel(), images_of(drawn).ravel())[0, 1] > 0.95


def test_a_grid_shows_the_images_row_by_row(run, drawn, tmp_path):
    out = sampled(run, tmp_path / "grid.png", "--count", 12, "--batch", 5)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    with Image.open(out) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (2 * 34 + 2, 10 * 34 + 2, 3)  # a column per class
    for i, image in enumerate(images_of(drawn)):
        y, x = 2 + 34 * (i // 10), 2 + 34 * (i % 10)
        np.testing.assert_array_equal(pixels[y : y + 32, x : x + 32], image)
    assert (pixels[:2] == 255).all()
    same = sampled(run, tmp_path / "GRID.WEBP", "--count", 12, "--batch", 5)
    with Image.open(same) as sheet:
        assert sheet.format == "WEBP"
        np.testing.assert_array_equal(np.asarray(sheet), pixels)
    said = refused(sample.main, run, "--out", tmp_path / "grid.gif")
    assert "grid.gif; it must be a grid (.png, .jpg, .jpeg, .webp), a .npz, or a folder of PNG files" in said
    said = refused(sample.main, run, "--cfg-scale", 2)
    assert said == "sample.py: there is no option --cfg-scale; here it is --guidance"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["GRID.WEBP", "grid.png"]


def test_a_preview_is_a_strip_that_ends_in_the_image(run, drawn, tmp_path):
    out = sampled(run, tmp_path / "strip.png", "--preview", 3, "--batch", 5)
    assert [path.name for path in tmp_path.iterdir()] == ["strip.png"]
    with Image.open(out) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (36, 3 * 34 + 2, 3)  # of one image
    assert np.abs(pixels[2:34, 70:102].astype(int) - images_of(drawn)[0]).max() <= 1
    assert (pixels[:, 34:36] == 255).all()
    assert (pixels[2:34, 2:34] != pixels[2:34, 70:102]).any()
    assert "preview is -1; it must be a whole number from 0 to 64" in refused(sample.main, run, "--preview", -1)


def test_a_run_finds_its_data_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    data = Data(name="image_folder", path="images", text="minilm")
    assert train.lasting(data) == dataclasses.asdict(data) | {"path": str(tmp_path / "images")}
    assert train.lasting(Data(name="huggingface", path="gs://bucket/x"))["path"] == "gs://bucket/x"
    with pytest.raises(FileNotFoundError, match=f"'elsewhere', which is not a folder in {tmp_path}"):
        open_source(dataclasses.replace(data, path="elsewhere"))


def test_a_folder_of_images_can_be_completed_but_not_mixed(run, drawn, tmp_path, capsys):
    out = sampled(run, tmp_path / "images", "--count", 12, "--batch", 5)
    files = {path.name: path for path in out.glob("*.png")}
    assert sorted(files) == [f"{i:06d}.png" for i in range(12)]
    for i, image in enumerate(images_of(drawn)):
        with Image.open(out / f"{i:06d}.png") as file:
            np.testing.assert_array_equal(np.asarray(file), image)
            assert file.text == {"condition": str(i % 10), "seed": "0", "calls": '{"generator": 64}'}

    before, times = content(out), {name: path.stat().st_mtime_ns for name, path in files.items()}
    gone = ("000001.png", "000007.png", "000011.png")
    for name in gone:
        files[name].unlink()
    sampled(run, out, "--count", 12, "--batch", 5)
    assert content(out) == before
    assert [name for name in files if files[name].stat().st_mtime_ns != times[name]] == list(gone)

    for other in (("--seed", 1), ("--guidance", 3), ("--labels", 3), ("--no-average",)):
        assert "images of another model or other settings" in refused(sample.main, run, "--out", out, *other)
    assert content(out) == before


def test_a_folder_of_other_files_is_left_alone(run, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    assert "was not begun by sample.py" in refused(sample.main, run, "--out", tmp_path)
    assert content(tmp_path) == {"thesis.tex": b"mine"}


@pytest.fixture(scope="module")
def digit(place):
    """An image, and masks of it with a hole and without."""
    data = Data(name="mnist5k", split="all", size=32)
    image = next(iter(batches(open_source(data), data, batch=1, seed=0, train=False)))["image"][0]
    Image.fromarray(image).save(place / "digit.png")
    hole = np.zeros((32, 32), np.uint8)
    hole[12:20, 8:24] = 255
    for name, mask in (("hole", hole), ("black", 0 * hole), ("small", hole[:16])):
        Image.fromarray(mask).save(place / f"{name}.png")
    return image, hole > 0


def test_an_edited_image_keeps_its_pixels_and_gets_new_ones_in_the_hole(run, digit, place, tmp_path):
    image, hole = digit
    edit = ("--edit", str(place / "digit.png"), "--mask", str(place / "hole.png"))
    images = images_of(sampled(run, tmp_path / "a.npz", *edit))
    assert (images[:, ~hole] == image[~hole]).all()
    assert (images[:, hole] != image[hole]).any(axis=(1, 2)).all()
    assert len(np.unique(images, axis=0)) > 1
    whole = images_of(sampled(run, tmp_path / "b.npz", *edit, "--no-paste"))
    assert (whole[:, ~hole] != image[~hole]).any()
    np.testing.assert_array_equal(whole[:, hole], images[:, hole])


def test_a_smaller_image_can_be_laid_on_the_canvas_and_drawn_on(run, digit, tmp_path):
    Image.fromarray(digit[0][:16]).save(tmp_path / "part.png")
    images = images_of(
        sampled(run, tmp_path / "a.npz", "--edit", str(tmp_path / "part.png"), "--at", 8, 0, "--count", 4, "--batch", 4)
    )
    assert (images[:, 8:24] == digit[0][:16]).all()
    assert (images[:, :8] != 128).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mask", "hole.png"], "give it with --edit FILE"),
        (["--edit", "digit.png"], "--edit needs to know what to draw"),
        (["--edit", "digit.png", "--mask", "black.png"], "is black everywhere"),
        (["--edit", "digit.png", "--mask", "small.png"], "has 32x16 pixels, but .* has 32x32"),
        (["--edit", "digit.png", "--at", "1", "0"], "leaves the model's 32x32"),
        (["--edit", "digit.png", "--keep-scales", "1"], "--keep-scales is 1; the model has 1"),
        (["--edit", "none.png", "--mask", "hole.png"], "none.png"),
    ],
)
def test_bad_edits_are_refused_in_words(run, digit, place, tmp_path, options, message):
    options = [str(place / option) if option.endswith(".png") else option for option in options]
    assert re.search(message, refused(sample.main, run, "--out", tmp_path / "x.png", *options))
    assert not (tmp_path / "x.png").exists()


def test_labels_are_used_in_turn(run, drawn, tmp_path):
    out = sampled(run, tmp_path / "images", "--labels", 3, 3, 7, "--count", 5, "--batch", 5)
    conditions = [Image.open(out / f"{i:06d}.png").text["condition"] for i in range(5)]
    assert conditions == ["3", "3", "7", "3", "3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--labels", "33"), "no class '33'; near ones: 3; there are 0, 1, 2, 3, 4, 5, ..."),
        (("--captions", "a red heart"), "captions given, but this model takes class labels; give --labels"),
        (("--features", "x.npz"), "captions given, but this model takes class labels"),
        (("--count", "0"), "count is 0; it must be a whole number from 1 to"),
        (("--batch", "0"), "batch is 0; it must be a whole number from 1 to"),
        (("--resize", "-8"), "resize is -8; it must be a whole number from 0 to"),
        (("--top-p", "1.5"), r"top_p must lie in (0, 1], got 1.5"),
        (("--top-k", "-2"), "top_k must be 0 (off) or positive, got -2"),
        (("--tokenizer", "nowhere"), "nowhere does not exist; a tokenizer is needed"),
    ],
)
def test_bad_requests_are_refused_in_words(run, tmp_path, options, message, capsys):
    said = refused(sample.main, run, "--out", tmp_path / "x.png", *options)
    assert message in said + capsys.readouterr().err  # what a part of sampling refuses is said while options are read
    assert not (tmp_path / "x.png").exists()


def test_a_refused_command_leaves_nothing_that_the_corrected_one_meets(run, tmp_path):
    for bad in (("--top-p", "0"), ("--guidance", "nan"), ("--labels", "33")):
        refused(sample.main, run, "--out", tmp_path / "x.npz", "--count", 2, *bad)
        assert list(tmp_path.iterdir()) == []
    assert sampled(run, tmp_path / "x.npz", "--count", 2, "--top-p", "0.9").exists()


def test_a_run_that_is_none_is_refused(tmp_path):
    assert f"{tmp_path / 'no'} does not exist; a generator is needed" in refused(sample.main, tmp_path / "no")
    assert "holds no model.json; a generator is needed" in refused(sample.main, tmp_path)


def test_a_generator_without_a_checkpoint_says_so(run, tmp_path):
    (tmp_path / "generator").mkdir()
    shutil.copy(run / "generator" / "model.json", tmp_path / "generator")
    said = refused(sample.main, tmp_path, "--tokenizer", run, "--out", tmp_path / "x.png")
    assert "has no complete checkpoint yet" in said


def test_a_generator_without_a_tokenizer_asks_for_one(run, drawn, tmp_path):
    model = open_model(run, "generator")
    settings = {name: value for name, value in model.settings.items() if name != "tokenizer"}
    train.describe(tmp_path / "gpt", "generator", model.module, model.info, settings)
    save_params(tmp_path / "gpt" / "params", model.params())
    said = refused(sample.main, tmp_path / "gpt", "--out", tmp_path / "x.npz")
    assert "holds a generator only; give its tokenizer with --tokenizer FOLDER" in said
    assert "holds a generator; a tokenizer is needed" in refused(
        sample.main, tmp_path / "gpt", "--tokenizer", tmp_path / "gpt", "--out", tmp_path / "x.npz"
    )
    out = sampled(tmp_path / "gpt", tmp_path / "x.npz", "--tokenizer", run, "--count", 12, "--batch", 5)
    np.testing.assert_array_equal(images_of(out), images_of(drawn))


def test_a_tokenizer_of_other_codes_is_refused(run, tmp_path):
    model = open_model(run, "tokenizer")
    train.describe(tmp_path, "tokenizer", model.module.clone(codes=17), Info(), {})
    said = refused(sample.main, run, "--tokenizer", tmp_path, "--out", tmp_path / "x.png")
    assert "the generator makes 64 tokens with codes (16,)" in said
    assert "has 64 tokens with codes (17,); give --tokenizer" in said


@pytest.mark.parametrize("name", ["x.png", "x.npz"])
def test_a_disk_that_fills_up_at_the_end_leaves_no_half_written_file(run, drawn, tmp_path, name):
    request = (run, "--out", tmp_path / name, "--count", 12, "--batch", 2)
    with full_disk(2 * 32 * 32 * 3 + 1000):  # every batch fits, all of them do not
        assert "File too large" in refused(sample.main, *request)
    assert [path.name for path in tmp_path.iterdir()] == [f".{name}.parts"]
    shards = sorted(path.name for path in (tmp_path / f".{name}.parts").iterdir())
    assert shards == [*(f"{i:06d}.npz" for i in range(0, 12, 2)), "sampling.json"]
    sample.main(list(map(str, request)))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if name == "x.npz":
        assert_same_images(tmp_path / name, drawn)


def test_what_fails_in_a_thread_ends_the_drawing_and_leaves_whole_images_only(run, drawn, tmp_path, monkeypatch):
    out, save = tmp_path / "images", Image.Image.save

    def failing(self, file, **options):
        if "000003" in file.name:
            file.write(b"\x89PNG half")
            raise OSError(28, "No space left on device")
        save(self, file, **options)

    monkeypatch.setattr(Image.Image, "save", failing)
    assert "No space left on device" in refused(sample.main, run, "--out", out, "--count", 12, "--batch", 5)
    left = {path.name for path in out.iterdir()}
    assert left <= {f"{i:06d}.png" for i in (0, 1, 2, 4)} | {"sampling.json"}, "of that batch only, none cut short"
    monkeypatch.undo()
    monkeypatch.setattr(sample, "make_mesh", one_device)
    sampled(run, out, "--count", 12, "--batch", 5)
    for i, image in enumerate(images_of(drawn)):
        np.testing.assert_array_equal(np.asarray(Image.open(out / f"{i:06d}.png")), image)


def test_an_npz_goes_on_where_it_was_interrupted_by_this_version_or_an_earlier_one(run, drawn, tmp_path, monkeypatch):
    out, parts, save = tmp_path / "x.npz", tmp_path / ".x.npz.parts", sample._save_shard

    def interrupted(folder, ids, images):
        if ids[0] == 10:
            raise KeyboardInterrupt
        save(folder, ids, images)

    with monkeypatch.context() as patch:
        patch.setattr(sample, "_save_shard", interrupted)
        with pytest.raises(SystemExit, match="130"):
            sampled(run, out, "--count", 12, "--batch", 5)
    assert sorted(path.name for path in parts.iterdir()) == ["000000.npz", "000005.npz", "sampling.json"]
    with np.load(parts / "000005.npz") as shard:
        assert shard["ids"].tolist() == [5, 6, 7, 8, 9]
        np.testing.assert_array_equal(shard["images"], images_of(drawn)[5:10])
    (parts / "000005.npz").unlink()
    for i in (6, 9):  # as earlier versions kept them
        Image.fromarray(images_of(drawn)[i]).save(parts / f"{i:06d}.png")
    sampled(run, out, "--count", 12, "--batch", 5)
    np.testing.assert_array_equal(images_of(out), images_of(drawn))
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_a_damaged_shard_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "_assemble", lambda *arguments: None)
    sampled(run, tmp_path / "x.npz", "--count", 5, "--batch", 5)
    shard = tmp_path / ".x.npz.parts" / "000000.npz"
    shard.write_bytes(shard.read_bytes()[:100])
    said = refused(sample.main, run, "--out", tmp_path / "x.npz", "--count", 5, "--batch", 5)
    assert "000000.npz cannot be read" in said
    assert "remove it and run the same command again" in said


def test_the_next_batch_is_under_way_while_one_is_used():
    happened = []

    def draw(batch, ids):
        happened.append(f"begun {ids.tolist()} {batch['label'].tolist()}")
        return iter([Drawn(row, None, {}, None) for row in range(len(ids))])

    for ids, drawn in in_batches(draw, {"label": np.array([7, 8])}, np.arange(5), 2):
        happened.append(f"used {ids.tolist()} {[one.row for one in drawn]}")
    assert happened == [
        "begun [0, 1] [7, 8]", "begun [2, 3] [7, 8]", "used [0, 1] [0, 1]", "begun [4, 4] [7, 7]", "used [2, 3] [0, 1]",
        "used [4] [0]",
    ]  # fmt: skip


def test_a_failed_rename_leaves_the_old_description_whole(tmp_path, monkeypatch):
    write_json(tmp_path / "model.json", {"a": 1})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "model.json", {"a": 2})
    assert content(tmp_path) == {"model.json": b'{\n "a": 1\n}\n'}


def described(run, folder, change):
    """A folder whose model.json is that of the run's generator, changed."""
    value = json.loads((run / "generator" / "model.json").read_text())
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(change(value)))
    return folder


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '{"format": 1}', '{"format": 99}', '{"format": 1, "kind": "generator", "module": 3}'],
)
def test_a_damaged_description_is_named(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    assert f"{tmp_path / 'model.json'} is no model description" in refused(sample.main, tmp_path)


def test_a_description_cut_short_is_named(run, tmp_path):
    text = (run / "generator" / "model.json").read_text()
    (tmp_path / "model.json").write_text(text[: len(text) // 2])
    assert f"{tmp_path / 'model.json'} is no model description" in refused(sample.main, tmp_path)


@pytest.mark.parametrize(
    "hostile",
    [
        {"type": "os:system", "command": "touch hacked"},
        {"function": "os:system"},
        {"type": "tensorflow.keras:Sequential"},
        {"type": "antigravity:fly"},
    ],
)
@pytest.mark.parametrize("where", ["module", "conditioning", "order"])
def test_a_hostile_description_is_refused_and_nothing_of_it_is_imported(run, tmp_path, monkeypatch, hostile, where):
    def change(value):
        if where == "module":
            return value | {"module": hostile}
        if where == "conditioning":
            return value | {"module": value["module"] | {"conditioning": hostile}}
        return value | {"settings": value["settings"] | {"order": hostile}}

    monkeypatch.chdir(tmp_path)
    folder = described(run, tmp_path / "model", change)
    if where == "order":
        save_params(folder / "params", open_model(run, "generator").params())
    said = refused(sample.main, folder, "--tokenizer", run)
    assert f": {next(iter(hostile.values()))!r} lies outside ar_jax, and to open this model runs the code of" in said
    assert not {"antigravity", "tensorflow"} & sys.modules.keys()
    assert not Path("hacked").exists()
