import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.convert.sources import param_shapes
from ar_jax.tokenizers.quantize import (
    VectorLoss,
    count_codes,
    distances,
    normalise,
    straight_through,
    usage,
    vector_quantise,
)
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


Z, CODES = normal(4, 5, 3), normal(16, 3, seed=1)


def nearest(z, codebook):
    """The first of the nearest codes, vector by vector in float64."""
    flat = z.reshape(-1, z.shape[-1]).astype(np.float64)
    found = [min(range(len(codebook)), key=lambda i: ((codebook[i] - v) ** 2).sum()) for v in flat]
    return np.reshape(found, z.shape[:-1])


def test_each_latent_gets_its_nearest_code():
    quantised, index, _ = vector_quantise(Z, CODES)
    np.testing.assert_array_equal(index, nearest(Z, CODES))
    assert index.dtype == jnp.int32
    np.testing.assert_allclose(quantised, CODES[index], rtol=1e-6, atol=1e-6)
    assert len(np.unique(index)) > 5, "a constant would be too easy"


def test_the_first_of_equal_codes_wins():
    _, index, _ = vector_quantise(np.float32([[1, 0]]), np.float32([[3, 3], [2, 0], [0, 0], [2, 0]]))
    assert index.tolist() == [1]


def test_distances_are_squared_and_euclidean():
    expected = ((Z[..., None, :].astype(np.float64) - CODES) ** 2).sum(-1)
    np.testing.assert_allclose(distances(Z, CODES), expected, rtol=1e-5, atol=1e-5)


def test_permuting_the_codebook_permutes_the_indices():
    order = np.random.default_rng(2).permutation(len(CODES))
    _, index, losses = vector_quantise(Z, CODES)
    quantised, moved, moved_losses = vector_quantise(Z, CODES[order])
    np.testing.assert_array_equal(order[np.asarray(moved)], index)
    np.testing.assert_allclose(quantised, CODES[np.asarray(index)], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(moved_losses["codebook"], losses["codebook"], rtol=1e-6)


def test_straight_through_has_the_value_of_the_code_and_the_gradient_of_the_latent():
    z, code, pull = normal(6), normal(6, seed=1), normal(6, seed=2)
    np.testing.assert_allclose(straight_through(z, code), code, rtol=1e-6)
    to_z, to_code = jax.grad(lambda z, code: (pull * straight_through(z, code)).sum(), argnums=(0, 1))(z, code)
    np.testing.assert_array_equal(to_z, pull)
    np.testing.assert_array_equal(to_code, np.zeros(6))


def test_what_follows_the_quantiser_reaches_the_latents_unchanged_and_the_codebook_not_at_all():
    pull = normal(*Z.shape, seed=3)
    to_z, to_codes = jax.grad(lambda z, codes: (pull * vector_quantise(z, codes)[0]).sum(), argnums=(0, 1))(Z, CODES)
    np.testing.assert_array_equal(to_z, pull)
    np.testing.assert_array_equal(to_codes, np.zeros_like(CODES))


def test_the_codebook_learns_by_its_own_term_and_the_latents_by_theirs():
    loss = VectorLoss(codebook=0.7, commit=0.2)
    index = np.asarray(vector_quantise(Z, CODES)[1])

    def gradients(name):
        return jax.grad(lambda z, codes: vector_quantise(z, codes, loss)[2][name], argnums=(0, 1))(Z, CODES)

    apart = 2 * (CODES[index] - Z) / Z.size
    pulled = np.zeros_like(CODES)
    np.add.at(pulled, index.ravel(), apart.reshape(-1, 3))
    to_z, to_codes = gradients("codebook")
    np.testing.assert_array_equal(to_z, np.zeros_like(Z))
    np.testing.assert_allclose(to_codes, 0.7 * pulled, rtol=1e-4, atol=1e-7)
    to_z, to_codes = gradients("commit")
    np.testing.assert_allclose(to_z, -0.2 * apart, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(to_codes, np.zeros_like(CODES))


def test_quantiser_losses_are_weighted_mean_squares_and_entropy_is_left_out_at_zero():
    _, index, losses = vector_quantise(Z, CODES, VectorLoss(codebook=2.0, commit=0.5))
    square = ((CODES[np.asarray(index)] - Z) ** 2).mean()
    assert losses.keys() == {"codebook", "commit"}
    np.testing.assert_allclose([losses["codebook"], losses["commit"]], [2 * square, square / 2], rtol=1e-5)


def test_entropy_loss_is_lowest_for_sure_and_even_choices():
    corners = np.float32([[1, 0], [0, 1], [-1, 0], [0, -1]])
    weigh = lambda z: float(vector_quantise(z, corners, VectorLoss(entropy=1.0))[2]["entropy"])  # noqa: E731
    np.testing.assert_allclose(weigh(corners), -math.log(4), atol=1e-3)  # sure and even
    np.testing.assert_allclose(weigh(corners[[0, 0, 0]]), 0, atol=1e-3)  # sure, but one code only
    np.testing.assert_allclose(weigh(np.zeros((3, 2), np.float32)), 0, atol=1e-3)  # unsure of all


def test_normalised_vectors_have_unit_length_and_zero_stays_finite():
    np.testing.assert_allclose(np.linalg.norm(normalise(100 * Z), axis=-1), np.ones(Z.shape[:-1]), rtol=1e-6)
    zero = np.zeros((1, 3), np.float32)
    np.testing.assert_array_equal(normalise(zero), zero)
    assert np.isfinite(jax.grad(lambda x: normalise(x).sum())(zero)).all()


def used(index, codes, level):
    coords = np.zeros((len(level), 3), np.int32)
    coords[:, 0] = level
    spec = TokenSpec(coords, codes=(codes,))
    return usage(count_codes(jnp.asarray(index)[..., None], spec), spec.codes)


def test_usage_and_perplexity_have_their_closed_forms():
    even = used(np.arange(8).reshape(2, 4) % 4, 16, [0] * 4)
    np.testing.assert_allclose([even["usage"], even["code_perplexity"]], [0.25, 4], rtol=1e-6)
    one = used(np.full((3, 5), 7), 16, [0] * 5)
    assert one.keys() == {"usage", "code_perplexity"}
    np.testing.assert_allclose([one["usage"], one["code_perplexity"]], [1 / 16, 1], rtol=1e-6)
    uneven = used([[0], [0], [0], [2]], 4, [0])  # 3/4 and 1/4
    np.testing.assert_allclose(uneven["code_perplexity"], 4 / 27**0.25, rtol=1e-6)


def test_usage_is_told_of_every_level_and_of_all():
    found = used([[3, 0, 1, 2, 3], [3, 0, 0, 1, 1]], 8, [0, 1, 1, 1, 1])
    np.testing.assert_allclose([found["usage"], found["usage/0"], found["usage/1"]], [1 / 2, 1 / 8, 1 / 2], rtol=1e-6)
    rare = usage(jnp.array([[0.9, 0.04, 0.06, 0.0]]), (4,), rare=0.2)  # of an even share of a quarter
    np.testing.assert_allclose(rare["usage"], 1 / 2, rtol=1e-6)
    p = np.array([3, 3, 1, 1]) / 8
    np.testing.assert_allclose(found["code_perplexity/0"], 1, rtol=1e-6)
    np.testing.assert_allclose(found["code_perplexity/1"], np.exp(-(p * np.log(p)).sum()), rtol=1e-6)
    p = np.array([3, 3, 1, 3]) / 10
    np.testing.assert_allclose(found["code_perplexity"], np.exp(-(p * np.log(p)).sum()), rtol=1e-6)


@functools.cache
def tiny(size=(16, 24), l2_norm=True):
    """A tokenizer without square images, and random parameters: images then differ in their codes."""
    module = VQGAN(
        size, features=4, mult=(1, 2), res_blocks=0, latent=6, codes=16, code_features=3, groups=2, l2_norm=l2_norm
    )
    shapes = param_shapes(module)
    leaves, tree = jax.tree.flatten(shapes)
    return module, tree.unflatten([0.5 * normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])


@functools.cache
def method(name, l2_norm=True):
    module, params = tiny(l2_norm=l2_norm)
    return functools.partial(jax.jit(functools.partial(module.apply, method=name)), {"params": params})


IMAGES = np.clip(normal(3, 16, 24, 3, seed=9), -1, 1)


def test_images_that_are_not_square_become_a_grid_of_codes_and_images_again():
    module, _ = tiny()
    tokens = method("encode")(IMAGES)
    assert module.grid == (8, 12)
    assert module.downsample == 2
    assert tokens.shape == (3, module.spec.n, 1) == (3, 96, 1)
    assert tokens.dtype == jnp.int32
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < 16
    assert len(np.unique(tokens)) > 3
    decoded = method("decode")(tokens)
    assert decoded.shape == IMAGES.shape
    assert decoded.dtype == jnp.float32
    np.testing.assert_array_equal(module.spec.coords[13], [0, 1, 1])


@pytest.mark.parametrize("l2_norm", [True, False])
def test_decoded_tokens_are_the_reconstruction_of_training(l2_norm):
    recon, losses, seen = method("autoencode", l2_norm)(IMAGES)
    tokens = method("encode", l2_norm)(IMAGES)
    np.testing.assert_array_equal(seen["tokens"], tokens)
    assert seen["latents"].shape == (3, 8, 12, 3)
    assert losses.keys() == {"codebook", "commit"}
    np.testing.assert_allclose(method("decode", l2_norm)(tokens), recon, rtol=1e-4, atol=1e-4)


def test_codes_have_unit_length_with_l2_norm_and_are_the_codebook_without():
    tokens = np.arange(16, dtype=np.int32)[None, :, None]
    lengths = np.linalg.norm(method("embed")(tokens), axis=-1)
    np.testing.assert_allclose(lengths, np.ones((1, 16)), rtol=1e-6)
    codebook = tiny(l2_norm=False)[1]["codebook"]
    assert not np.allclose(np.linalg.norm(codebook, axis=-1), 1)
    np.testing.assert_array_equal(method("embed", l2_norm=False)(tokens)[0], codebook)


def test_cosine_search_ignores_the_length_of_latents():
    _, params = tiny()
    grid = normal(1, 8, 12, 3, seed=4)
    quantise = lambda z: method("quantise")(z)[1]  # noqa: E731
    np.testing.assert_array_equal(quantise(grid), quantise(50 * grid))
    unit = params["codebook"] / np.linalg.norm(params["codebook"], axis=-1, keepdims=True)
    cosine = np.einsum("bhwc,vc->bhwv", grid, unit)
    np.testing.assert_array_equal(quantise(grid), cosine.argmax(-1))


def test_permuting_the_codebook_of_a_tokenizer_permutes_its_tokens():
    module, params = tiny()
    order = np.random.default_rng(1).permutation(16)
    moved = params | {"codebook": params["codebook"][order]}
    tokens = jax.jit(functools.partial(module.apply, method="encode"))({"params": moved}, IMAGES)
    np.testing.assert_array_equal(order[np.asarray(tokens)], method("encode")(IMAGES))


def test_a_size_that_the_levels_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer.size must be multiples of 4 pixels, got \(16, 18\)"):
        _ = VQGAN((16, 18), mult=(1, 1, 1)).spec


def test_images_of_another_rank_are_refused():
    with pytest.raises(Exception, match="image"):
        method("encode")(IMAGES[0])


@pytest.mark.parametrize(
    ("name", "mult", "grid", "count"),
    [("VQ-16", (1, 1, 2, 2, 4), (16, 16), 71_883_403), ("VQ-8", (1, 2, 2, 4), (32, 32), 70_109_835)],
)
def test_the_published_tokenizers_have_their_parameter_counts(name, mult, grid, count):
    module = VQGAN(mult=mult)
    shapes = param_shapes(module)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count
    assert module.grid == grid
    assert module.spec.codes == (16384,)
