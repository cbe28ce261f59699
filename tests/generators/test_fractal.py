"""FractalGen: likelihoods, patches in patches, refusals; parity and the laws are elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params

from ar_jax.data import Info
from ar_jax.evals.likelihood import bits_per_dimension, independent_bits
from ar_jax.generators.causal import Causal
from ar_jax.generators.fractal import Infilling, Inside, PreviousPatch, cut, joined, standard
from ar_jax.heads.colours import Colours
from ar_jax.loaded import Loaded
from ar_jax.nets.conditioning import Label
from ar_jax.nets.fractal import Enclosed, Entered, FromAbove, Repeated
from ar_jax.nets.vit import ClipViT
from ar_jax.orders import raster
from ar_jax.tokenizers.pixels import Pixels, patch_of
from ar_jax.tokens import TokenSpec, grid

COLOURS = Colours(Enclosed(1, 8, 2))
TOP = Entered(1, 8, 2, hidden=8), Repeated(Label(8, apart=True))


def test_patches_are_cut_as_the_tokenizer_cuts_images_and_joined_again():
    values = np.random.default_rng(0).integers(256, size=(2, 8, 8, 3))
    image = jnp.asarray(values / 127.5 - 1, jnp.float32)
    large, small = (Pixels((8, 8), side) for side in (8, 4))
    tokens = large.apply({}, image, method="encode")
    np.testing.assert_array_equal(tokens[:, 0], values.transpose(0, 3, 1, 2).reshape(2, -1))
    inside = cut(tokens[:, 0], 3, 4)
    np.testing.assert_array_equal(inside, small.apply({}, image, method="encode"))
    np.testing.assert_array_equal(joined(inside, 3, 4), tokens[:, 0])
    np.testing.assert_allclose(large.apply({}, tokens, method="decode"), image, atol=1e-6)
    np.testing.assert_allclose(standard(np.array([[0, 255, 255]]), 3), [[-0.485 / 0.229, 0.544 / 0.224, 0.594 / 0.225]], rtol=1e-5)


def test_probabilities_of_all_patches_of_two_grey_pixels_sum_to_one_and_the_bound_is_the_mean_over_orders():
    """Of a causal generator exactly; of a masked one the mean of the estimates is that of both orders."""
    spec, first = TokenSpec(grid(1, 2), codes=(256,)), np.arange(256, dtype=np.int32)
    causal = Causal(*TOP, COLOURS, PreviousPatch()).complete(spec, Info(classes=2))
    params, one = random_params(causal, 0.3), np.int32(77)
    tokens = np.concatenate([np.stack([first, np.full(256, one)], 1), np.stack([np.full(256, one), first], 1)])[..., None]

    @jax.jit
    def nats(params, tokens):
        b = len(tokens)
        batch = {"label": jnp.zeros(b, jnp.int32)}
        return causal.apply({"params": params}, tokens, batch, raster(spec), drop=jnp.zeros(b, bool), method="nats")

    given_one = np.exp(-np.asarray(nats(params, tokens), np.float64))
    of_first = given_one[256:].sum()  # p(first = 77), its seconds summed
    each = jax.jit(lambda params, x: causal.apply({"params": params}, x, method=_first_pixel))(params, first)
    np.testing.assert_allclose(np.exp(-np.asarray(each)).sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(of_first, np.exp(-each[77]), rtol=1e-4)

    masked = Infilling(ClipViT(1, 8, 2), Repeated(Label(8, apart=True), 1), COLOURS).complete(spec, Info(classes=2))
    params, pair = random_params(masked, 0.5), jnp.array([[[30], [200]]], jnp.int32)
    call, no = functools.partial(masked.apply, {"params": params}), jnp.zeros(1, bool)
    batch = {"label": jnp.zeros(1, jnp.int32)}

    @jax.jit
    def both():
        def lost(self, hidden):
            h = self.hidden(pair, jnp.asarray([hidden]), self.condition(batch, no))
            return self.head.nats(h, pair)[0]

        nothing, left, right = (call(hidden, method=lost) for hidden in ([True, True], [True, False], [False, True]))
        keys = jax.random.split(jax.random.key(0), 4000)
        drawn = jax.vmap(lambda key: call(pair, batch, None, drop=no, key=key, method="nats")[0])(keys)
        return (nothing.sum() + left[0] + right[1]) / 2, drawn

    mean, drawn = both()
    assert abs(drawn.mean() - mean) < 4 * drawn.std() / len(drawn) ** 0.5
    assert drawn.std() > 0.05


def _first_pixel(self, values):
    b = len(values)
    cond = self.condition({"label": jnp.zeros(b, jnp.int32)}, jnp.zeros(b, bool))
    tokens = jnp.stack([values, values], 1)[..., None]
    return self.head.nats(self.hidden(tokens, cond, raster(self.spec))[:, :1], tokens[:, :1])[:, 0]


def test_bits_are_those_of_all_images_whatever_the_batch_and_of_pixels_only():
    tokenizer = Pixels((2, 4), 2, channels=1)
    inner = Causal(Entered(1, 8, 2, hidden=8), FromAbove(8), COLOURS, PreviousPatch())
    generator = Causal(*TOP, Inside(inner), PreviousPatch()).complete(tokenizer.spec, Info(classes=2))
    params = {"tokenizer": {}, "generator": random_params(generator, 0.0)}
    model = Loaded(tokenizer, generator, params, Info(classes=2), order=raster)
    images = np.random.default_rng(0).integers(256, size=(5, 2, 4, 1)).astype(np.uint8).repeat(3, -1)
    np.testing.assert_allclose(bits_per_dimension(model, images, np.zeros(5), batch=2), 8, rtol=1e-5)
    every = np.arange(256, dtype=np.uint8)[:, None]
    np.testing.assert_allclose(independent_bits(every, images[:, 0, 0, :1]), 8)
    # seen once in five images; every value has a sixteenth beforehand
    np.testing.assert_allclose(independent_bits(images, images), np.log2(21 / 1.0625))
    with pytest.raises(ValueError, match=r"Causal on NoneType gives no likelihood of pixels; FractalGen's on Pixels do"):
        bits_per_dimension(Loaded(None, generator, params, Info(classes=2)), images)


def test_what_does_not_fit_is_refused():
    info, small = Info(classes=2), Pixels((8, 8), 4).spec
    with pytest.raises(ValueError, match=r"Colours draws single pixels, but tokens are patches of 4x4; use Inside"):
        Causal(*TOP, COLOURS, PreviousPatch()).complete(small, info)
    inner = Causal(Entered(1, 8, 2), FromAbove(8), COLOURS, PreviousPatch())
    with pytest.raises(ValueError, match=r"head\.patch is 3, but the patches that it cuts have a side of 4; it must be a part"):
        Causal(*TOP, Inside(inner, 3), PreviousPatch()).complete(small, info)
    with pytest.raises(ValueError, match=r"tokens must be square patches of pixels, .* but they have 2 sub-codes of sizes \(7, 9\)"):
        Causal(*TOP, Inside(inner), PreviousPatch()).complete(TokenSpec(grid(2, 2), codes=(9, 7)), info)
    with pytest.raises(ValueError, match=r"FromAbove is the conditioning of a generator inside another .* is Repeated"):
        inner.complete(TokenSpec(grid(2, 2), codes=(256,) * 3), info)
    much = Causal(*TOP, Inside(inner.clone(conditioning=FromAbove(8, 5))), PreviousPatch()).complete(small, info)
    with pytest.raises(ValueError, match=r"conditioning\.vectors is 5, but the generator above hands on 1; Causal hands on 1"):
        jax.eval_shape(much.init_params, jax.random.key(0))
    assert patch_of((256,) * 48) == (3, 4)
    assert patch_of((256,) * 16) == (1, 4)
