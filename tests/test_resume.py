"""Interrupted, damaged and continued runs of the two commands."""

import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kill_training import arrays, kill_and_compare
from PIL import Image
from test_train_sample import CONFIG, QUIET, metrics, one_device, quick, refused, sampled  # noqa: F401

from ar_jax import sample
from ar_jax.data import Data, Opened, open_source
from ar_jax.files.models import describe, open_model
from ar_jax.machine.sharding import make_mesh, put_batch
from ar_jax.train import __main__ as train
from ar_jax.train import guards, loop
from ar_jax.train.checkpoint import find_step, latest_step, save_params


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    (root / "tiny.py").write_text(CONFIG)
    return root


def trained(place, *overrides):
    train.main([str(place / "tiny.py"), "--out", str(place), *QUIET, *map(str, overrides)])


@pytest.fixture(scope="module")
def whole(place):
    trained(place)
    return place / "whole"


def copied(run, name):
    folder = run.parent / name
    shutil.copytree(run, folder)
    return folder


def checkpoints(run, stage="generator"):
    return sorted(path.name for path in (run / stage / "checkpoints").iterdir())


def test_killed_training_ends_in_the_same_bits(tmp_path):
    figures = kill_and_compare(tmp_path, kills=2)
    assert figures["unreadable"] == figures["different"] == 0
    assert figures["arrays compared"] > 400
    assert figures["resumed"] >= 1


def test_a_truncated_checkpoint_is_gone_back_from_and_trained_again(place, whole, capsys):
    run = copied(whole, "truncated")
    files = [path for path in (run / "generator" / "checkpoints" / "6").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    assert open_model(run, "generator").fixed().checkpoint == "3", "samplers make the same choice"
    assert checkpoints(run) == ["3", "6"], "and change nothing"
    trained(place, "--name", "truncated")
    said = capsys.readouterr()
    assert f"{run / 'generator' / 'checkpoints' / '6'} is broken (" in said.out
    assert "kept as 6.broken" in said.out
    assert "generator: resumed at update 3" in said.out + said.err
    assert checkpoints(run) == ["3", "6", "6.broken"]
    assert arrays(run, "generator") == arrays(whole, "generator")


def test_a_checkpoint_folder_emptied_on_purpose_is_gone_back_from(place, whole, capsys):
    run = copied(whole, "emptied")
    for path in (run / "generator" / "checkpoints" / "6").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    trained(place, "--name", "emptied")
    assert (
        "6 is broken (its contents.json is missing, as in earlier versions, or damaged): kept as 6.broken"
        in capsys.readouterr().out
    )
    assert arrays(run, "generator") == arrays(whole, "generator")


def sent(monkeypatch, update, number):
    """Lets the batch of an update be accompanied by a signal."""
    count = iter(range(1, 100))

    def put(batch, mesh):
        if next(count) == update:
            os.kill(os.getpid(), number)
        return put_batch(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", put)


@pytest.mark.parametrize(
    ("update", "stage", "step", "number"),
    [(1, "tokenizer", "1", signal.SIGTERM), (4, "tokenizer", "4", signal.SIGTERM), (9, "generator", "5", signal.SIGINT)],
)
def test_sigterm_and_ctrl_c_save_the_update_under_way_and_ask_to_be_run_again(
    place, whole, monkeypatch, capsys, update, stage, step, number
):
    name = f"told_{update}"
    with monkeypatch.context() as patch:
        sent(patch, update, number)
        with pytest.raises(SystemExit) as caught:
            trained(place, "--name", name)
    assert caught.value.code == {signal.SIGTERM: 75, signal.SIGINT: 130}[number]
    assert f"{stage}: told to stop, saved update {step}; the same command goes on" in capsys.readouterr().out
    assert checkpoints(place / name, stage)[-1] == step
    trained(place, "--name", name)
    said = capsys.readouterr()
    done = f"{stage}: all 4 updates are done" if update == 4 else f"{stage}: resumed at update {step}"
    assert done in said.out + said.err
    for stage in ("tokenizer", "generator"):
        assert arrays(place / name, stage) == arrays(whole, stage)


def on_devices(patch, count):
    patch.setattr(train, "make_mesh", lambda shape: make_mesh(shape, jax.devices()[:count]))


WIDE = ("--generator.module.backbone.width", 32, "--generator.module.conditioning.width", 32, "--tokenizer.path")


@pytest.mark.parametrize("mesh", [(1, 1, 1), (4, 1, 1)])
def test_a_checkpoint_goes_on_on_another_mesh_with_the_same_data(place, whole, monkeypatch, mesh):
    """Saved on (2, 2, 1); the losses agree to 1e-4 of those on one mesh: sums over devices are taken in another order."""
    wide = (*WIDE, whole, "--generator.module.backbone.hidden", 48, "--generator.log-every", 1)

    def run(name, shape, steps):
        with monkeypatch.context() as patch:
            on_devices(patch, np.prod(shape))
            sizes = [word for axis, size in zip(("data", "fsdp", "tp"), shape) for word in (f"--mesh.{axis}", size)]
            trained(place, "--name", name, *wide, *sizes, "--generator.steps", steps)

    name, alone = "mesh_{}_{}_{}".format(*mesh), place / "mesh_alone"
    if not alone.exists():
        run("mesh_alone", (1, 1, 1), 6)
    run(name, (2, 2, 1), 3)
    run(name, mesh, 6)
    facts = [
        json.loads((folder / "generator" / "checkpoints" / step / "contents.json").read_text())["facts"]
        for folder, step in ((place / name, "3"), (place / name, "6"), (alone, "6"))
    ]
    assert facts[0] == {"data": {"global_next_index": 3 * 8}}
    assert facts[1] == facts[2] == {"data": {"global_next_index": 6 * 8}}
    losses = [[line["loss"] for line in metrics(folder, "generator")] for folder in (place / name, alone)]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert np.ptp(losses[1]) > 0.01, "the tolerance must be small against what the batches differ by"


def test_the_best_checkpoint_is_kept_and_can_be_sampled_from(place, whole, monkeypatch, tmp_path, capsys):
    figures = iter((3.0, 1.0, 2.0, 4.0, 5.0))
    recipe = train.generator_recipe

    def known(*arguments):
        """The recipe, with known held-out losses."""
        made = recipe(*arguments)
        loss = lambda: np.float32(next(figures))  # noqa: E731

        def preview(params, frozen, batch, key):
            value = jax.pure_callback(loss, jax.ShapeDtypeStruct((), np.float32))
            return jnp.zeros((4, 32, 32, 3), jnp.uint8), {"loss": value}

        return made._replace(preview=preview)

    monkeypatch.setattr(train, "generator_recipe", known)
    often = ("--generator.preview-every", 1, "--generator.save-every", 1, "--generator.steps", 5)
    best = ("--name", "best", "--tokenizer.path", whole, *often, "--generator.keep", 1, "--generator.keep-best", 1)
    train.main([str(place / "tiny.py"), "--out", str(place), *map(str, best)])
    assert checkpoints(place / "best") == ["2", "5"]
    assert find_step(place / "best" / "generator" / "checkpoints", "best") == 2
    newest, chosen, second = (
        open_model(place / "best", "generator", which).params() for which in ("newest", "best", "2")
    )
    assert all(map(np.array_equal, jax.tree.leaves(chosen), jax.tree.leaves(second)))
    assert not all(map(np.array_equal, jax.tree.leaves(chosen), jax.tree.leaves(newest)))

    few = ("--count", 3, "--batch", 3)
    out = sampled(place / "best", tmp_path / "images", *few, "--checkpoint", "best")
    assert json.loads((out / "sampling.json").read_text())["checkpoint"] == "2"
    sampled(place / "best", out, *few, "--checkpoint", 2)  # the same, by its step
    assert "images of another model or other settings" in refused(sample.main, place / "best", "--out", out, *few)
    said = refused(sample.main, place / "best", "--out", tmp_path / "x.png", "--checkpoint", 4)
    assert "checkpoint is '4'; it must be newest, best or one of the complete steps [2, 5]" in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--generator.best", "psnr"), "generator.best is 'psnr', but the held-out figures are ['loss']"),
        (("--generator.preview-every", 0), "save_every is 3 and preview_every 0; make save_every a multiple"),
        (("--generator.preview-every", 2), "save_every is 3 and preview_every 2; make save_every a multiple"),
        (("--generator.keep-every", -1), "keep must be at least 1"),
    ],
)
def test_policies_that_cannot_be_followed_are_refused(place, whole, overrides, message):
    asked = (
        "--name",
        "policies",
        "--tokenizer.path",
        whole,
        "--generator.preview-every",
        3,
        "--generator.keep-best",
        1,
    )
    assert message in refused(train.main, place / "tiny.py", "--out", place, *asked, *overrides)


# fine-tuning


@pytest.fixture(scope="module")
def digits(whole, tmp_path_factory):
    """A folder of images of three classes."""
    root, source = tmp_path_factory.mktemp("digits"), open_source(Data(name="mnist5k", size=32))
    count = {0: 0, 1: 0, 2: 0}
    for record in (source[i] for i in range(len(source))):
        label = record["label"]
        if count.get(label, 9) < 4:
            (root / str(label)).mkdir(exist_ok=True)
            Image.fromarray(record["image"]).save(root / str(label) / f"{count[label]}.png")
            count[label] += 1
    return root


@pytest.fixture(scope="module")
def converted(whole, tmp_path_factory):
    """A folder as of ar_jax.convert: the generator's average alone."""
    folder, model = tmp_path_factory.mktemp("converted"), open_model(whole, "generator")
    describe(folder, "generator", model.module, model.info, {})
    save_params(folder / "params", model.params())
    return folder


STILL = ("--generator.optim.lr", 0, "--generator.optim.weight-decay", 0, "--generator.steps", 2)


def test_a_generator_of_ten_classes_is_fine_tuned_on_three(place, whole, converted, digits, capsys):
    tune = ("--name", "tuned", "--tokenizer.path", whole, "--data.name", "image_folder", "--data.path", digits, *STILL)
    tune = (*tune, "--generator.start", converted)
    said = refused(train.main, place / "tiny.py", "--out", place, *QUIET, *tune)
    assert "conditioning/embedding has shape (11, 16) in" in said
    assert "needs shape (4, 16); add conditioning/embedding to `fresh`" in said

    tune = (*tune, "--generator.fresh", "conditioning/embedding")
    trained(place, *tune)
    said = capsys.readouterr().out
    before, after = open_model(converted, "generator").params(), open_model(place / "tuned", "generator").params()
    count = len(jax.tree.leaves(before))
    assert f"generator: {count - 1} of {count} arrays begin as in {converted / 'params'} (state)" in said
    assert "generator: begin anew: conditioning/embedding\n" in said
    anew = after.pop("conditioning")["embedding"]
    before.pop("conditioning")
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert anew.shape == (4, 16)
    assert np.std(anew) > 1e-3

    shutil.move(converted, converted.with_name("gone"))  # a run that began goes on from its own checkpoint
    try:
        trained(place, *tune, "--generator.steps", 3)
    finally:
        shutil.move(converted.with_name("gone"), converted)
    said = capsys.readouterr()
    assert "resumed at update 2" in said.out + said.err
    assert "begin as in" not in said.out


def test_training_goes_on_at_another_image_size_from_the_average_of_a_run(place, whole, capsys):
    size = (
        "--data.size",
        16,
        "--tokenizer.module.size",
        16,
        16,
        "--tokenizer.start",
        whole,
        "--generator.start",
        whole,
    )
    trained(place, "--name", "small", *size, *STILL, "--tokenizer.optim.lr", 0)
    said = capsys.readouterr().out
    assert f"arrays begin as in {whole / 'generator' / 'checkpoints' / '6'} (ema)" in said
    assert said.count("begin anew: none") == 2
    model = open_model(place / "small", "generator")
    assert model.module.spec.n == 16
    for average in (True, False):
        jax.tree.map(
            np.testing.assert_array_equal, model.params(average=average), open_model(whole, "generator").params()
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--generator.fresh", "head"), "generator.fresh is ('head',), but generator.start is empty"),
        (("--generator.start", "WHOLE", "--generator.path", "WHOLE"), "give one of them"),
        (("--generator.start", "WHOLE", "--generator.fresh", "lead"), "fresh has 'lead', which matches none of"),
        (("--generator.start", "nowhere"), "nowhere does not exist; a generator is needed"),
    ],
)
def test_starts_that_cannot_be_made_are_refused(place, whole, overrides, message):
    overrides = [str(whole) if word == "WHOLE" else word for word in overrides]
    asked = ("--name", "start", "--tokenizer.path", whole, *overrides)
    assert message in refused(train.main, place / "tiny.py", "--out", place, *asked)


# guards around the loop


def test_a_training_that_diverges_stops_with_a_report_and_keeps_finite_checkpoints(place, whole, capsys):
    diverging = ("--name", "diverged", "--tokenizer.path", whole, "--generator.optim.lr", 1e30, "--generator.steps", 30)
    settings = ("--generator.guards.skipped", 4, "--generator.log-every", 1, "--generator.save-every", 1)
    said = refused(train.main, place / "tiny.py", "--out", place, *QUIET, *diverging, *settings)
    assert "train.py: neither of updates 2 to 5 had a finite loss and finite gradients" in said
    assert "The first of them, 2: " in said
    lines = [line for line in metrics(place / "diverged", "generator") if "seconds_per_step" in line]
    assert [(line["step"], line["skipped"]) for line in lines] == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert [line["grad_norm"] is None for line in lines] == [False, True, True, True], "JSON has no infinity"
    assert "generator, update 2: skipped, 1 in a row: " in capsys.readouterr().out
    step = latest_step(place / "diverged" / "generator" / "checkpoints")
    assert 1 <= step <= 5
    params = open_model(place / "diverged", "generator").params(average=False)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_loss_spike_is_a_line_of_the_log(place, whole, monkeypatch, capsys):
    monkeypatch.setattr(guards.Health, "WARMUP", 3)
    settings = ("--name", "spiky", "--tokenizer.path", whole, "--generator.start", whole, *STILL)
    trained(place, *settings, "--generator.steps", 12, "--generator.guards.spike", 1e-3)
    lines = [line for line in metrics(place / "spiky", "generator") if "spike/loss" in line]
    assert lines
    assert all(line["spike/loss"] > line["spike/mean"] for line in lines)
    assert capsys.readouterr().out.count("loss spike: ") == len(lines)


def test_nothing_is_transferred_behind_the_loops_back(place, whole, monkeypatch):
    check = guards.Health.check

    def careless(self, step, metrics):
        jnp.float32(step) + 1  # sends two numbers to the device
        return check(self, step, metrics)

    monkeypatch.setattr(guards.Health, "check", careless)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        trained(place, "--name", "careless", "--tokenizer.path", whole)


def test_a_profile_is_written_into_the_run_folder(place, whole, monkeypatch):
    monkeypatch.setattr(guards.Profile, "FIRST", 2)
    trained(place, "--name", "profiled", "--tokenizer.path", whole, "--generator.profile", 2)
    assert list((place / "profiled" / "generator" / "profile").glob("**/*.xplane.pb"))


def test_figures_of_training_images_are_called_so_and_choose_no_checkpoint(tmp_path, capsys):
    random = np.random.default_rng(0)
    for i in range(16):
        file = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(file)
    (tmp_path / "tiny.py").write_text(CONFIG)
    command = [str(tmp_path / "tiny.py"), "--out", str(tmp_path), "--data.name", "image_folder", "--generator.steps", "0"]
    command += ["--data.path", str(tmp_path / "images"), "--tokenizer.steps", "2", "--tokenizer.preview-every", "2"]
    refused = "there are no held-out images to judge tokenizer.best=psnr by; add a validation folder"
    with pytest.raises(SystemExit, match=refused):
        train.main([*command, "--name", "best", "--tokenizer.keep-best", "1", "--tokenizer.save-every", "2"])
    train.main(command)
    assert "tokenizer: no held-out images (data.split is test, but" in capsys.readouterr().out
    names = {name for line in metrics(tmp_path / "whole", "tokenizer") for name in line}
    assert {"train_sample/psnr", "train_sample/ssim"} <= names
    assert not any(name.startswith("held_out/") for name in names)


def test_a_damaged_validation_folder_is_no_missing_one(tmp_path):
    for name in ("train", "val"):
        (tmp_path / "images" / name).mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "train" / "a.png")
    with pytest.raises(ValueError, match=r"no images in .*val"):
        train.shown_images(Opened(), Data(name="image_folder", path=str(tmp_path / "images"), size=32), 4, "generator")
