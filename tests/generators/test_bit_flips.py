"""Instella-T2I's generators: a text that every layer reads in its own words, and the diffusion of bits over continuous times."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params

from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.temperature import Constant
from ar_jax.generators.binary_diffusion import Denoised
from ar_jax.generators.bit_flips import BitFlips
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Bits
from ar_jax.heads.bitwise import Bitwise
from ar_jax.nets.conditioning import Label, Start
from ar_jax.nets.reader import LayeredCaption, Reader, TimedReader
from ar_jax.orders import whole
from ar_jax.tokens import TokenSpec, grid

INFO = Info(classes=3, captions=True, text_rows=4, text_width=6)
SPEC = TokenSpec(grid(1, 6), codes=(2, 2, 2), placed=False)
NET = TimedReader(2, 16, 2, hidden=24, remat="dots")
GENERATOR = BitFlips(NET, LayeredCaption(16, parts=2, start=False)).complete(SPEC, INFO)
RANDOM = np.random.default_rng(0)
TOKENS = RANDOM.integers(2, size=(4, 6, 3)).astype(np.int32)
MASK = np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]], bool)
BATCH = {"text": RANDOM.normal(size=(4, 4, 6)).astype(np.float32), "text_mask": MASK}


@functools.cache
def sampler(rule):
    sampling = Sampling(Interval(1.7), Constant(0.9), fields=(("generator.rule", rule), ("generator.bend", 1.5)))
    generator, _, order = sampling.adapted(GENERATOR, None, Denoised(3))

    @jax.jit
    def run(params, batch, keys):
        return sampling.tokens(generator, params, batch, order(SPEC), keys=keys)[0]

    return run


def test_an_image_does_not_depend_on_its_neighbours_and_rules_differ():
    params, keys = random_params(GENERATOR, 0.5), jax.random.split(jax.random.key(2), 4)
    together = np.asarray(sampler("kept")(params, BATCH, keys))
    assert set(np.unique(together)) == {0, 1}
    assert len(np.unique(together.reshape(4, -1), axis=0)) == 4
    one = sampler("kept")(params, {name: x[2:3] for name, x in BATCH.items()}, keys[2:3])
    np.testing.assert_array_equal(one, together[2:3])
    assert (sampler("anew")(params, BATCH, keys) != together).any()


def test_the_loss_reaches_every_parameter_and_a_dropped_caption_is_not_read():
    params = random_params(GENERATOR, 0.5)

    def loss(params, batch, drop):
        each, weight, _ = GENERATOR.apply(
            {"params": params}, TOKENS, batch, whole(SPEC), drop=drop, key=jax.random.key(0), method="loss"
        )
        return (each * weight).sum() / weight.sum()

    grads = jax.jit(jax.grad(loss))(params, BATCH, jnp.array([False, True, False, True]))
    still = [jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(grads) if not np.any(x)]
    assert not still
    value, none = jax.jit(loss), jnp.ones(4, bool)
    for change in (np.r_[1, 1, 1, 0, 0, 0], np.r_[0, 0, 0, 1, 1, 1]):  # each layer reads its part
        other = {**BATCH, "text": (BATCH["text"] + change).astype(np.float32)}
        assert value(params, BATCH, none) == value(params, other, none)
        assert value(params, BATCH, ~none) != value(params, other, ~none)
    padded = {**BATCH, "text": np.where(MASK[..., None], BATCH["text"], 7).astype(np.float32)}
    assert value(params, BATCH, ~none) == value(params, padded, ~none)


def test_rules_and_the_loss_by_hand():
    p, z = np.array([0.3, 0.3, 0.9]).reshape(1, 1, 3), np.array([1, 0, 1]).reshape(1, 1, 3)
    t, u = 0.75, 0.5
    np.testing.assert_allclose(GENERATOR.earlier(p, z, t, u), 0.5 * p + 0.25)
    one, zero = (0.5 * x + 0.25 for x in (p, 1 - p))
    one, zero = one * np.where(z, 0.875, 0.125), zero * np.where(z, 0.125, 0.875)
    np.testing.assert_allclose(GENERATOR.clone(rule="kept").earlier(p, z, t, u), one / (one + zero), rtol=1e-6)
    np.testing.assert_allclose(GENERATOR.clone(bend=2.0).visited(4), [1, 0.5625, 0.25, 0.0625])
    tokens, noisy, flips = TOKENS[:1], 1 - TOKENS[1:2], np.linspace(-2, 2, 18).reshape(1, 6, 3).astype(np.float32)
    likely = 1 / (1 + np.exp(-np.where(noisy, -flips, flips)))  # of a 1
    want = -np.log(np.where(tokens, likely, 1 - likely)).mean(-1)
    np.testing.assert_allclose(GENERATOR.errors(tokens, noisy, flips), want, rtol=1e-5)


def test_a_class_is_a_text_of_one_row():
    generator = BitFlips(NET, Label(16)).complete(SPEC, INFO)
    params, batch = random_params(generator, 0.5), {"label": np.array([0, 1, 2, 1], np.int32)}
    heard = jax.jit(lambda params, drop: generator.apply({"params": params}, batch, drop, method="condition").mod)
    seen, dropped = heard(params, jnp.zeros(4, bool)), heard(params, jnp.ones(4, bool))
    assert (seen.keys.shape, seen.valid.tolist()) == ((4, 2, 2, 1, 8), [[True]] * 4)
    np.testing.assert_array_equal(seen.values[1], seen.values[3])
    np.testing.assert_array_equal(dropped.values[0], dropped.values[1])
    assert (seen.values[0] != seen.values[1]).any()


def test_what_does_not_fit_is_refused():
    def built(generator):
        return jax.eval_shape(generator.init_params, jax.random.key(0))

    causal = Causal(Reader(2, 16, 2), LayeredCaption(16), Bitwise(single=True), Bits())
    with pytest.raises(ValueError, match=r"BitFlips needs tokens of bits, but the tokenizer gives codes \(4,\)"):
        GENERATOR.complete(TokenSpec(grid(2, 2), codes=(4,)), INFO)
    with pytest.raises(ValueError, match=r"generator\.rule is 'new'; it must be anew or kept"):
        built(GENERATOR.clone(rule="new"))
    with pytest.raises(ValueError, match=r"Bits needs tokens of bits, but the tokenizer gives codes \(4, 4\)"):
        Bits().complete(TokenSpec(grid(1, 6), codes=(4, 4)))
    with pytest.raises(ValueError, match=r"head\.single is True, but the tokenizer gives codes \(4, 4\)"):
        Bitwise(single=True).complete(TokenSpec(grid(1, 6), codes=(4, 4)))
    with pytest.raises(ValueError, match=r"conditioning\.parts is 4, into which features of width 6 cannot be divided"):
        LayeredCaption(16, parts=4).complete(INFO)
    with pytest.raises(ValueError, match=r"the data gives no caption features; set data\.text"):
        LayeredCaption(16).complete(Info(classes=3))
    with pytest.raises(ValueError, match=r"conditioning\.parts is 3; it must be 1, or backbone\.layers, which is 2"):
        built(causal.clone(conditioning=LayeredCaption(16, parts=3)).complete(SPEC, INFO))
    with pytest.raises(ValueError, match=r"reads a text, which the conditioning does not make; use LayeredCaption or Label"):
        built(causal.clone(conditioning=Start(16)).complete(SPEC, INFO))
    with pytest.raises(ValueError, match=r"backbone\.rows is 3, but the sequence has 6; give as many, or 0"):
        built(causal.clone(backbone=Reader(2, 16, 2, rows=3)).complete(SPEC, INFO))
