"""Model folders as strangers make them, given to sample.py: one sentence that names the file, and nothing is left behind."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from trees import changed

from ar_jax import sample
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.files.models import describe
from ar_jax.generators.causal import Causal
from ar_jax.heads.categorical import Categorical
from ar_jax.machine.sharding import make_mesh
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.checkpoint import save_params

INFO = Info(classes=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    tokenizer = VQGAN((4, 4), features=4, mult=(1, 2), res_blocks=0, latent=4, codes=8, code_features=4, groups=2)
    generator = Causal(Transformer(1, 8, 2, hidden=8), Label(8), Categorical(std=0.5)).complete(tokenizer.spec, INFO)
    settings = {
        "tokenizer": "../tokenizer",
        "order": codec.encode(raster),
        "sampling": codec.encode(Sampling(Interval(1.5))),
    }
    for kind, network, info, rest in (("tokenizer", tokenizer, Info(), {}), ("generator", generator, INFO, settings)):
        describe(place / kind, kind, network, info, rest)
        shapes = jax.eval_shape(network.init_params, jax.random.key(0))
        params = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32), shapes)
        save_params(place / kind / "params", params)
    return place


@pytest.fixture
def run(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "make_mesh", lambda _: make_mesh(devices=jax.devices()[:1]))
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def refused(said, *options):
    with pytest.raises(SystemExit) as caught:
        sample.main(["run", "--count", "2", "--batch", "2", "--out", "out/images.png", *options])
    assert isinstance(caught.value.code, str)
    assert "\n" not in caught.value.code
    assert len(caught.value.code) < 900
    assert all(part in caught.value.code for part in said), caught.value.code
    assert os.listdir() == ["run"]


FIELDS = [
    ("generator", "module.backbone.layers", 2, "blocks"),
    ("generator", "module.backbone.layers", 10**6, "module.backbone.layers"),
    ("generator", "module.backbone.heads", 3, "width / heads is 8 / 3"),
    ("generator", "module.conditioning.width", 6, "conditioning.width is 6; it must be 8"),
    ("generator", "module.backbone.unroll", True, "module.backbone.unroll is True; it must be false"),
    ("generator", "module.head.output_major", True, "module.head has 'output_major', which is no field of Categorical"),
    ("generator", "module.spec.codes", [7], "module.head.codes is 8 there and 7 by module.spec"),
    ("generator", "settings.order", {"type": "ar_jax.orders:Shuffled", "steps": 0}, "settings.order.steps"),
    ("generator", "settings.order", {"function": "ar_jax.orders:known_first"}, "settings.order"),
    ("generator", "settings.sampling.fields", [["order.steps", 3]], "order.steps cannot be changed"),
    ("generator", "settings.sampling.decoder", {"type": "ar_jax.decode.jacobi:Jacobi", "window": 0}, "decoder"),
    ("generator", "settings.sampling.soft", 1, "settings.sampling.soft"),
    ("generator", "settings.tokenizer", "../nowhere", "settings.tokenizer is '../nowhere'"),
    ("generator", "settings.tokenizer", "x" * 1000, "settings.tokenizer is 'xxx"),
    ("tokenizer", "module.size", [512, 512], "the generator makes 4 tokens"),
    ("tokenizer", "module.size", [10**9, 4], "module.size[0]"),
    ("tokenizer", "module.size", [5, 5], "module.spec: tokenizer.size must be multiples of 2"),
    ("tokenizer", "module.mult", [1, 4], "model.json and its parameters"),
    ("tokenizer", "module.res_blocks", 10**6, "module.res_blocks"),
    ("tokenizer", "module.groups", 3, "groups"),
    ("tokenizer", "module.dtype", {"dtype": "int32"}, "module.dtype"),
]


@pytest.mark.parametrize(("kind", "field", "value", "said"), FIELDS)
def test_a_changed_field_is_refused_before_anything_is_written(run, kind, field, value, said):
    changed(run / kind, field, value)
    refused(["model.json", said])


def test_weights_that_draw_no_images_leave_nothing(run):
    """Not NaN themselves, but too large; found when the first images are drawn."""
    module = codec.decode(json.loads((run / "tokenizer" / "model.json").read_text())["module"], VQGAN, "module")
    shapes = jax.eval_shape(module.init_params, jax.random.key(0))
    save_params(run / "tokenizer" / "params", jax.tree.map(lambda x: np.full(x.shape, 3e38, np.float32), shapes))
    refused(["hold NaN or infinity", "tokenizer"])


@pytest.mark.parametrize("change", ["missing", "a pipe", "empty", "a file"])
@pytest.mark.parametrize(
    "name", ["generator/params", "tokenizer/params", "tokenizer/model.json", "generator/model.json"]
)
def test_what_is_missing_or_no_file_is_named(run, name, change):
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if change == "a pipe":
        os.mkfifo(path)
    elif change == "empty":
        path.touch() if path.suffix else path.mkdir()
    elif change == "a file":
        path.write_text("hello")
    refused([str(path.parent.name)])
