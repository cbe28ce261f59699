"""Binary Latent Diffusion: the autoencoder of bits, what is left of them over time, the generator; its released files."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params

from ar_jax.convert.sources import export, identify, param_shapes
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.temperature import Constant
from ar_jax.generators.binary_diffusion import BinaryDiffusion, Denoised, Scaled, Shown, kept_bits, ratio, step_factors
from ar_jax.nets.conditioning import Nothing
from ar_jax.orders import whole
from ar_jax.tokenizers.binary_autoencoder import BinaryAutoencoder
from ar_jax.tokens import TokenSpec, grid

AUTOENCODER = BinaryAutoencoder(
    (8, 12), features=4, mult=(1, 2), res_blocks=1, decoder_blocks=2, latent=4, bits=3, groups=2
)
GENERATOR = BinaryDiffusion(Scaled(1, 8, 2), Shown(8), times=5, aux=0.1).complete(
    TokenSpec(grid(2, 3), codes=(2, 2, 2)), Info(classes=3)
)
BATCH = {"label": np.array([0, 1, 2, 1], np.int32)}
TOKENS = np.random.default_rng(0).integers(2, size=(4, 6, 3)).astype(np.int32)


@pytest.mark.parametrize("rule", ["linear", "cos", "sigmoid"])
def test_posteriors_are_those_of_counting_all_ways(rule):
    """Three times: of all chains x0 -> x1 -> x2 -> x3, the part with a 1 at an earlier time."""
    kept = kept_bits(3, rule)
    factors = step_factors(kept)
    assert kept[0] == 1
    np.testing.assert_allclose(kept[3], 0, atol=1e-7)
    np.testing.assert_allclose(np.cumprod(factors), kept, atol=1e-6)
    p0 = 0.3

    def chance(chain):
        found = p0 if chain[0] else 1 - p0
        for t in (1, 2, 3):
            found *= factors[t] * (chain[t] == chain[t - 1]) + (1 - factors[t]) / 2
        return found

    chains = list(itertools.product((0, 1), repeat=4))
    for now, before in ((2, 1), (3, 1), (3, 2)):
        for x in (0, 1):
            some = [chain for chain in chains if chain[now] == x]
            want = sum(chance(c) for c in some if c[before]) / sum(chance(c) for c in some)
            step = kept[now] / kept[before]
            np.testing.assert_allclose(ratio(p0, x, kept[before], step, 0.0), want, rtol=1e-5)


def test_bits_are_drawn_in_training_and_the_likelier_ones_without_a_key():
    image = np.clip(np.random.default_rng(2).normal(size=(2, 8, 12, 3)), -1, 1).astype(np.float32)
    params = random_params(AUTOENCODER, 0.5)

    def run(self):
        p = self.probabilities(image)
        key = jax.random.key(1)
        recon, _, seen = self.autoencode(image, key=key)
        tokens = self.encode(image)
        return p, recon, seen["tokens"], self.encode(image, key=key), tokens, self.decode(seen["tokens"])

    out = jax.jit(lambda params: AUTOENCODER.apply({"params": params}, method=run))(params)
    p, recon, drawn, with_key, tokens, decoded = out
    assert AUTOENCODER.spec.codes == (2, 2, 2)
    np.testing.assert_array_equal(tokens, (p > 0.5).reshape(2, 24, 3))
    np.testing.assert_array_equal(drawn, with_key)
    assert (drawn != tokens).any()
    np.testing.assert_allclose(recon, decoded, atol=1e-4)


@functools.cache
def sampler(steps):
    sampling = Sampling(Interval(1.7), Constant(0.9))
    order = Denoised(steps)(GENERATOR.spec)

    @jax.jit
    def run(params, batch, keys):
        return sampling.tokens(GENERATOR, params, batch, order, keys=keys)[0]

    return run


def test_an_image_does_not_depend_on_its_neighbours():
    params, keys = random_params(GENERATOR, 0.5), jax.random.split(jax.random.key(2), 4)
    together = np.asarray(sampler(3)(params, BATCH, keys))
    assert set(np.unique(together)) == {0, 1}
    assert len(np.unique(together.reshape(4, -1), axis=0)) == 4
    one = sampler(3)(params, {"label": BATCH["label"][2:3]}, keys[2:3])
    np.testing.assert_array_equal(one, together[2:3])


def test_the_loss_reaches_every_parameter_and_a_dropped_class_is_not_seen():
    params = random_params(GENERATOR, 0.5)

    def loss(params, batch, drop):
        each, weight, _ = GENERATOR.apply(
            {"params": params}, TOKENS, batch, whole(GENERATOR.spec), drop=drop, key=jax.random.key(0), method="loss"
        )
        return (each * weight).sum() / weight.sum()

    grads = jax.jit(jax.grad(loss))(params, BATCH, jnp.array([False, True, False, True]))
    still = [jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(grads) if not np.any(x)]
    assert not still
    value, none = jax.jit(loss), jnp.ones(4, bool)
    other = {"label": (BATCH["label"] + 1) % 3}
    assert value(params, BATCH, none) == value(params, other, none)
    assert value(params, BATCH, ~none) != value(params, other, ~none)


def test_images_are_drawn_and_learned_without_a_condition():
    generator = GENERATOR.clone(conditioning=Nothing(8))
    params, order, keys = random_params(generator, 0.5), Denoised(2)(generator.spec), jax.random.split(jax.random.key(2), 2)

    @jax.jit
    def run(params, drop):
        each, *_ = generator.apply(
            {"params": params}, TOKENS, {}, whole(generator.spec), drop=drop, key=jax.random.key(0), method="loss"
        )
        return each, Sampling(Interval(1.0)).tokens(generator, params, {}, order, keys=keys)[0]

    (loss, tokens), (other, _) = (run(params, jnp.full(4, drop)) for drop in (False, True))
    np.testing.assert_array_equal(loss, other)
    assert (tokens[0] != tokens[1]).any()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"order\.steps is 7, but there are 6 slots"):
        GENERATOR.clone(times=9).visited(7)
    with pytest.raises(ValueError, match=r"order\.steps is 6, but the generator knows 5 times"):
        GENERATOR.visited(6)
    with pytest.raises(ValueError, match=r"BinaryDiffusion needs tokens of bits, but the tokenizer gives codes \(4,\)"):
        GENERATOR.complete(TokenSpec(grid(2, 2), codes=(4,)), Info(classes=3))
    with pytest.raises(ValueError, match=r"tokenizer\.bits is 0 and tokenizer\.res_blocks 1"):
        _ = AUTOENCODER.clone(bits=0).spec


@pytest.mark.parametrize("module", [
    AUTOENCODER,
    AUTOENCODER.clone(mult=(1, 1, 2), attention=(1, 2), decoder_blocks=1, norm_first=False, size=(16, 16)),
    GENERATOR.on(TokenSpec(grid(3, 3), codes=(2, 2, 2))),
    GENERATOR.clone(conditioning=Nothing(8)).on(TokenSpec(grid(3, 3), codes=(2, 2, 2))),
], ids=["autoencoder", "other", "generator", "without classes"])  # fmt: skip
def test_networks_are_found_again_by_the_names_of_their_files(module):
    kind = "generator" if isinstance(module, BinaryDiffusion) else "tokenizer"
    written = export(module, kind)
    found = identify(dict(written.keys), size=16, heads=2, groups=2)
    assert found.family == written.family == "binary_latent"
    assert jax.tree.map(lambda x: x.shape, found.params) == jax.tree.map(lambda x: x.shape, param_shapes(module))
    if kind == "tokenizer":
        assert [level % 3 for level in found.module.attention] == [
            level % len(module.mult) for level in module.attention
        ]
        assert (found.module.norm_first, found.module.mult) == (module.norm_first, module.mult)
