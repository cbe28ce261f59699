"""VQGAN-LC: frozen features stay, their projection moves all codes; the command that makes them."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax import codebook
from ar_jax.config import Losses, TokenizerStage, load_config
from ar_jax.convert.sources import param_shapes
from ar_jax.data import Data
from ar_jax.files.models import open_model
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokenizers.vqgan_lc import VQGANLC
from ar_jax.train.__main__ import load_start
from ar_jax.train.exported import Exported
from ar_jax.train.tokenizer import tokenizer_recipe

SMALL = VQGANLC(
    (8, 8), features=4, mult=(1, 2), res_blocks=0, latent=6, codes=20, code_features=3, groups=2, feature_width=12,
    attention=(),
)  # fmt: skip


def test_features_have_neither_gradients_nor_moments_and_codes_are_their_projection():
    image = np.random.default_rng(0).uniform(-1, 1, (4, 8, 8, 3)).astype(np.float32)
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda x: random.normal(0, 0.5, x.shape).astype(np.float32), param_shapes(SMALL))

    @jax.jit
    def run(params):
        def objective(params):
            recon, losses, _ = SMALL.apply({"params": params}, image, method="autoencode")
            return jnp.abs(recon - image).mean() + sum(losses.values()), losses

        every = jnp.arange(20)[None, :, None]
        return *jax.grad(objective, has_aux=True)(params), SMALL.apply({"params": params}, every, method="embed")

    grads, losses, codes = run(params)
    assert not grads.pop("frozen").any()
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))
    np.testing.assert_allclose(losses["codebook"], 0.33 * losses["commit"], rtol=1e-4)
    projected = params["frozen"] @ params["projector"]["kernel"] + params["projector"]["bias"]
    np.testing.assert_allclose(codes[0], projected, atol=1e-5)

    for name in ("mnist5k", "f16", "f8"):
        stage = load_config(f"vqgan_lc:{name}").tokenizer
        optim = dataclasses.replace(stage.optim, schedule="constant")
        losses = Losses(lpips=0.0, adversarial=0.0)
        recipe = tokenizer_recipe(TokenizerStage(module=SMALL, losses=losses, steps=3, batch=4, optim=optim), SMALL)
        moments = jax.eval_shape(recipe.init, jax.random.key(0)).opt
        assert not any(leaf.shape == (20, 12) for leaf in jax.tree.leaves(moments)), name


def teacher(path):
    """Four pixels around the middle of an image, as a map of one place."""
    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
    program = jax.jit(lambda image: image[:, 8:24:8, 8:24:8].reshape(image.shape[0], 1, 1, 12))
    path.write_bytes(jax.export.export(program)(shape).serialize())
    return Exported(str(path))


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codebook")
    data = Data(name="mnist5k", size=32, split="test")
    return codebook.Options(str(folder / "made"), data, teacher(folder / "corners.export"), pool=1, batch=500)


def test_the_command_writes_a_tokenizer_that_begins_with_centres_of_every_class(options):
    codebook.write(SMALL, options)
    model = open_model(options.out, "tokenizer")
    assert model.module == SMALL
    frozen = np.asarray(model.params()["frozen"])
    assert frozen.shape == (20, 12)
    assert len(np.unique(frozen, axis=0)) > 10
    stage, wider = TokenizerStage(start=options.out), param_shapes(SMALL.clone(feature_width=13))
    with pytest.raises(
        ValueError, match=r"frozen has shape \(20, 12\) in .*, but the configured model needs shape \(20, 13\)"
    ):
        load_start(stage, "tokenizer", wider)
    with pytest.raises(ValueError, match=r"--out is .*made, which is not empty"):
        codebook.write(SMALL, options)


def test_clusters_are_of_a_group_alone():
    vectors = np.repeat(np.array([[0.0, 1], [0, 3], [5, 1], [5, 9]], np.float16), 3, axis=0)[:, None]
    centres = codebook.clustered(vectors, np.repeat([0, 0, 1, 1], 3), 2, 2, seed=0)
    assert sorted(map(tuple, centres[:2].tolist())) == [(0, 1), (0, 3)]
    assert sorted(map(tuple, centres[2:].tolist())) == [(5, 1), (5, 9)]
    with pytest.raises(
        ValueError, match=r"class 0 has 6 vectors for 7 codes; take fewer codes, more images or a larger"
    ):
        codebook.clustered(vectors, np.repeat([0, 0, 1, 1], 3), 2, 7, seed=0)


@pytest.mark.parametrize(
    ("tokenizer", "fields", "message"),
    [
        (SMALL.clone(codes=21), {}, r"tokenizer\.codes is 21, which 10 classes cannot share evenly; give a multiple of 10"),
        (SMALL.clone(feature_width=9), {}, r"feature_width is 9, but the teacher's features are 12 wide"),
        (SMALL, {"teacher": Exported("nowhere")}, r"--teacher\.path is 'nowhere', which is no file"),
        (SMALL, {"base": "runs/a"}, r"--base is runs/a, but VQGANLC is made of no other tokenizer; leave it out"),
        (VQGAN((8, 8)), {}, r"the config's tokenizer is VQGAN; only VQGANLC, FeatureCodes and Clustered have what k-means finds"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused_and_nothing_is_written(options, tmp_path, tokenizer, fields, message):
    changed = dataclasses.replace(options, out=str(tmp_path / "other"), **fields)
    with pytest.raises(ValueError, match=message):
        codebook.write(tokenizer, changed)
    assert not list(tmp_path.iterdir())
