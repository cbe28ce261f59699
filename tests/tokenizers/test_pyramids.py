"""The two pyramid tokenizers: what a scale knows, what it adds, and that any list of scales will do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.convert.sources import param_shapes
from ar_jax.machine.sharding import MeshShape, make_mesh, shard
from ar_jax.nets.resize import resize
from ar_jax.tokenizers.pyramid import Pyramid
from ar_jax.tokenizers.quantize import VectorLoss, residual_quantise
from ar_jax.tokenizers.residual_pyramid import ResidualPyramid, smoother_of_level
from ar_jax.tokens import TokenSpec, maps, pyramid, rows
from ar_jax.train.codes import _candidates

NET = {"features": 4, "mult": (1, 2), "res_blocks": 0, "codes": 16, "code_features": 3, "groups": 2}
SCALES = (1, (2, 3), (3, 5), (8, 12))
TOKENIZERS = {
    "residual": ResidualPyramid((16, 24), SCALES, smoothers=2, **NET),
    "residual_own": ResidualPyramid((16, 24), SCALES, smoothers=0, cosine=True, **NET),
    "independent": Pyramid((16, 24), scales=SCALES, latent=6, **NET),
}
each = pytest.mark.parametrize("name", TOKENIZERS)
residual = pytest.mark.parametrize("name", ["residual", "residual_own"])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


IMAGES = np.clip(normal(3, 16, 24, 3, seed=9), -1, 1)
TOKENS = np.random.default_rng(3).integers(16, size=(2, 118, 1)).astype(np.int32)


@functools.cache
def params_of(name):
    """Random everywhere, so that images differ in their codes."""
    shapes = param_shapes(TOKENIZERS[name])
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([0.5 * normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])


@functools.cache
def method(name, method, scales=SCALES):
    tokenizer = TOKENIZERS[name].clone(scales=scales)
    return functools.partial(jax.jit(functools.partial(tokenizer.apply, method=method)), {"params": params_of(name)})


def test_a_pyramid_lists_its_grids_coarse_to_fine():
    coords = pyramid((1, (2, 3)))
    assert coords.dtype == np.int32
    np.testing.assert_array_equal(coords, [[0, 0, 0], [1, 0, 0], [1, 0, 1], [1, 0, 2], [1, 1, 0], [1, 1, 1], [1, 1, 2]])
    assert TokenSpec(pyramid(SCALES)).scales == ((1, 1), (2, 3), (3, 5), (8, 12))


@pytest.mark.parametrize("scales", [(), (1, 0), (2, (3, -1))])
def test_scales_without_slots_are_refused(scales):
    with pytest.raises(ValueError, match=r"scales is .*; it must be at least one side"):
        pyramid(scales)


def test_rows_join_what_maps_cut():
    x = normal(2, 118, 3)
    cut = maps(x, SCALES)
    assert [one.shape for one in cut] == [(2, 1, 1, 3), (2, 2, 3, 3), (2, 3, 5, 3), (2, 8, 12, 3)]
    np.testing.assert_array_equal(rows(cut), x)
    assert [one.shape for one in maps(x[:, :7, 0], SCALES)] == [(2, 1, 1), (2, 2, 3)]
    with pytest.raises(ValueError, match="8 tokens are no whole number of the scales"):
        maps(x[:, :8], SCALES)


def test_smoothers_are_those_of_the_published_tie_rule():
    assert smoother_of_level(10, 4).tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    for levels in range(1, 14):
        assert smoother_of_level(levels, levels).tolist() == list(range(levels))
        assert smoother_of_level(levels, 1).tolist() == [0] * levels


@each
def test_images_become_codes_of_all_scales_and_images_again(name):
    tokenizer, tokens = TOKENIZERS[name], method(name, "encode")(IMAGES)
    assert tokens.shape == (3, tokenizer.spec.n, 1) == (3, 118, 1)
    assert tokens.dtype == jnp.int32
    assert len(np.unique(tokens)) > 3
    recon, losses, seen = method(name, "autoencode")(IMAGES)
    np.testing.assert_array_equal(seen["tokens"], tokens)
    assert seen["latents"].shape == (3, 118, 3)
    assert recon.shape == IMAGES.shape
    assert {"codebook", "commit"} <= losses.keys()
    decoded = method(name, "decode")(tokens)
    shown = recon if name == "independent" else jnp.clip(recon, -1, 1)
    np.testing.assert_allclose(decoded, shown, rtol=1e-4, atol=1e-4)


@each
def test_context_does_not_depend_on_tokens_of_its_own_or_later_scales(name):
    level, full = TOKENIZERS[name].spec.coords[:, 0], method(name, "context")(TOKENS)
    assert full.shape == (2, 118, 3)
    np.testing.assert_array_equal(full[:, level == 0], np.zeros((2, 1, 3)))
    for i in range(1, 4):
        half = np.where((level < i)[:, None], TOKENS, 0)
        found = method(name, "context")(half)
        np.testing.assert_array_equal(found[:, level <= i], full[:, level <= i])
        other = method(name, "context")(np.where((level == i - 1)[:, None], (TOKENS + 1) % 16, TOKENS))
        assert (np.abs(other - full)[:, level == i].max((1, 2)) > 1e-3).all(), "the scale before counts"


@residual
def test_context_is_the_sum_of_what_earlier_scales_add(name):
    parts, sums = method(name, "parts")(TOKENS), method(name, "sums")(TOKENS)
    np.testing.assert_allclose(sums[-1], sum(parts), rtol=1e-5, atol=1e-5)
    found = maps(method(name, "context")(TOKENS), SCALES)
    for level, (size, total) in enumerate(zip(TOKENIZERS[name].spec.scales[1:], sums), 1):
        np.testing.assert_allclose(found[level], resize(total, size, "area"), rtol=1e-5, atol=1e-5)


@residual
def test_own_is_what_a_scale_adds_in_its_own_size(name):
    level, full = TOKENIZERS[name].spec.coords[:, 0], method(name, "own")(TOKENS)
    parts = method(name, "parts")(TOKENS)
    for i, (size, found) in enumerate(zip(TOKENIZERS[name].spec.scales, maps(full, SCALES))):
        np.testing.assert_allclose(found, resize(parts[i], size, "area"), rtol=1e-5, atol=1e-5)
        alone = method(name, "own")(np.where((level == i)[:, None], TOKENS, 0))
        np.testing.assert_array_equal(alone[:, level == i], full[:, level == i])


@residual
def test_scales_left_out_at_the_end_leave_the_others_as_they_are(name):
    tokens = method(name, "encode")(IMAGES)
    few = method(name, "sums")(tokens[:, :22])
    for a, b in zip(few, method(name, "sums")(tokens)[:3], strict=True):
        np.testing.assert_array_equal(a, b)
    assert method(name, "decode")(tokens[:, :22]).shape == IMAGES.shape


def test_every_scale_describes_what_is_left_over():
    latents, codebook, sizes = normal(2, 4, 6, 3), normal(16, 3, seed=1), ((1, 1), (2, 3), (4, 6))
    part = lambda level, codes: (level + 1) * resize(codes, (4, 6)) / 3  # noqa: E731
    total, index, seen, losses = residual_quantise(latents, codebook, sizes, part, VectorLoss(codebook=2.0, commit=0.5))
    rest, squares = latents.astype(np.float64), []
    for level, size in enumerate(sizes):
        wanted = np.asarray(resize(jnp.asarray(rest, jnp.float32), size, "area"))
        nearest = np.square(wanted[..., None, :] - codebook).sum(-1).argmin(-1)
        np.testing.assert_array_equal(maps(index, sizes)[level], nearest)
        np.testing.assert_allclose(maps(seen, sizes)[level], wanted, atol=1e-5)
        rest = rest - np.asarray(part(level, jnp.asarray(codebook[nearest])))
        squares.append(np.square(rest).mean())
    np.testing.assert_allclose(total, latents - rest, atol=1e-5)
    expected = [2 * np.mean(squares), np.mean(squares) / 2]
    np.testing.assert_allclose([losses["codebook"], losses["commit"]], expected, rtol=1e-5)


def test_a_residual_pyramid_ends_in_the_size_of_the_latent():
    with pytest.raises(ValueError, match=r"scales is \(1, 2, 4\), but its last one must be the latent's \(8, 8\)"):
        _ = ResidualPyramid((16, 16), (1, 2, 4), **NET).spec


@pytest.mark.parametrize("last", [2, (3, 1), (9, 5)])
def test_independent_scales_may_be_any(last):
    scales = (1, (2, 1), last)
    spec = TOKENIZERS["independent"].clone(scales=scales).spec
    height, width = spec.scales[-1]
    tokens = TOKENS[:, : spec.n]
    image = method("independent", "decode", scales)(tokens)
    assert image.shape == (2, 2 * height, 2 * width, 3)
    blank = np.concatenate([np.zeros_like(tokens[:, :3]), tokens[:, 3:]], axis=1)
    np.testing.assert_array_equal(method("independent", "decode", scales)(blank), image)
    assert method("independent", "context", scales)(tokens).shape == (2, spec.n, 3)
    assert method("independent", "encode", scales)(IMAGES).shape == (3, spec.n, 1)


def test_an_independent_scale_quantises_the_averaged_latent():
    latents = method("independent", "latents")(IMAGES)
    tokens, codes = method("independent", "encode")(IMAGES), params_of("independent")["codebook"]
    codes = codes / np.linalg.norm(codes, axis=-1, keepdims=True)
    for size, found in zip(TOKENIZERS["independent"].spec.scales, maps(tokens[..., 0], SCALES)):
        cosine = np.asarray(resize(latents, size, "area")) @ codes.T
        np.testing.assert_array_equal(found, cosine.argmax(-1))


def test_coarse_scales_are_trained_to_show_the_averaged_image():
    tokens = method("independent", "encode")(IMAGES)
    _, losses, _ = method("independent", "autoencode")(IMAGES)
    errors = []
    for scale, start, end in ((1, 0, 1), ((2, 3), 1, 7), ((3, 5), 7, 22)):
        small = method("independent", "decode", (scale,))(tokens[:, start:end])
        errors.append(jnp.square(small - resize(jnp.asarray(IMAGES), small.shape[1:3], "area")).mean())
    np.testing.assert_allclose(losses["coarse"], np.mean(errors), rtol=1e-4)


def test_training_independent_scales_needs_the_size_of_the_latent():
    tokenizer = TOKENIZERS["independent"].clone(scales=(1, 2, 4))
    with pytest.raises(ValueError, match=r"in training its last one must be the latent's \(8, 12\)"):
        tokenizer.init_params(jax.random.key(0))


@each
def test_parameters_are_divided_as_the_rules_say(name):
    tokenizer = TOKENIZERS[name]
    mesh = make_mesh(MeshShape(1, 2, 2), jax.devices()[:4])
    shardings = shard(params_of(name), mesh, tokenizer.rules, smallest=16)
    specs = {str(x.spec) for x in jax.tree.leaves(shardings)}
    assert any("tp" in spec for spec in specs)
    assert any("fsdp" in spec for spec in specs)


def test_latents_of_all_levels_may_replace_dead_codes():
    level = TOKENIZERS["residual"].spec.coords[:, 0]
    chosen = _candidates(level, 5, 40)
    assert chosen.shape == (40,)
    assert np.bincount(level[chosen % 118]).tolist() == [10, 10, 10, 10]
    assert len(set(chosen[level[chosen % 118] == 3])) == 10
    assert set(chosen[level[chosen % 118] == 0] // 118) == set(range(5))
