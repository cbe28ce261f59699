"""Parts of a batch on a mesh: summed over devices once, with the numbers of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import GeneratorStage
from ar_jax.data import Info
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Upsampled
from ar_jax.generators.masked import Masked
from ar_jax.heads.categorical import Categorical
from ar_jax.heads.diffusion import Diffusion
from ar_jax.machine import shares
from ar_jax.machine.hlo import Program
from ar_jax.machine.sharding import MeshShape, make_mesh, put, put_batch, replicated, shard
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.nets.vit import ViT
from ar_jax.orders import DrawnScales, Shuffled, raster
from ar_jax.tokenizers.patches import Patches
from ar_jax.tokenizers.pyramid import Pyramid
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.optim import Optim
from ar_jax.train.recipes import generator_recipe

ROWS, PARTS = 16, 2
CODES = VQGAN((16, 16), features=4, mult=(1, 1), res_blocks=0, latent=4, codes=64, code_features=4, groups=2)
SCALES = Pyramid((8, 8), scales=(1, 2, 3, 4), features=4, mult=(1, 1), res_blocks=0, latent=4, codes=16, code_features=4, groups=2)
DRAWN = DrawnScales(usual=(1, 2, 4), often=0.5, keep=(1,), some=((1, 2, 3),), last=4)
class Noisy(Categorical):
    """Somebody's head, which draws for rows as JAX does."""

    def loss(self, h, target, *, key=None):
        return super().loss(h, target) * jnp.exp(jax.random.normal(jax.random.key(0) if key is None else key, target.shape[:2]))


GENERATORS = {
    "own": (CODES, Causal(Transformer(1, 32, 2), Label(32), Noisy()), raster),
    # dropout of rows, an order and a label of every image
    "causal": (CODES, Causal(Transformer(2, 64, 4, hidden=128, dropout=0.2), Label(64)), Shuffled()),
    # branches left out, one list of scales for all images
    "flexvar": (SCALES, Causal(AdaLN(2, 32, 2, gate=0.5, path_drop=(0.3, 0.6)), Label(32), Categorical(bias=True), Upsampled(channels=4, side=4)), DRAWN),
    # how much is masked for all images, noise levels and noise, dropout of attention
    "mar": (Patches((8, 8), 2), Masked(ViT(1, 32, 2, dropout=0.2, attention_dropout=0.2), ViT(1, 32, 2), Label(32), Diffusion(16, 1), 2), Shuffled()),
}  # fmt: skip


@functools.cache
def compiled(name, shape, parts=PARTS):
    """The update of a mesh with its arguments; parameters are random, none at 0."""
    tokenizer, generator, order = GENERATORS[name]
    generator = generator.complete(tokenizer.spec, Info(classes=10))
    stage = GeneratorStage(steps=5, batch=ROWS, order=order, drop=0.3, optim=Optim(lr=1e-2, accumulate=parts))
    recipe = generator_recipe(stage, generator, tokenizer, {})
    random = np.random.default_rng(0)
    size = (ROWS, tokenizer.spec.n)
    label = random.integers(10, size=ROWS).astype(np.int32)
    if tokenizer.spec.codes:
        batch = {"tokens": random.integers(16, size=(*size, 1)).astype(np.int32), "label": label}
    else:
        batch = {"tokens": random.normal(size=(*size, tokenizer.spec.channels)).astype(np.float32), "label": label}
    frozen = tokenizer.init_params(jax.random.key(4))
    mesh = make_mesh(MeshShape(*shape), jax.devices()[: np.prod(shape)])
    state = jax.jit(recipe.init)(jax.random.key(0))
    moved = [x + 0.1 * random.normal(size=x.shape).astype(x.dtype) for x in jax.tree.leaves(state.params)]
    state = state.replace(params=jax.tree.unflatten(jax.tree.structure(state.params), moved))
    layout = shard(state, mesh, recipe.rules, smallest=64)
    with jax.set_mesh(mesh):
        everywhere = replicated(mesh)
        arguments = put(state, layout), put(frozen, everywhere), put_batch(batch, mesh), put(jax.random.key(3), everywhere)
        update = jax.jit(recipe.update, out_shardings=(layout, everywhere)).lower(*arguments).compile()
    return update, arguments


@pytest.mark.parametrize("name", GENERATORS)
def test_parts_are_the_same_on_one_device_and_on_four(name):
    """Whatever is drawn for rows, and whatever is drawn once for all of them."""
    found = {}
    for shape in ((1, 1, 1), (4, 1, 1)) + ((2, 2, 1),) * (name == "causal"):
        update, arguments = compiled(name, shape)
        _, metrics = update(*arguments)
        found[shape] = [float(metrics[figure]) for figure in ("loss", "grad_norm")]
    want = found.pop((1, 1, 1))
    for shape, figures in found.items():
        np.testing.assert_allclose(figures, want, rtol=2e-5, err_msg=str(shape))


def test_gradients_are_summed_over_devices_once_for_all_parts():
    def of(parts):
        update, (state, *_) = compiled("causal", (4, 1, 1), parts)
        work = Program(update.as_text()).work().values()
        moved = sum(sum(each.collectives.values()) for each in work)
        held = sum(x.nbytes for x in jax.tree.leaves(state.params))
        return moved / held, sum(each.flops for each in work), update.memory_analysis().temp_size_in_bytes

    whole, parts = of(1), of(4)
    assert parts[0] == pytest.approx(whole[0], rel=0.05)
    assert parts[0] == pytest.approx(2, rel=0.1), "an all-reduce sends all parameters' bytes twice"
    assert parts[1] == pytest.approx(whole[1], rel=0.05)
    assert parts[2] < 0.7 * whole[2]


def test_shares_draw_what_one_draw_for_all_would():
    mesh = make_mesh(MeshShape(4, 1, 1), jax.devices()[:4])
    key = jax.random.key(0)

    def of(rows):
        own = jax.random.split(key, len(rows)) if len(rows) > 2 else shares.draw(jax.random.split, key, (len(rows),))
        noise = shares.draw(jax.random.normal, key, (len(rows), 3))
        return noise + rows[:, None], jax.random.key_data(shares.first(own)), shares.others(("data", "fsdp"))

    rows = jnp.arange(8.0)
    noise, first, axes = of(rows)
    assert axes == ("data", "fsdp")
    with jax.set_mesh(mesh):
        axes = []
        each, of_each = jax.jit(shares.by_share(lambda rows: (axes.append(of(rows)[2]), of(rows)[:2])[1]))(rows)
    assert axes == [("fsdp",)]
    np.testing.assert_array_equal(each.reshape(8, 3), noise)
    np.testing.assert_array_equal(of_each, np.tile(first, (4, 1)))
