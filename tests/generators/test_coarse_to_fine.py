"""CTF: clusters of a codebook, drawing clusters and then codes, editing, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params

from ar_jax import codebook
from ar_jax.data import Info
from ar_jax.decode.edit import Edit
from ar_jax.decode.glimpse import glimpse
from ar_jax.decode.guidance import Interval
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.temperature import Constant
from ar_jax.files.models import describe, open_model
from ar_jax.generators.coarse_to_fine import CoarseFirst, CoarseToFine
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokenizers.clustered import Clustered
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.checkpoint import save_params

BASE = VQGAN((4, 8), features=4, mult=(1, 2), res_blocks=1, latent=8, codes=12, code_features=4, groups=2)
NET, INFO = Transformer(1, 16, 2, hidden=24), Info(classes=3)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (3, 4, 8, 3)).astype(np.float32)
BATCH, KEYS = {"label": np.arange(3, dtype=np.int32)}, jax.random.split(jax.random.key(1), 3)
CLUSTER = np.array([2, 0, 1, 1, 2, 2, 0, 3, 3, 1, 0, 2], np.int32)


def made(clusters=4, cluster=CLUSTER):
    """Tokenizer, its parameters, generator, its parameters."""
    tokenizer = Clustered(BASE, clusters)
    generator = CoarseToFine(NET, Label(16), fine=NET, clusters=clusters).complete(tokenizer.spec, INFO)
    below = random_params(BASE, 0.5, seed=2)
    return tokenizer, {**below, "cluster": jnp.asarray(cluster)}, generator, random_params(generator, 0.5)


def frozen(tokenizer, params):
    return functools.partial(tokenizer.apply, {"params": params})


def drawn(tokenizer, below, generator, params, temperature=1.0, guidance=1.5):
    value = Sampling(Interval(guidance), Constant(temperature))

    @jax.jit
    def draw(params, below):
        order = CoarseFirst()(generator.spec)
        return value.tokens(generator, params, BATCH, order, keys=KEYS, tokenizer=frozen(tokenizer, below))

    return jax.tree.map(np.asarray, draw(params, below))


def test_a_code_always_lies_in_its_cluster():
    tokenizer, below, generator, params = made()
    tokens, account = drawn(tokenizer, below, generator, params)
    coarse, fine = np.split(tokens[..., 0], 2, axis=1)
    np.testing.assert_array_equal(CLUSTER[fine], coarse)
    assert len(np.unique(fine)) > 5
    assert (account.calls["generator"] == 8).all()
    assert (account.calls["fine"] == 1).all()
    seen = frozen(tokenizer, below)(IMAGES, method="encode")
    np.testing.assert_array_equal(seen[:, :8], CLUSTER[seen[:, 8:]])
    np.testing.assert_array_equal(seen[:, 8:], BASE.apply({"params": below}, IMAGES, method="encode"))


@pytest.mark.parametrize("clusters", [1, 12])
def test_one_cluster_says_nothing_and_as_many_as_codes_say_all(clusters):
    tokens, _ = drawn(*made(clusters, np.arange(12, dtype=np.int32) * clusters // 12))
    coarse, fine = np.split(tokens, 2, axis=1)
    assert (coarse == (fine if clusters == 12 else 0)).all()
    assert len(np.unique(fine)) > 5


def test_the_likeliest_tokens_are_those_of_teacher_forcing():
    """Rows from the cache are those of training, and so is what tells the codes."""
    tokenizer, below, generator, params = made()
    tokens, _ = drawn(tokenizer, below, generator, params, temperature=0.0, guidance=1.0)

    @jax.jit
    def want(params, tokens):
        coarse = tokens[:, :8]
        own = functools.partial(generator.apply, {"params": params})
        cond = own(BATCH, jnp.zeros(3, bool), method="condition")
        h = own(coarse, cond, raster(generator.inputs.spec), method="hidden")
        told = own(coarse[..., 0], cond, method="known")
        head = lambda name, rows: rows @ params[name]["readout"]["kernel"]  # noqa: E731
        inside = jnp.asarray(CLUSTER) == coarse
        return head("head", h).argmax(-1), jnp.where(inside, head("fine_head", told), -jnp.inf).argmax(-1)

    coarse, fine = want(params, tokens)
    np.testing.assert_array_equal(tokens[:, :8, 0], coarse)
    np.testing.assert_array_equal(tokens[:, 8:, 0], fine)


def test_losses_are_of_both_networks_and_clusters_are_told_wrong_in_training():
    tokenizer, below, generator, params = made()
    fine = np.random.default_rng(3).integers(12, size=(3, 8, 1)).astype(np.int32)
    tokens = np.concatenate([CLUSTER[fine], fine], axis=1)

    @functools.partial(jax.jit, static_argnames="wrong")
    def run(params, below, key=None, wrong=0.05):
        order = CoarseFirst()(generator.spec)
        return generator.clone(wrong=wrong).apply(
            {"params": params}, tokens, BATCH, order, drop=jnp.zeros(3, bool), key=key, tokenizer=frozen(tokenizer, below),
            method="loss",
        )  # fmt: skip

    loss, weight, metrics = run(params, below)
    assert loss.shape == weight.shape == (3, 16)
    assert np.isfinite(loss).all()
    assert (loss > 0).any()
    np.testing.assert_allclose(metrics["fine_perplexity"], np.exp(loss[:, 8:].mean()), rtol=1e-5)
    np.testing.assert_allclose(metrics["perplexity"], np.exp(loss[:, :8].mean()), rtol=1e-5)
    np.testing.assert_array_equal(run(params, below, jax.random.key(0), wrong=0.0)[0], loss)
    other = run(params, below, jax.random.key(0), wrong=0.9)[0]
    np.testing.assert_array_equal(other[:, :8], loss[:, :8])
    assert np.isfinite(other).all()
    assert (np.abs(other - loss)[:, 8:].max(1) > 1e-3).all()


def test_an_edit_keeps_clusters_and_codes_where_nothing_is_free():
    tokenizer, below, generator, params = made()
    free = np.zeros((3, 4, 8), bool)
    free[:2, :2, :4] = True  # two cells

    @jax.jit
    def run(params, below):
        order = CoarseFirst()(generator.spec)
        edit = Edit(jnp.asarray(IMAGES), jnp.asarray(free))
        value = Sampling(Interval(1.0))
        return frozen(tokenizer, below)(IMAGES, method="encode"), value.images(
            generator, tokenizer, params, below, BATCH, order, keys=KEYS, edit=edit, decoded=False
        )[0]

    image, edited = map(np.asarray, run(params, below))
    coarse, fine = np.split(edited[..., 0], 2, axis=1)
    np.testing.assert_array_equal(CLUSTER[fine], coarse)
    same = (image == edited)[..., 0]
    kept = np.tile(~free.reshape(3, 2, 2, 4, 2).any((2, 4)).reshape(3, 8), (1, 2))
    assert same[kept].all()
    assert not same[~kept].all()


def test_glimpses_show_clusters_before_codes_and_what_is_kept_behind_a_hole():
    tokenizer, below, *_ = made()
    call = frozen(tokenizer, below)
    tokens, slots = call(IMAGES, method="encode"), np.arange(16)

    def shown(known):
        known = jnp.broadcast_to(jnp.asarray(known), (3, 16))
        return np.asarray(glimpse(tokenizer, call, jnp.where(known[..., None], tokens, 7), known, KEYS))

    nothing, coarse, all_ = (shown(slots < count) for count in (0, 8, 16))
    np.testing.assert_allclose(all_, call(tokens, method="decode"), atol=1e-5)
    assert not nothing.any()
    assert np.abs(coarse - all_).max() > 1e-3
    hole = shown(slots % 8 != 2)  # third of four places in the first row: 4x8 pixels, cells of 2x2
    assert not hole[:, :2, 4:6].any()
    assert np.abs(hole[:, :, 6:]).min(axis=(1, 2)).all()


def test_clusters_are_found_for_a_trained_tokenizer(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    table = np.repeat(np.eye(4, dtype=np.float32), 3, axis=0) + 1e-3 * np.arange(12)[:, None]
    params = jax.tree.map(np.asarray, random_params(BASE, 0.5)) | {"codebook": table.astype(np.float32)}
    base.mkdir()
    save_params(base / "params", params)
    describe(base, "tokenizer", BASE, INFO, {})
    codebook.write(Clustered(VQGAN(), 4), codebook.Options(str(out), base=str(base)))
    found = open_model(out, "tokenizer")
    assert found.module == Clustered(BASE, 4), "the base is that of the folder"
    cluster = np.asarray(found.params()["cluster"]).reshape(4, 3)
    assert (cluster == cluster[:, :1]).all()
    assert sorted(cluster[:, 0]) == [0, 1, 2, 3]
    np.testing.assert_array_equal(found.params()["codebook"], params["codebook"])
    with pytest.raises(ValueError, match=r"^--base is missing"):
        codebook.write(Clustered(BASE, 4), codebook.Options(str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"^tokenizer\.clusters is 13, but there are 12 codes"):
        codebook.write(Clustered(BASE, 13), codebook.Options(str(tmp_path / "other"), base=str(base)))
    assert not (tmp_path / "other").exists()


def test_bad_input_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"^tokenizer\.clusters is 13, but there are 12 codes"):
        _ = Clustered(BASE, 13).spec
    with pytest.raises(ValueError, match=r"^tokenizer\.base is KLVAE, but codes are clustered"):
        _ = Clustered(KLVAE(), 4).spec
    with pytest.raises(ValueError, match=r"^CoarseToFine draws clusters of codes and then the codes, but"):
        CoarseToFine(NET, Label(16), fine=NET).complete(BASE.spec, INFO)
    with pytest.raises(ValueError, match=r"^generator\.fine must be a Transformer of width 16, got None"):
        CoarseToFine(NET, Label(16)).complete(Clustered(BASE, 4).spec, INFO)
    with pytest.raises(ValueError, match=r"^generator\.clusters is 13, but there are only 12 codes"):
        CoarseToFine(NET, Label(16), fine=NET, clusters=13).complete(Clustered(BASE, 4).spec, INFO)
    tokenizer, below, generator, params = made()
    with pytest.raises(ValueError, match=r"^generator\.clusters is 4, but the tokenizer has 3"):
        drawn(tokenizer.clone(clusters=3), below, generator, params)
    value = Sampling(Interval(1.0))
    with pytest.raises(ValueError, match=r"use CoarseFirst"):
        value.tokens(generator, params, BATCH, raster(generator.spec), keys=KEYS, tokenizer=frozen(tokenizer, below))
