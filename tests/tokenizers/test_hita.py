"""Hita: codes of the whole and of patches, what a patch is decoded from, the frozen network that encoding asks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import initial_params, never_moved, random_params

from ar_jax.convert.sources import param_shapes
from ar_jax.data import Info
from ar_jax.evals.efficientnet import EfficientNetLite0
from ar_jax.generators.causal import Causal
from ar_jax.generators.hita import ByLevel, Holistic, TwoTables
from ar_jax.machine.sharding import MeshShape, make_mesh, shard
from ar_jax.nets.conditioning import Cond, Label
from ar_jax.nets.resize import bicubic_matrix
from ar_jax.orders import Order, raster
from ar_jax.tokenizers.hita import Hita
from ar_jax.tokens import TokenSpec, grid, pyramid
from ar_jax.train.teachers import EfficientNet


@dataclasses.dataclass(frozen=True)
class Means:
    """A teacher: means of a grid of cells, and of the whole before them."""

    side: int = 2

    def open(self):
        return {}

    def __call__(self, params, image):
        cells = image.reshape(len(image), self.side, image.shape[1] // self.side, self.side, -1, 3).mean((2, 4))
        rows = cells.reshape(len(image), -1, 3)
        return jnp.concatenate([rows.mean(1, keepdims=True), rows], axis=1)[:, None]


SMALL = Hita(
    size=(8, 16), carriers=3, features=4, mult=(1, 2), res_blocks=1, latent=8, layers=1, heads=2, head_features=3, early=2,
    codes=12, code_features=4, carrier_features=5, groups=2, teacher=Means(), feature_width=3, side=2,
)  # fmt: skip
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 8, 16, 3)).astype(np.float32)


@functools.cache
def passed():
    params = random_params(SMALL, 0.3)
    return params, *jax.jit(lambda params: SMALL.apply({"params": params}, IMAGES, method="autoencode"))(params)


def test_codes_decode_as_in_training():
    params, recon, losses, seen = passed()
    apply = functools.partial(SMALL.apply, {"params": params})
    assert SMALL.spec.scales == ((1, 3), (4, 8))
    assert seen["tokens"].shape == (2, 35, 1)
    np.testing.assert_array_equal(apply(IMAGES, method="encode"), seen["tokens"])
    np.testing.assert_allclose(apply(seen["tokens"], method="decode"), recon, atol=1e-4)
    assert apply(seen["tokens"], method="embed").shape == (2, 35, 5)
    assert losses.keys() == {*(f"{a}/{b}" for a in ("codebook", "commit") for b in ("carriers", "patches")), "features"}


def test_a_patch_is_decoded_from_codes_a_few_places_before_its_own_and_from_all_carriers_there():
    params, _, _, seen = passed()
    shown = jax.jit(lambda tokens: SMALL.apply(
        {"params": params}, tokens, method=lambda self, x: self.spread(*self.given(x))[0]
    ))  # fmt: skip
    tokens = np.asarray(seen["tokens"])
    before = np.asarray(shown(tokens)).reshape(2, 32, -1)
    for place in (0, 3 + 10):
        changed = tokens.copy()
        changed[:, place] = (changed[:, place] + 1) % 12
        moved = np.abs(np.asarray(shown(changed)).reshape(2, 32, -1) - before).max(axis=(0, 2)) > 0
        # the feature of patch i is read at place carriers - early + i
        assert list(np.flatnonzero(moved)) == list(range(max(place - 1, 0), 32))


def test_loss_falls_and_every_parameter_moves():
    first = params = initial_params(SMALL)
    tx = optax.adam(1e-2)

    @jax.jit
    def update(params, state):
        def loss_fn(params):
            recon, own, _ = SMALL.apply({"params": params}, IMAGES, method="autoencode")
            return jnp.square(recon - IMAGES).mean() + sum(own.values())

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(20):
        params, state, loss = update(params, state)
        losses.append(float(loss))
    assert not {name for name in never_moved(first, params) if not name.endswith("['key']['bias']")}
    assert losses[-1] < 0.8 * losses[0]


def test_editing_keeps_patches_but_carriers_only_if_nothing_is_free():
    free = np.zeros((2, 8, 16), bool)
    free[0, 3, 5] = True
    known = np.asarray(SMALL.known(jnp.zeros((2, 35, 1), jnp.int32), jnp.asarray(free)))
    assert known[1].all()
    assert list(np.flatnonzero(~known[0])) == [0, 1, 2, 3 + 8 + 2]


def test_a_span_scales_where_pixels_are_read():
    np.testing.assert_array_equal(bicubic_matrix(5, 8), bicubic_matrix(5, 8, 5.0))
    assert np.abs(bicubic_matrix(5, 8, 5.1) - bicubic_matrix(5, 8)).max() > 1e-3
    np.testing.assert_allclose(bicubic_matrix(5, 8, 5.1).sum(1), 1, atol=1e-6)


def test_the_published_sampler_takes_the_other_table_for_the_last_code_of_the_whole():
    spec, random = TokenSpec(pyramid(((1, 2), (1, 3))), codes=(4,)), np.random.default_rng(1)
    params = {f"level_{i}": random.normal(size=(4, 6)).astype(np.float32) for i in range(2)}
    cond, tokens = Cond(jnp.ones((1, 1, 6))), jnp.ones((1, spec.n, 1), jnp.int32)

    def rows(of_next):
        inputs = TwoTables(6, spec, of_next=of_next)
        return np.asarray(inputs.apply({"params": params}, tokens, cond, raster(spec), None, 0, spec.n)[0])

    assert (np.abs(rows(True) - rows(False)).max(-1) > 0)[0].tolist() == [False, False, True, False, False]


def test_the_teacher_at_hand_may_look_at_fewer_pixels():
    image = jnp.zeros((2, 8, 16, 3))
    params = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    for side, places in ((64, 4), (128, 8)):
        assert jax.eval_shape(EfficientNet(side=side), params, image).shape == (2, places, places, 112)


def test_every_rule_of_tensor_parallelism_divides_something():
    mesh = make_mesh(MeshShape(1, 1, 2), jax.devices()[:2])
    divided = jax.tree.leaves(shard(param_shapes(SMALL), mesh, SMALL.rules))
    assert any(not where.is_fully_replicated for where in divided)


def test_bad_input_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"^teacher\.side is 16; it must be 32 to 1024 pixels"):
        EfficientNet(side=16)
    with pytest.raises(ValueError, match=r"^tokenizer\.early is 4, but there are 3 carriers; give at most as many"):
        param_shapes(SMALL.clone(early=4))
    with pytest.raises(
        ValueError, match=r"feature_width is 4 and tokenizer\.side 2, but the teacher gives 5 places of width 3"
    ):
        SMALL.clone(feature_width=4).seen(IMAGES)
    net = {"layers": 1, "width": 8, "heads": 2, "hidden": 8}
    info, line = Info(classes=2), TokenSpec(grid(1, 4), codes=(4,))
    two = TokenSpec(pyramid(((1, 2), (1, 2))), codes=(4,))
    with pytest.raises(ValueError, match=r"^Holistic needs tokens of the whole image on a line, then a grid"):
        Causal(Holistic(**net), Label(8), ByLevel(), TwoTables()).complete(line, info)
    with pytest.raises(ValueError, match=r"^backbone\.places is 3, but the tokenizer has 2; give as many, or 0"):
        Causal(Holistic(**net, places=3), Label(8), ByLevel(), TwoTables()).complete(two, info)
    with pytest.raises(ValueError, match=r"^head\.chunk is 2, but ByLevel computes all rows at once; give 0"):
        Causal(Holistic(**net), Label(8), ByLevel(chunk=2), TwoTables()).complete(two, info)
    with pytest.raises(ValueError, match=r"are drawn in the order of their slots; use orders\.raster"):
        TwoTables(8, two).check(Order(np.array([[1, 0, 2, 3]], np.int32), (1,) * 4))
