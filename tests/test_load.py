"""Models from Python: what README's ten lines do."""

import contextlib
import io
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ar_jax
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.jacobi import Jacobi
from ar_jax.decode.sampling import Sampling
from ar_jax.files import codec
from ar_jax.files.models import describe
from ar_jax.generators.causal import Causal
from ar_jax.heads.categorical import Categorical
from ar_jax.machine.sharding import MeshShape, make_mesh, shard
from ar_jax.nets.conditioning import Label
from ar_jax.nets.linear import cast
from ar_jax.nets.transformer import Transformer
from ar_jax.options import Sampler
from ar_jax.orders import raster
from ar_jax.sampler import condition_table, open_drawer
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec, grid
from ar_jax.train import checkpoint
from ar_jax.train.checkpoint import save_params

INFO = Info(classes=10, class_names=("ant", "bee", "cat", *"3456789"))
README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("converted")
    tokenizer = VQGAN((8, 8), features=4, mult=(1, 2), res_blocks=0, latent=4, codes=16, code_features=4, groups=2)
    generator = Causal(Transformer(1, 16, 2, hidden=24), Label(16), Categorical(std=0.5)).complete(tokenizer.spec, INFO)
    settings = {"tokenizer": "../tokenizer", "order": codec.encode(raster), "sampling": codec.encode(Sampling(Interval(1.5)))}
    for kind, network, info, rest in (("tokenizer", tokenizer, Info(), {}), ("generator", generator, INFO, settings)):
        describe(place / kind, kind, network, info, rest)
        save_params(place / kind / "params", jax.device_get(jax.jit(network.init_params)(jax.random.key(1))))
    return place / "generator", place / "tokenizer"


@pytest.fixture(scope="module")
def model(folders):
    return ar_jax.load(folders[0], tokenizer=folders[1])


def commanded(folders, **options):
    """What sample.py draws."""
    drawer = open_drawer(str(folders[0]), Sampler(tokenizer=str(folders[1]), batch=2, seed=3, **options))
    _, table = condition_table(INFO, drawer.options, ("bee", "2"))
    draw = drawer.compile(make_mesh(devices=jax.devices()[:1]))
    return np.stack([one.image for one in draw(table, np.arange(2))])


def test_pixels_in_bfloat16_show_the_same_tokens(model, folders):
    error = np.abs(commanded(folders, pixels="bfloat16").astype(int) - model.sample(labels=["bee", 2], seed=3))
    assert 0 < error.max() <= 8
    assert error.mean() < 1


def test_samples_are_those_of_the_command(model, folders):
    images = model.sample(labels=["bee", 2], seed=3)
    assert (images.shape, images.dtype) == ((2, 8, 8, 3), np.uint8)
    want = commanded(folders)
    assert np.abs(images.astype(int) - want).max() <= 1
    np.testing.assert_array_equal(model.sample([1, 2], seed=3, decoder=Jacobi(4)), images)
    assert (model.sample([1, 2], seed=4) != images).any()
    assert model.sample(count=5).shape[0] == 5


def test_settings_are_changed_by_their_names(model):
    changed = model.changed(guidance=3.0, top_k=4, temperature=0.5, decoder=Jacobi(2), soft=False)
    assert (changed.guidance, changed.filter.top_k, changed.temperature.value) == (Interval(3.0), 4, 0.5)
    assert changed.decoder == Jacobi(2)
    assert model.changed(guidance=Interval(2.0, 3)).guidance == Interval(2.0, 3)
    with pytest.raises(ValueError, match=r"order\.steps is no setting of Sampling|order.steps cannot be changed"):
        model.sample([1], steps=3)
    with pytest.raises(ValueError, match="no class"):
        model.sample(["dog"])


def test_tokens_losses_and_the_functions_below_them(model, folders):
    images = np.random.default_rng(0).integers(256, size=(2, 8, 8, 3)).astype(np.uint8)
    tokens = model.encode(images)
    assert (tokens.shape, tokens.dtype) == ((2, 16, 1), np.int32)
    assert model.decode(tokens).shape == images.shape
    loss = model.loss(images, labels=[0, 1])
    assert 0 < loss < 10
    again, _ = jax.jit(model.functions.loss)(
        model.params, {"tokens": tokens, "label": np.array([0, 1])}, jax.random.key(0)
    )
    assert loss == pytest.approx(float(again), rel=1e-5)
    assert {"tokenizer", "generator"} == model.params.keys()
    alone = ar_jax.load(folders[1])
    np.testing.assert_array_equal(alone.encode(images), tokens)
    with pytest.raises(ValueError, match="holds a tokenizer only"):
        alone.sample([1])
    with pytest.raises(ValueError, match="a generator is needed"):
        ar_jax.load(folders[0].parent / "nowhere")


def test_the_lines_of_the_readme_run(folders, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for folder in folders:
        (run / folder.name).symlink_to(folder)
    text = README.read_text().partition("## From Python")[2]
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert code.count('"runs/mnist5k_llamagen"') == 1
    assert len(code.strip().splitlines()) <= 10
    names, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code.replace("runs/mnist5k_llamagen", str(run)), names)
    assert names["images"].shape == names["again"].shape == (2, 8, 8, 3)
    assert names["tokens"].shape == (2, 16, 1)
    assert "Interval(weight=1.5" in out.getvalue()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_for_sampling_are_read_in_parts_to_where_they_are_used(tmp_path, monkeypatch, dtype):
    """Four devices, each with a quarter in the layout of decoding; one array at a time is held twice, the largest at first."""
    net = Causal(Transformer(6, 64, 4, hidden=172), Label(64)).complete(TokenSpec(grid(4, 4), codes=(64,)), INFO)
    params = jax.jit(net.init_params)(jax.random.key(1))
    save_params(tmp_path / "params", params)
    model, mesh = describe(tmp_path, "generator", net, INFO, {}), make_mesh(MeshShape(1, 4, 1), jax.devices()[:4])
    want = jax.tree.map(np.asarray, net.unrolled(cast(params, dtype))[1])
    layout = shard(want, mesh, net.by_layer().rules)
    before, peaks, read = {id(x) for x in jax.live_arrays()}, [], checkpoint._load_some

    def held(arrays):
        """Bytes on the first device."""
        here = [x for x in arrays if jax.devices()[0] in x.sharding.device_set]
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in here)

    def watched(*arguments):
        found = read(*arguments)  # beside what was made of those before; then they are made into others of their size
        peaks.append(held(x for x in jax.live_arrays() if id(x) not in before) + held(found.values()))
        return found

    monkeypatch.setattr(checkpoint, "_load_some", watched)
    loaded = model.params(jnp.dtype(dtype).type, mesh=mesh, unrolled=True)
    jax.tree.map(np.testing.assert_array_equal, loaded, want)
    assert jax.tree.all(jax.tree.map(lambda x, at: x.sharding.is_equivalent_to(at, x.ndim), loaded, layout))
    assert max(peaks) <= 1.3 * held(jax.tree.leaves(loaded))
    assert len(peaks) > 5
