"""SemAIM: who knows what of whom, learning, and what it refuses; it has no sampler that laws could run on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import initial_params, never_moved, random_params

from ar_jax.data import Info
from ar_jax.decode.sampling import Sampling
from ar_jax.generators.semaim import SemAIM, TwoStreams
from ar_jax.nets.conditioning import Nothing
from ar_jax.orders import Shuffled, whole
from ar_jax.tokenizers.patches import Patches
from ar_jax.tokens import TokenSpec, grid, pyramid

SPEC, IMAGES = Patches((6, 8), 2, channels=1).spec, 4
PLAIN = SemAIM(TwoStreams(2, 16, 2, hidden=24, queries=1), Nothing(16), blur=3)
TOKENS = np.random.default_rng(0).normal(size=(IMAGES, SPEC.n, SPEC.channels)).astype(np.float32)


@functools.cache
def ready(**fields):
    return PLAIN.clone(**fields).complete(SPEC, Info())


def test_a_patch_is_predicted_from_those_before_it_alone_also_where_some_come_together():
    generator = ready(follows="order")
    params = random_params(generator, 0.3)
    order = Shuffled(5)(SPEC, jax.random.split(jax.random.key(1), IMAGES), IMAGES)

    @jax.jit
    def run(params, tokens):
        keys = generator.keys(tokens, tokens, tokens[..., 0], order)
        return keys, generator.apply({"params": params}, tokens, keys, method="predicted")[:, 1:]

    keys, before = run(params, TOKENS)
    np.testing.assert_array_equal(np.sort(keys, axis=1), np.broadcast_to(order.step, keys.shape))
    changed = 2  # a step of several patches, some before and some after it
    assert 1 < order.sizes[changed] < SPEC.n
    _, after = run(params, np.where((keys == changed)[..., None], TOKENS + 1, TOKENS))
    moved = np.abs(before - after).max(-1) > 1e-6
    np.testing.assert_array_equal(moved, keys > changed)


@pytest.mark.parametrize(
    "fields",
    [{}, {"follows": "similarity", "by": "mean"}, {"target": "features", "by": "attention"}],
    ids=["distance", "similarity", "features"],
)
def test_loss_falls_and_every_parameter_moves(fields):
    generator, tx = ready(**fields), optax.adam(3e-3)

    @jax.jit
    def train(params):
        def update(carry, key):
            def loss_fn(params):
                loss, weight, _ = generator.apply(
                    {"params": params}, TOKENS, {}, whole(SPEC), drop=jnp.zeros(IMAGES, bool), key=key, method="loss"
                )
                return (loss * weight).sum() / weight.sum()

            params, opt = carry
            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, opt = tx.update(grads, opt, params)
            return (optax.apply_updates(params, updates), opt), loss

        (params, _), losses = jax.lax.scan(update, (params, tx.init(params)), jax.random.split(jax.random.key(5), 60))
        return params, losses

    first = initial_params(generator)
    last, losses = train(first)
    assert not never_moved(first, last)
    assert losses[-10:].mean() < 0.9 * losses[:3].mean()


@pytest.mark.parametrize(
    ("spec", "fields", "message"),
    [
        (TokenSpec(grid(3, 4), channels=5), {}, r"square patches of pixels .* tokens have 5 channels"),
        (TokenSpec(grid(3, 4), codes=(7,)), {}, r"square patches of pixels .* tokens have 0 channels"),
        (TokenSpec(pyramid((1, 2)), channels=4), {}, r"one full grid .* in \(\(1, 1\), \(2, 2\)\)"),
        (SPEC, {"blur": 4}, r"blur is 4 and sigma 1\.0; they must be an odd number"),
        (SPEC, {"backbone": TwoStreams(3, 16, 2, queries=2)}, r"backbone\.queries is 2; it must divide the 3 layers"),
    ],
)
def test_what_it_cannot_serve_is_refused(spec, fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(PLAIN.clone(**fields).complete(spec, Info()).init_params, jax.random.key(0))


def test_it_draws_no_images():
    generator, keys = ready(), jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match=r"SemAIM draws no images"):
        Sampling().tokens(generator, random_params(generator, 0.1), {"label": np.zeros(2)}, whole(SPEC), keys=keys)
