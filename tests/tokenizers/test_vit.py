"""Tokenizers of transformers: ViTok and ViT-VQGAN."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import initial_params, never_moved, random_params

from ar_jax.config import load_config
from ar_jax.convert.sources import param_shapes
from ar_jax.nets.vit import TurnedViT, ViT
from ar_jax.tokenizers.quantize import normalise
from ar_jax.tokenizers.vit_vqgan import ViTVQGAN
from ar_jax.tokenizers.vitok import ViTok
from ar_jax.train.measure import moments
from ar_jax.train.optim import Optim, only_trained

NET = {"width": 16, "heads": 2, "hidden": 24}
VITOK = ViTok((8, 16), (2, 4), 3, TurnedViT(1, **NET, places="grid"), TurnedViT(2, **NET, places="grid"))
VQ = ViTVQGAN((8, 16), (4, 4), ViT(1, **NET), ViT(2, **NET), codes=16, code_features=4)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 16, 3)).astype(np.uint8)
FLOAT = IMAGES / np.float32(127.5) - 1
both = pytest.mark.parametrize("module", [VITOK, VQ], ids=["vitok", "vit_vqgan"])


def call(module, params):
    return functools.partial(module.apply, {"params": params})


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_published_towers_have_the_published_number_of_parameters():
    found = {
        name: param_shapes(load_config(f"configs/vitok.py:{name}").tokenizer.module) for name in ("s_b_16", "s_l_16")
    }
    s_b, s_l = found["s_b_16"], found["s_l_16"]
    for part, want in (
        (s_b["encoder"] | s_b["patches"], 43.3e6), (s_b["decoder"] | s_b["to_pixels"], 85.8e6),
        (s_l["decoder"] | s_l["to_pixels"], 383.7e6), (s_b, 129e6),
    ):  # fmt: skip
        assert abs(size(part) / want - 1) < 0.005
    described = {"small": (8, 512, 2048), "base": (12, 768, 3072), "large": (32, 1280, 5120)}
    for name, (layers, width, hidden) in described.items():
        params = param_shapes(load_config(f"configs/vit_vqgan.py:{name}").tokenizer.module)
        products = layers * (4 * width**2 + 2 * width * hidden)
        for tower in ("encoder", "decoder"):
            assert 0 < size(params[tower]) / products - 1 < 0.003
        assert params["codebook"].shape == (8192, 32)
        assert params["encoder_positions"].shape == (1024, width)


@both
def test_loss_falls_and_every_parameter_moves(module):
    first = params = initial_params(module)
    tx = optax.adam(1e-2)

    def loss_fn(params, key):
        recon, losses, _ = call(module, params)(FLOAT, key=key, method="autoencode")
        return jnp.square(recon - FLOAT).mean() + sum(losses.values())

    @jax.jit
    def update(params, state, key):
        loss, grads = jax.value_and_grad(loss_fn)(params, key)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for i in range(30):
        params, state, loss = update(params, state, jax.random.key(i))
        losses.append(float(loss))
    assert not never_moved(first, params)
    assert losses[-1] < 0.7 * losses[0]


def test_vitok_draws_from_its_moments_and_measured_tokens_have_unit_variance():
    module, params = VITOK, random_params(VITOK, 0.3)
    shift, scale = moments(module, params, [{"image": IMAGES}])
    apply, key = call(module.clone(shift=shift, scale=scale), params), jax.random.key(1)
    found = apply(FLOAT, method="moments")
    np.testing.assert_array_equal(apply(FLOAT, key=key, method="encode"), apply(found, key=key, method="drawn"))
    tokens = apply(FLOAT, method="encode")
    assert tokens.shape == (4, module.spec.n, module.spec.channels) == (4, 16, 3)
    recon, losses, seen = call(module, params)(FLOAT, method="autoencode")
    np.testing.assert_allclose(apply(tokens, method="decode"), recon, atol=1e-3)
    mean, logvar = np.split(np.asarray(found, np.float64), 2, axis=-1)
    want = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).mean()
    np.testing.assert_allclose(losses["kl"], module.kl * want, rtol=1e-4)
    assert seen["latents"].shape == (4, 4, 4, 3)


def test_vitok_serves_images_of_other_sizes_and_where_a_patch_lies_matters():
    params = random_params(VITOK, 0.3)
    tall = np.concatenate([FLOAT, FLOAT[:, ::-1]], axis=1)
    assert call(VITOK.clone(size=(16, 16)), params)(tall, method="autoencode")[0].shape == tall.shape
    mean = functools.partial(call(VITOK, params), method="encode")
    swapped = np.concatenate([FLOAT[:, 2:4], FLOAT[:, :2], FLOAT[:, 4:]], axis=1)  # two rows of patches
    there, back = np.asarray(mean(FLOAT)), np.asarray(mean(swapped))
    assert np.abs(there[:, :4] - back[:, 4:8]).max() > 1e-3
    line, grid = (VITOK.clone(encoder=TurnedViT(1, **NET, places=places)) for places in ("line", "grid"))
    assert np.abs(call(line, params)(FLOAT, method="encode") - call(grid, params)(FLOAT, method="encode")).max() > 1e-3


def test_codes_of_vit_vqgan_are_the_nearest_by_angle_and_decode_as_in_training():
    params = random_params(VQ, 0.3)
    apply = call(VQ, params)
    tokens, (recon, losses, seen) = apply(FLOAT, method="encode"), apply(FLOAT, method="autoencode")
    np.testing.assert_array_equal(tokens, seen["tokens"])
    latents, codes = (np.asarray(normalise(x)) for x in (seen["latents"], params["codebook"]))
    np.testing.assert_array_equal(tokens[..., 0], (latents.reshape(4, -1, 4) @ codes.T).argmax(-1))
    np.testing.assert_allclose(apply(tokens, method="decode"), recon, atol=1e-5)
    assert {"codebook", "commit"} <= losses.keys()
    assert tokens.shape == (4, VQ.spec.n, 1) == (4, 8, 1)


@pytest.mark.parametrize("name", ["vitok:s_b_16_decoder", "vit_vqgan:parti_decoder"])
def test_a_decoder_is_trained_alone(name):
    stage = load_config(name).tokenizer
    tower = {"vitok": VITOK, "vit_vqgan": VQ}[name.partition(":")[0]]
    shapes = param_shapes(tower)
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    grads = jax.grad(
        lambda p: sum(x.sum() for x in jax.tree.leaves(only_trained(Optim(trained=stage.optim.trained), p)))
    )(ones)
    moved = {name for name, part in grads.items() if all((x == 1).all() for x in jax.tree.leaves(part))}
    still = {name for name, part in grads.items() if all((x == 0).all() for x in jax.tree.leaves(part))}
    kept = {"encoder", "patches", "to_code"} & shapes.keys() | {
        "codebook",
        "code_hidden",
        "encoder_positions",
    } & shapes.keys()
    assert (moved, still) == (shapes.keys() - kept, kept)


def test_bad_input_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"^tokenizer\.size must be multiples of 2x4 pixels, got \(9, 16\)"):
        _ = VITOK.clone(size=(9, 16)).spec
    with pytest.raises(ValueError, match=r"^tokenizer\.size must be multiples of 4 pixels, got \(8, 18\)"):
        _ = VQ.clone(size=(8, 18)).spec
    with pytest.raises(ValueError, match=r"^TurnedViT: width / heads is 18 / 3; it must be a multiple of 4"):
        param_shapes(VITOK.clone(encoder=TurnedViT(1, 18, 3)))
    with pytest.raises(ValueError, match=r"^places is 'column'; it must be line or grid"):
        param_shapes(VITOK.clone(encoder=TurnedViT(1, **NET, places="column")))
