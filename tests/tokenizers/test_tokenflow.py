"""TokenFlow: two parts share an index, a scale may be left out, the semantic part learns from a teacher."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import Losses
from ar_jax.convert.sources import param_shapes
from ar_jax.tokenizers.quantize_shared import halves_normalised, shared_quantise, shared_residual_quantise
from ar_jax.tokenizers.tokenflow import PatchViT, TokenFlow
from ar_jax.train import codes
from ar_jax.train.losses import Teacher
from ar_jax.train.tokenizer import tokenizer_gradients

SMALL = TokenFlow(
    (6, 6), scales=(1, 3), features=4, mult=(1, 2), res_blocks=0, latent=6, codes=8, code_features=3, groups=2,
    semantic_features=2, backbone=PatchViT(1, 8, 2, patch=2), semantic_layers=1, semantic_width=8, semantic_heads=2, target=5,
)  # fmt: skip
RANDOM = np.random.default_rng(0)
CODES = RANDOM.normal(size=(8, 5)).astype(np.float32)
LATENTS = RANDOM.normal(size=(2, 3, 3, 5)).astype(np.float32)
SIZES = ((1, 1), (2, 2), (3, 3))


@dataclasses.dataclass(frozen=True)
class Pooled:
    """A teacher: numbers of every second pixel, 3x3 places."""

    width: int = 5

    def open(self):
        return {}

    def __call__(self, params: Any, image: Any):
        return jnp.concatenate([image[:, ::2, ::2], image[:, 1::2, ::2]], axis=-1)[..., : self.width]


def test_the_index_is_nearest_in_both_parts_together_or_in_one_alone():
    for first, weight in ((2, 1.0), (2, 0.25), (4, 0.0)):
        code, index, losses = jax.jit(lambda z, f=first, w=weight: shared_quantise(z, CODES, f, weight=w))(LATENTS)
        z, table = (np.asarray(halves_normalised(x, first), np.float64) for x in (LATENTS, CODES))
        square = np.square(z[..., None, :] - table)
        want = (square[..., :first].sum(-1) + weight * square[..., first:].sum(-1)).argmin(-1)
        np.testing.assert_array_equal(index, want)
        np.testing.assert_allclose(code, table[want], atol=1e-5)
        np.testing.assert_allclose(losses["codebook"], np.square(table[want] - z).mean(), rtol=1e-4)


def test_a_scale_that_is_left_out_adds_nothing_and_counts_in_no_loss():
    run = jax.jit(
        lambda key, skip: shared_residual_quantise(LATENTS, CODES, 2, SIZES, skip=skip, key=key), static_argnums=1
    )
    plain, index, _, _ = jax.jit(lambda: shared_residual_quantise(LATENTS, CODES, 2, SIZES))()
    same = run(jax.random.key(0), 0.0)
    np.testing.assert_array_equal(same[0], plain)
    assert index.shape == (2, 14)
    fewer = [
        jax.jit(lambda i=i: shared_residual_quantise(LATENTS, CODES, 2, (SIZES[0], *SIZES[i : i + 1])))()
        for i in (1, 2)
    ]
    seen = set()
    for seed in range(6):
        total, found, _, mean = run(jax.random.key(seed), 1.0)
        np.testing.assert_array_equal(found[:, :1], index[:, :1])  # the first never is
        which = [i for i, one in enumerate(fewer) if np.allclose(total, one[0], atol=1e-5)]
        assert len(which) == 1
        np.testing.assert_allclose(mean["commit"], fewer[which[0]][3]["commit"], rtol=1e-4)
        seen.add(which[0])
    assert seen == {0, 1}


def test_both_parts_and_the_semantic_decoder_learn_and_levels_know_coarser_ones_only():
    params = jax.tree.map(lambda x: RANDOM.normal(0, 0.3, x.shape).astype(np.float32), param_shapes(SMALL))
    teacher = Teacher(1.0, "semantics", Pooled(), projected=False)
    grad_fn = tokenizer_gradients(SMALL, Losses(lpips=0.0, adversarial=0.0, teacher=teacher))
    images = {"image": RANDOM.integers(0, 256, (4, 6, 6, 3)).astype(np.uint8)}
    extra = codes.begin(SMALL, params, reset=True)
    tokens = RANDOM.integers(0, 8, (2, 10, 1)).astype(np.int32)
    later = np.where(np.arange(10)[None, :, None] < 1, tokens, (tokens + 1) % 8)

    @jax.jit
    def run(params):
        call = lambda *args, method: SMALL.apply({"params": params}, *args, method=method)  # noqa: E731
        learned = grad_fn({"model": params}, extra, {}, images, jax.random.key(0), 0)
        sums = call(tokens, method="sums")[0], call(tokens[:, :1], method="sums")[-1]
        return learned, sums, [call(x, method="context") for x in (tokens, later)], call(tokens, method="embed")

    (grads, _, seen), (part, prefix), (known, other), rows = run(params)
    still = jax.tree.map_with_path(
        lambda path, x: "" if np.asarray(x).any() else jax.tree_util.keystr(path), grads["model"]
    )
    assert not [name for name in jax.tree.leaves(still) if name]
    assert 0 < seen["teacher"] < 2
    np.testing.assert_array_equal(part, prefix)
    np.testing.assert_array_equal(known, other)
    assert not known[:, 0].any()
    np.testing.assert_allclose(known[:, 1:], np.repeat(rows[:, :1], 9, axis=1), atol=1e-5)
    np.testing.assert_allclose(np.square(rows[..., :2]).sum(-1), 1, rtol=1e-5)


def test_what_cannot_be_is_refused():
    build = lambda **fields: jax.eval_shape(SMALL.clone(**fields).init_params, jax.random.key(0))  # noqa: E731
    with pytest.raises(ValueError, match=r"scales is \(1, 2\), but its last one must be the latent's \(3, 3\)"):
        build(scales=(1, 2))
    with pytest.raises(
        ValueError, match=r"backbone gives maps of \(2, 2\), but the latent is \(3, 3\); they must be equal"
    ):
        build(backbone=PatchViT(1, 8, 2, patch=3))
    with pytest.raises(ValueError, match=r"l2_norm is False, but TokenFlow normalises both parts"):
        build(l2_norm=False)
    with pytest.raises(
        ValueError, match=r"projected is False, but 'semantics' is 4 wide and the teacher's features are 5"
    ):
        Teacher(1.0, "semantics", Pooled(), projected=False).init(
            jax.random.key(0), {}, jnp.zeros((1, 6, 6, 3)), jnp.zeros((1, 3, 3, 4))
        )
