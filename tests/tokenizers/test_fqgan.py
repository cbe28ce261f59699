"""FQGAN: sub-codes are kept apart, feature heads learn from a teacher, every codebook can renew its codes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import Losses
from ar_jax.convert.sources import param_shapes
from ar_jax.tokenizers.fqgan import FQGAN
from ar_jax.tokenizers.quantize import VectorLoss, normalise
from ar_jax.tokenizers.quantize_factorised import entanglement, factorised_quantise, look_up_all
from ar_jax.train import codes
from ar_jax.train.losses import Contrast
from ar_jax.train.tokenizer import tokenizer_gradients

SMALL = FQGAN(
    (8, 8), features=4, mult=(1, 2), res_blocks=0, latent=6, codes=8, code_features=4, groups=2, layers=1, heads=2,
    feature_widths=(6,), feature_layers=1, feature_heads=3, vq=VectorLoss(entropy=0.03),
)  # fmt: skip
IMAGES = {"image": np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)}


@dataclasses.dataclass(frozen=True)
class Corners:
    """A teacher: as many numbers of the image's corners."""

    width: int

    def open(self):
        return {}

    def __call__(self, params: Any, image: Any):
        return image[:, :2, :2].reshape(len(image), 1, 1, -1)[..., : self.width]


@functools.cache
def params():
    random = np.random.default_rng(3)
    return jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), param_shapes(SMALL))


def test_every_parameter_learns_with_a_teacher_and_figures_are_of_every_sub_code():
    teachers = (("teacher_0", Contrast(0.5, "features_0", Corners(6))),)
    grad_fn = tokenizer_gradients(SMALL, Losses(lpips=0.0, adversarial=0.0, others=teachers))
    extra = codes.begin(SMALL, params(), reset=True)
    grads, extra, seen = jax.jit(grad_fn)({"model": params()}, extra, {}, IMAGES, jax.random.key(0), 0)
    assert {"latents", "latents_1"} <= extra.keys(), "dead codes of both codebooks can be renewed"
    still = jax.tree.map_with_path(
        lambda path, x: "" if np.asarray(x).any() else jax.tree_util.keystr(path), grads["model"]
    )
    assert not [name for name in jax.tree.leaves(still) if name]
    for k in range(2):
        assert {f"usage/code{k}", f"code_perplexity/code{k}", f"commit/code{k}", f"entropy/code{k}"} <= seen.keys()
    assert 0 < seen["disentangle"] < 0.1
    # of six images one is right: without a temperature cosines leave the loss within 1 of that of chance
    assert abs(float(seen["teacher_0"]) - np.log(6)) < 1


def test_codes_go_through_and_lie_side_by_side():
    tokens = np.random.default_rng(1).integers(0, 8, (2, 16, 2)).astype(np.int32)

    def run(self):
        image = IMAGES["image"][:2] / 127.5 - 1
        rows = self.embed(tokens)
        streams = tuple(x.reshape(2, 4, 4, 4) for x in jnp.split(rows, 2, axis=-1))
        return rows, self.quantise(streams)[1], self.encode(image), self.autoencode(image)[2]["tokens"], self.decode(rows), self.decode(tokens)  # fmt: skip

    rows, again, encoded, seen, by_vector, by_code = jax.jit(lambda p: SMALL.apply({"params": p}, method=run))(params())
    np.testing.assert_array_equal(again.reshape(2, 16, 2), tokens)
    np.testing.assert_array_equal(encoded, seen)
    np.testing.assert_array_equal(by_vector, by_code)
    np.testing.assert_allclose(rows[..., 4:8], normalise(params()["codebook_1"])[tokens[..., 1]], atol=1e-6)
    assert (SMALL.spec.codes, encoded.shape) == ((8, 8), (2, 16, 2))


def test_the_quantiser_takes_streams_of_different_sizes_and_entanglement_is_a_squared_cosine():
    random = np.random.default_rng(2)
    tables = random.normal(size=(5, 2)).astype("f4"), random.normal(size=(7, 3)).astype("f4")
    index = random.integers(0, 5, (2, 4, 2)).astype(np.int32)
    latents = tuple(table[index[..., k]] for k, table in enumerate(tables))
    chosen, found, losses = factorised_quantise(latents, tables)
    np.testing.assert_array_equal(found, index)
    np.testing.assert_array_equal(jnp.concatenate(chosen, -1), look_up_all(tables, index))
    assert losses.keys() == {"codebook/code0", "commit/code0", "codebook/code1", "commit/code1"}
    one, other, third = (jnp.asarray(x, jnp.float32)[None] for x in ([1, 0], [3, 3], [0, 2]))
    np.testing.assert_allclose(entanglement((one, other)), 0.5, rtol=1e-6)
    np.testing.assert_allclose(entanglement((one, other, third)), (0.5 + 0 + 0.5) / 3, rtol=1e-6)


def test_what_cannot_be_is_refused():
    build = lambda **fields: jax.eval_shape(SMALL.clone(**fields).init_params, jax.random.key(0))  # noqa: E731
    with pytest.raises(
        ValueError, match=r"feature_widths is \(6, 3\), for 2 streams; give one for each stream but the first, 1"
    ):
        build(feature_widths=(6, 3))
    with pytest.raises(ValueError, match=r"mult makes a network of width 8, which 3 heads do not divide evenly"):
        build(heads=3)
    with pytest.raises(ValueError, match=r"tokenizer\.size must be multiples of 2 pixels, got \(9, 8\)"):
        _ = SMALL.clone(size=(9, 8)).spec
    with pytest.raises(ValueError, match=r"'features_0', which is 6 wide, but its teacher's features are 5 wide"):
        Contrast(0.5, "features_0", Corners(5))({}, {}, jnp.zeros((2, 8, 8, 3)), jnp.zeros((2, 17, 6)))
