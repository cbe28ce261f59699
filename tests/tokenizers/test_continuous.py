import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.config import Losses, TokenizerStage
from ar_jax.convert.sources import param_shapes
from ar_jax.files import codec
from ar_jax.nets.patchgan import PatchGan
from ar_jax.tokenizers.continuous import draw, kl_divergence, patchify, unpatchify
from ar_jax.tokenizers.givt_vae import GivtVAE
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.patches import Patches
from ar_jax.train.measure import moments
from ar_jax.train.optim import Optim
from ar_jax.train.tokenizer import tokenizer_recipe

IMAGES = np.random.default_rng(0).integers(60, 140, size=(6, 8, 16, 3)).astype(np.uint8)
IMAGES[..., 1] //= 2
VAE = KLVAE((8, 16), features=4, mult=(1, 2), res_blocks=1, latent=3, patch=2, groups=2, kl=0.1)


@functools.cache
def params():
    return jax.jit(VAE.init_params)(jax.random.key(0))


def test_numbers_of_a_patch_lie_channel_by_channel():
    x = np.arange(2 * 4 * 2).reshape(1, 2, 4, 2).astype(np.float32)
    tokens = patchify(x, 2)
    assert tokens.shape == (1, 2, 8)
    np.testing.assert_array_equal(tokens[0, 1], [4, 6, 12, 14, 5, 7, 13, 15])
    np.testing.assert_array_equal(unpatchify(tokens, (1, 2), 2), x)
    wide = patchify(x, (1, 2))
    assert wide.shape == (1, 4, 4)
    np.testing.assert_array_equal(wide[0, 1], [4, 6, 5, 7])
    np.testing.assert_array_equal(unpatchify(wide, (2, 2), (1, 2)), x)


def test_divergence_from_the_unit_gaussian_has_its_closed_form():
    zero = jnp.zeros((2, 3, 4))
    np.testing.assert_allclose(kl_divergence(zero, zero), [0, 0])
    np.testing.assert_allclose(kl_divergence(zero + 2, zero), [24, 24])
    np.testing.assert_allclose(kl_divergence(zero, zero + np.log(4)), np.full(2, 6 * (3 - np.log(4))), rtol=1e-6)


def test_draws_have_the_mean_and_spread_of_the_posterior():
    noise = jax.random.normal(jax.random.key(0), (10000, 1))
    x = draw(jnp.full((10000, 1), 3.0), jnp.full((10000, 1), np.log(0.25)), noise)
    np.testing.assert_allclose([x.mean(), x.std()], [3, 0.5], atol=0.02)


@pytest.mark.parametrize(
    "make", [lambda: VAE, lambda: Patches((8, 16), (2, 4)), lambda: Patches((8, 16), 2, channels=1)]
)
def test_measured_tokens_have_mean_zero_and_variance_one_and_decode_alike(make):
    module = make()
    weights = params() if module is VAE else {}
    image = IMAGES.astype(np.float32) / 127.5 - 1
    shift, scale = moments(module, weights, [{"image": IMAGES}])
    channels = 3 if module.channels == 3 else 1
    assert len(shift) == len(scale) == channels
    ready = module.clone(shift=shift, scale=scale)
    tokens = ready.apply({"params": weights}, image, key=jax.random.fold_in(jax.random.key(0), 0), method="encode")
    assert tokens.shape == (6, ready.spec.n, ready.spec.channels)
    each = np.asarray(tokens).reshape(6, ready.spec.n, channels, -1)
    np.testing.assert_allclose(each.mean((0, 1, 3)), np.zeros(channels), atol=2e-3)
    np.testing.assert_allclose(each.std((0, 1, 3)), np.ones(channels), atol=2e-3)
    decoded, raw = (m.apply({"params": weights}, m.apply({"params": weights}, image, method="encode"), method="decode")
                    for m in (ready, module))  # fmt: skip
    np.testing.assert_allclose(decoded, raw, atol=1e-4)


def test_patches_give_the_image_back():
    image = IMAGES.astype(np.float32) / 127.5 - 1
    patches = Patches((8, 16), 4, shift=(0.1,), scale=(2.0,))
    np.testing.assert_allclose(patches.decode(patches.encode(image)), image, atol=1e-6)
    grey = Patches((8, 16), 4, channels=1)
    want = np.repeat(image.mean(-1, keepdims=True), 3, -1)
    np.testing.assert_allclose(grey.decode(grey.encode(image)), want, atol=1e-6)


def test_encoding_draws_only_with_a_key():
    image = IMAGES[:1].astype(np.float32) / 127.5 - 1
    encode = functools.partial(VAE.apply, {"params": params()}, image, method="encode")
    np.testing.assert_array_equal(encode(), encode())
    assert np.abs(encode(key=jax.random.key(0)) - encode()).max() > 0.1
    assert np.abs(encode(key=jax.random.key(0)) - encode(key=jax.random.key(1))).max() > 0.1


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"tokenizer.size must be multiples of 4 pixels, got \(8, 10\)"):
        _ = VAE.clone(size=(8, 10)).spec
    with pytest.raises(ValueError, match=r"tokenizer.size must be multiples of 3 pixels, got \(8, 16\)"):
        _ = Patches((8, 16), 3).spec
    with pytest.raises(ValueError, match=r"tokenizer.size must be multiples of 4x6 pixels, got \(8, 16\)"):
        _ = VAE.clone(patch=(2, 3)).spec


def test_givts_tokens_are_latents_as_they_are():
    vae = GivtVAE((8, 16), features=4, mult=(1, 2), res_blocks=1, latent=3, groups=2)
    assert vae.shift == (0.0,)
    assert vae.spec.n == 4 * 8
    with pytest.raises(ValueError, match=r"are \(\(-1,\), \(\)\), but GivtVAE has no attention"):
        jax.eval_shape(vae.clone(encoder_attention=(-1,)).init_params, jax.random.key(0))


def test_givts_512_pixel_model_has_512_tokens_of_32_numbers():
    spec = GivtVAE((512, 512), patch=(1, 2)).spec
    assert (spec.n, spec.channels, spec.scales) == (512, 32, ((32, 16),))


def test_tokens_of_two_columns_are_pairs_of_latents():
    vae = GivtVAE((8, 16), features=4, mult=(1, 2), res_blocks=1, latent=3, groups=2)
    weights = jax.jit(vae.init_params)(jax.random.key(0))

    @jax.jit
    def both(weights, image):
        tokens, wide = (
            net.apply({"params": weights}, image, method="encode") for net in (vae, vae.clone(patch=(1, 2)))
        )
        decoded = [net.apply({"params": weights}, x, method="decode")
                   for net, x in ((vae, tokens), (vae.clone(patch=(1, 2)), wide))]  # fmt: skip
        return tokens, wide, decoded

    tokens, wide, decoded = both(weights, IMAGES[:2] / np.float32(127.5) - 1)
    pairs = np.asarray(tokens).reshape(2, 4, 4, 2, 3)  # image, row, pair, place, channel
    np.testing.assert_array_equal(wide, np.moveaxis(pairs, -1, -2).reshape(2, 16, 6))
    np.testing.assert_allclose(*decoded, atol=1e-6)


def attention_levels(params, side):
    return sorted({name.split("_")[1] for name in params[side] if name.startswith("attn_")})


def test_encoder_and_decoder_have_attention_where_they_say():
    plain = KLVAE((8, 16), features=4, mult=(1, 2, 1), res_blocks=1, latent=3, groups=2)
    shapes = param_shapes
    assert [attention_levels(shapes(plain), side) for side in ("encoder", "decoder")] == [["2"], []]
    vae = plain.clone(encoder_attention=(0, -2), decoder_attention=(1,))
    assert [attention_levels(shapes(vae), side) for side in ("encoder", "decoder")] == [["0", "1"], ["1"]]
    with pytest.raises(ValueError, match=r"attention is \(3,\); it must be levels, of which there are 3"):
        shapes(plain.clone(decoder_attention=(3,)))


def test_attention_that_adds_nothing_leaves_the_network_as_it_was():
    bare = KLVAE((4, 8), features=4, mult=(1, 2), res_blocks=1, latent=2, groups=2, encoder_attention=())
    full = bare.clone(encoder_attention=(0, 1), decoder_attention=(0,))
    weights = jax.tree_util.tree_map_with_path(
        lambda path, x: np.zeros_like(x) if "attn_" in str(path) and "proj_out" in str(path) else x,
        jax.jit(full.init_params)(jax.random.key(0)),
    )
    fewer = {
        side: {name: part for name, part in net.items() if not name.startswith("attn_")}
        for side, net in weights.items()
    }
    image = IMAGES[:1, :4, :8] / np.float32(127.5) - 1
    run = lambda vae: jax.jit(lambda p: vae.apply({"params": p}, image, method="autoencode")[0])  # noqa: E731
    np.testing.assert_array_equal(run(full)(weights), run(bare)(fewer))
    moved = jax.tree.map(lambda x: x + 0.1, weights)
    apart = {side: {name: moved[side][name] for name in net} for side, net in fewer.items()}
    assert np.abs(run(full)(moved) - run(bare)(apart)).max() > 1e-3


def test_a_model_written_before_attention_had_levels_is_the_same_network():
    written = codec.encode(VAE)
    del written["encoder_attention"], written["decoder_attention"]
    again = codec.decode(written, nn.Module)
    assert again == VAE
    assert attention_levels(param_shapes(again), "encoder") == ["1"]


def stage(**losses):
    return TokenizerStage(module=VAE, losses=Losses(lpips=0.0, **losses), steps=3, batch=6, optim=Optim(lr=3e-3))


def test_training_needs_no_codebook():
    recipe = tokenizer_recipe(stage(adversarial=0.5, adversarial_start=2, judge=PatchGan(4, 1)), VAE)
    state, update = jax.jit(recipe.init)(jax.random.key(0)), jax.jit(recipe.update)
    first, seen = state, []
    for i in range(12):
        state, metrics = update(state, {}, {"image": IMAGES}, jax.random.key(i))
        seen.append({name: float(value) for name, value in metrics.items()})
    assert seen[-1]["loss"] < seen[0]["loss"]
    # as on 66b0281, when all of this was one function
    np.testing.assert_allclose([m["loss"] for m in seen[:3]], [0.28686473, 0.23510057, 0.19739674], rtol=1e-5)
    assert {"kl", "reconstruction", "adversarial"} <= seen[0].keys()
    assert "usage" not in seen[0]
    assert recipe.advice(seen[-1]) == ""
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), first.params, state.params)
    assert all(jax.tree.leaves(moved)), moved
    picture, figures = jax.jit(recipe.preview)(state.params["model"], {}, {"image": IMAGES}, jax.random.key(0))
    assert picture.shape == (12, 8, 16, 3)
    assert figures.keys() == {"psnr", "ssim"}


def test_resetting_codes_that_do_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"losses.reset_after is 5, but KLVAE has no codes"):
        tokenizer_recipe(stage(adversarial=0.0, reset_after=5), VAE)
