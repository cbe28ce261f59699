"""TokenBridge: numbers rounded after training, and the head that draws them one by one, in a masked generator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params

from ar_jax.data import Info
from ar_jax.generators.base import Knobs
from ar_jax.generators.masked import Masked
from ar_jax.heads.by_dimension import Dimensions
from ar_jax.heads.categorical import Categorical
from ar_jax.heads.factorised import Factorised
from ar_jax.nets.conditioning import Label
from ar_jax.nets.vit import ViT
from ar_jax.orders import whole
from ar_jax.tokenize import kept
from ar_jax.tokenizers.dimensionwise import Dimensionwise
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.quantize_normal import normal_bins, normal_codes, normal_quantise
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.measure import moments

BASE = KLVAE((8, 8), features=4, mult=(1, 2), res_blocks=0, latent=3, groups=2)
TOKENIZER = Dimensionwise(BASE, levels=6)
HEAD = Factorised(Dimensions(1, 8, 2), Categorical(bias=True), (2, 0, 1), projected=True, guided="rows", std=1.0)
GENERATOR = Masked(
    ViT(1, 8, 2), ViT(1, 8, 2), Label(8, apart=True), HEAD, buffer=2, vectors=3
).complete(TOKENIZER.spec, Info(classes=3))  # fmt: skip
BY_CODE = Knobs(jnp.ones((1, 3)), jnp.ones(1))
IMAGE = np.clip(np.random.default_rng(2).normal(size=(4, 8, 8, 3)), -1, 1).astype(np.float32)


@pytest.mark.parametrize("levels", [2, 7, 64])
def test_bins_are_met_equally_often_and_values_are_their_means(levels):
    edges, values = normal_bins(levels, spread=9.0)
    x = np.sort(np.random.default_rng(0).normal(size=200_000))
    bins = np.searchsorted(edges[1:-1], x)
    share = np.bincount(bins, minlength=levels) / len(x)
    np.testing.assert_allclose(share, 1 / levels, rtol=0.1)
    np.testing.assert_allclose(values, [x[bins == i].mean() for i in range(levels)], atol=0.02)
    np.testing.assert_allclose(values, -values[::-1], atol=1e-6)
    assert (np.diff(normal_bins(levels)[1]) > 0).all()


def test_the_nearest_value_is_taken_and_codes_survive():
    x = np.random.default_rng(1).normal(size=(50, 8)).astype(np.float32) * 2
    errors = []
    for levels in (4, 16, 64):
        index = normal_quantise(x, levels)
        everything = np.asarray(normal_codes(np.arange(levels, dtype=np.int32), levels))
        np.testing.assert_array_equal(index, np.abs(np.clip(x, -5, 5)[..., None] - everything).argmin(-1))
        codes = normal_codes(index, levels)
        np.testing.assert_array_equal(normal_quantise(codes, levels), index)
        errors.append(np.square(codes - np.clip(x, -5, 5)).mean())
    assert errors[0] > errors[1] > errors[2]
    # a value at -3..3 of other bounds
    np.testing.assert_allclose(normal_codes(jnp.arange(4), 4, (0.0, 1.0)), (normal_bins(4)[1] + 3) / 6, atol=1e-6)


def test_a_tokenizer_is_rounded_after_its_training():
    params = random_params(BASE, 0.3)
    assert TOKENIZER.spec.codes == (6, 6, 6)

    def run(self):
        tokens = self.encode(IMAGE)
        key = jax.random.key(3)
        drawn = self.drawn(self.moments(IMAGE), key=key)
        _, losses, seen = self.autoencode(IMAGE, key=key)
        back = self.base.decode(self.embed(tokens))
        return (
            tokens,
            self.continuous(IMAGE),
            self.decode(tokens),
            back,
            drawn,
            self.encode(IMAGE, key=key),
            losses,
            seen,
        )

    out = jax.jit(lambda params: TOKENIZER.apply({"params": params}, method=run))(params)
    tokens, continuous, image, back, drawn, with_key, losses, seen = out
    np.testing.assert_array_equal(tokens, normal_quantise(continuous, 6))
    np.testing.assert_array_equal(image, back)
    np.testing.assert_array_equal(drawn, with_key)
    np.testing.assert_array_equal(seen["tokens"], tokens)
    assert set(losses) == {"kl"}
    assert kept(TOKENIZER, params, np.zeros((1, 8, 8, 3), np.uint8), None).dtype == np.float16, "a cache keeps moments"
    shift, scale = moments(TOKENIZER, params, [{"image": np.zeros((2, 8, 8, 3), np.uint8)}])
    assert len(shift) == len(scale) == 3


@functools.cache
def head_params():
    return random_params(GENERATOR, 0.5)


def of_head(head, method, *arguments):
    generator = GENERATOR.clone(head=head.complete(GENERATOR.spec))
    run = lambda self, *arguments: getattr(self.head, method)(*arguments)  # noqa: E731
    return jax.jit(lambda params, *arguments: generator.apply({"params": params}, *arguments, method=run))(
        head_params(), *arguments
    )


def test_drawing_one_by_one_is_what_training_counts():
    """The probability of what was drawn is that of teacher forcing, whatever the order of the dimensions."""
    h = np.random.default_rng(4).normal(size=(2, 16, 8)).astype(np.float32)
    keys = jax.random.split(jax.random.key(1), (2, 16))
    knobs = Knobs(jnp.ones(1), jnp.ones(1))
    tokens, likely = of_head(HEAD, "decide", h, keys, knobs, jnp.int32(0))
    assert tokens.shape == (2, 16, 3)
    assert len(np.unique(np.asarray(tokens))) == 6
    np.testing.assert_allclose(-3 * of_head(HEAD, "loss", h, tokens), likely, atol=1e-4)
    published = of_head(HEAD.clone(net=HEAD.net.clone(plain_start=True)), "loss", h, tokens)
    assert np.abs(-3 * published - likely).max() > 1e-3


def test_known_codes_come_in_as_what_they_stand_for_and_unknown_ones_do_not_matter():
    embed = functools.partial(TOKENIZER.apply, {})
    batch = {"label": np.arange(4, dtype=np.int32) % 3}
    tokens = np.random.default_rng(5).integers(6, size=(4, 16, 3)).astype(np.int32)

    def run(self, tokens):
        cond = self.condition(batch, jnp.zeros(4, bool))
        return self.hidden(self.shown(tokens[:, :6], embed), jnp.int32(4), cond, whole(self.spec))

    hidden = jax.jit(lambda tokens: GENERATOR.apply({"params": head_params()}, tokens, method=run))
    changed = tokens.copy()
    changed[:, 4:] = (changed[:, 4:] + 1) % 6
    np.testing.assert_array_equal(hidden(tokens), hidden(changed))
    changed[:, 3, 1] = (changed[:, 3, 1] + 1) % 6
    assert np.abs(hidden(tokens) - hidden(changed)).max() > 1e-3


def test_what_does_not_fit_is_refused():
    spec, info = TOKENIZER.spec, Info(classes=3)
    with pytest.raises(ValueError, match=r"generator\.vectors is 0, but the tokenizer gives codes \(6, 6, 6\)"):
        GENERATOR.clone(vectors=0).complete(spec, info)
    wrong = GENERATOR.clone(vectors=5)
    with pytest.raises(ValueError, match=r"generator\.vectors is 5, but the tokenizer shows a token by 3 numbers"):
        wrong.shown(jnp.zeros((1, 2, 3), jnp.int32), functools.partial(TOKENIZER.apply, {}))
    with pytest.raises(
        ValueError, match=r"head\.order is \(0, 1\); it must have each of the tokenizer's 3 sub-codes once"
    ):
        HEAD.clone(order=(0, 1)).complete(spec)
    with pytest.raises(ValueError, match=r"guidance has a weight for each sub-code, but acts on hidden rows"):
        of_head(HEAD, "decide", IMAGE[:, :2, :, 0], jax.random.split(jax.random.key(1), (2, 2)), BY_CODE, jnp.int32(0))
    with pytest.raises(ValueError, match=r"tokenizer\.base is VQGAN, whose tokens are codes already"):
        _ = Dimensionwise(VQGAN((32, 32))).spec
    with pytest.raises(ValueError, match=r"tokenizer\.bounds is \(5\.0, -5\.0\)"):
        _ = TOKENIZER.clone(bounds=(5.0, -5.0)).spec
