"""TiTok: tokens on a line, in its three forms; its two trainings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import initial_params, never_moved, random_params

from ar_jax.config import TokenizerStage, load_config
from ar_jax.convert.sources import param_shapes
from ar_jax.data import Info
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.search import BestOf
from ar_jax.files.models import describe
from ar_jax.generators.causal import Causal
from ar_jax.nets.conditioning import Caption
from ar_jax.nets.transformer import Transformer
from ar_jax.nets.vit import ClipViT
from ar_jax.orders import raster
from ar_jax.tokenizers.conditioned import said_of
from ar_jax.tokenizers.maskgit_vqgan import MaskgitVQGAN
from ar_jax.tokenizers.quantize_anchored import anchored
from ar_jax.tokenizers.titok import TiTok, TiTokVAE
from ar_jax.train.__main__ import load_start, prepare
from ar_jax.train.checkpoint import save_params
from ar_jax.train.losses import ProxyCodes
from ar_jax.train.measure import moments
from ar_jax.train.optim import is_trained
from ar_jax.train.tokenizer import reconstruct, training_pass

NET = {"width": 16, "heads": 2, "hidden": 24}
TOWERS = {"size": (8, 16), "cell": 4, "slots": 3, "encoder": ClipViT(1, **NET), "decoder": ClipViT(2, **NET)}
CODES = {"codes": 16, "code_features": 4}
VQ = TiTok(**TOWERS, **CODES, drawn_cell=(4, 2))
PROXY = MaskgitVQGAN((8, 16), 4, (1, 1, 1), res_blocks=1, codes=8, code_features=4, groups=2)
FIRST = TiTok(**TOWERS, **CODES, l2_norm=True, mixed=True, proxy=PROXY)
AWARE = TiTok(**TOWERS, **CODES, text_rows=3, text_width=5)
VAE = TiTokVAE(**TOWERS, latent=5)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 8, 16, 3)).astype(np.uint8)
FLOAT = IMAGES / np.float32(127.5) - 1


def call(module, params):
    return functools.partial(jax.jit(module.apply, static_argnames="method"), {"params": params})


@pytest.mark.parametrize("module", [FIRST, VAE], ids=["proxy", "vae"])
def test_loss_falls_and_every_parameter_moves(module):
    first = params = initial_params(module)
    tx = optax.adam(1e-2)

    @jax.jit
    def update(params, state, key):
        def loss_fn(params):
            recon, losses, _ = module.apply({"params": params}, FLOAT, key=key, method="autoencode")
            return jnp.square(recon - FLOAT).mean() + sum(losses.values())

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for i in range(12):
        params, state, loss = update(params, state, jax.random.key(i))
        losses.append(float(loss))
    assert not never_moved(first, params)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("module", [VQ, FIRST], ids=["vq", "proxy"])
def test_codes_lie_on_a_line_and_decode_as_in_training(module):
    apply = call(module, random_params(module, 0.3))
    tokens, (recon, losses, seen) = apply(FLOAT, method="encode"), apply(FLOAT, method="autoencode")
    assert tokens.shape == (4, module.spec.n, 1) == (4, 3, 1)
    assert module.spec.coords.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2]]
    assert (recon.shape, losses.keys()) == (FLOAT.shape, {"codebook", "commit"})
    np.testing.assert_array_equal(tokens, seen["tokens"])
    np.testing.assert_allclose(apply(tokens, method="decode"), recon, atol=1e-4)


def test_rows_of_the_first_form_are_read_in_memory_order():
    plain, params = FIRST.clone(mixed=False), random_params(FIRST, 0.3)

    def linear(rows):
        return rows @ params["to_code"]["kernel"] + params["to_code"]["bias"]

    rows = np.asarray(call(plain, params)(FLOAT, method="told"))
    np.testing.assert_allclose(call(plain, params)(FLOAT, method="latents"), linear(rows), atol=1e-4)
    channels = rows.reshape(4, -1)[:, np.arange(16)[None] * 3 + np.arange(3)[:, None]]  # channel c of token k: c*3 + k
    np.testing.assert_allclose(call(FIRST, params)(FLOAT, method="latents"), linear(channels), atol=1e-4)


def test_a_line_of_numbers_is_drawn_from_its_moments_and_measured():
    params = random_params(VAE, 0.3)
    shift, scale = moments(VAE, params, [{"image": IMAGES}])
    apply, key = call(VAE.clone(shift=shift, scale=scale), params), jax.random.key(1)
    found = apply(FLOAT, method="moments")
    np.testing.assert_array_equal(apply(FLOAT, key=key, method="encode"), apply(found, key=key, method="drawn"))
    tokens = apply(FLOAT, method="encode")
    assert tokens.shape == (4, VAE.spec.n, VAE.spec.channels) == (4, 3, 5)
    recon, losses, _ = call(VAE, params)(FLOAT, method="autoencode")
    np.testing.assert_allclose(apply(tokens, method="decode"), recon, atol=1e-3)
    mean, logvar = np.split(np.asarray(found, np.float64), 2, axis=-1)
    want = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).sum((1, 2)).mean()
    np.testing.assert_allclose(losses["kl"], VAE.kl * want, rtol=1e-4)


@pytest.fixture
def proxy(tmp_path):
    """A folder with the proxy, and its parameters."""
    params = random_params(PROXY, 0.3)
    describe(tmp_path / "proxy", "tokenizer", PROXY, Info(), {})
    save_params(tmp_path / "proxy" / "params", params)
    return str(tmp_path / "proxy"), params


def test_the_first_training_tells_the_codes_of_the_proxy_and_begins_with_its_decoder(proxy):
    folder, params = proxy
    part = ProxyCodes(tokenizer=folder)
    logits = np.random.default_rng(1).normal(size=(4, 2, 4, 8)).astype("f4")
    codes = call(PROXY, params)(FLOAT, method="encode")[..., 0].reshape(4, 2, 4)
    want = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(codes)[..., None], -1).mean()
    np.testing.assert_allclose(part({}, part.open(), FLOAT, logits), want, rtol=1e-5)
    stage = TokenizerStage(module=FIRST, parts=(("proxy", folder),))
    begun = load_start(stage, "tokenizer", param_shapes(FIRST))
    jax.tree.map(
        np.testing.assert_array_equal, begun["proxy"], {name: params[name] for name in ("codebook", "decoder")}
    )
    assert isinstance(begun["queries"], jax.ShapeDtypeStruct)
    with pytest.raises(ValueError, match=r"logits of 8 places and 7 codes, but .* has 8 tokens with codes \(8,\)"):
        part({}, params, FLOAT, logits[..., :7])
    with pytest.raises(ValueError, match=r"^tokenizer\.parts has 'pixels', which is no part of the network; it has \("):
        load_start(TokenizerStage(module=FIRST, parts=(("pixels", folder),)), "tokenizer", param_shapes(FIRST))
    with pytest.raises(ValueError, match=r"^tokenizer\.path takes a network as it is, tokenizer\.parts trains parts"):
        prepare(TokenizerStage(path=folder, parts=(("proxy", folder),)), "tokenizer", None, Info(), {})


def test_a_decoder_sees_the_rows_of_a_caption_that_are_not_masked():
    params, mask = random_params(AWARE, 0.3), np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 0]], bool)
    text = np.random.default_rng(1).normal(size=(4, 3, 5)).astype("f4")
    batch, decode = (
        {"text": text, "text_mask": mask, "label": np.zeros(4, int)},
        functools.partial(call(AWARE, params), method="decode"),
    )
    tokens = call(AWARE, params)(FLOAT, method="encode")
    shown, alone = decode(tokens, **said_of(AWARE, batch)), decode(tokens)
    np.testing.assert_allclose(
        shown, decode(tokens, batch=batch | {"text": np.where(mask[..., None], text, 9)}), atol=1e-5
    )
    apart = np.abs(np.asarray(shown - alone)).max((1, 2, 3))
    assert apart[[0, 1, 3]].min() > 1e-3
    assert apart[2] < 1e-5
    made, _, _ = training_pass(AWARE, params, FLOAT, None, frozenset({"image"}), batch=batch)
    np.testing.assert_allclose(made["image"], shown, atol=1e-4)
    recon, _ = reconstruct(AWARE, params, FLOAT, None, batch)
    np.testing.assert_allclose(recon, shown, atol=1e-4)
    assert said_of(VQ, batch) == said_of(AWARE, None) == {}
    with pytest.raises(
        ValueError, match=r"^TiTok decodes with text and text_mask of its images, but these come without text and"
    ):
        said_of(AWARE, {"label": mask})
    with pytest.raises(
        ValueError,
        match=r"^captions have features \[4, 3, 4\] and a mask \[4, 3\]; tokenizer\.text_rows and .* \[4, 3, 5\]",
    ):
        decode(tokens, batch=batch | {"text": text[..., :4]})


def test_images_are_drawn_with_the_captions_they_were_asked_for():
    generator = Causal(Transformer(1, 16, 2, hidden=24), Caption(16)).complete(
        AWARE.spec, Info(captions=True, text_rows=3, text_width=5)
    )
    batch = {"text": np.random.default_rng(1).normal(size=(2, 3, 5)).astype("f4"), "text_mask": np.ones((2, 3), bool)}
    params, own = random_params(AWARE, 0.3), random_params(generator, 0.3)
    order, keys = raster(AWARE.spec), jax.random.split(jax.random.key(0), 2)

    @functools.partial(jax.jit, static_argnames="decoded")
    def draw(own, params, batch, decoded=True):
        return Sampling().images(generator, AWARE, own, params, batch, order, keys=keys, decoded=decoded)[0]

    tokens = draw(own, params, batch, decoded=False)
    want = call(AWARE, params)(tokens, batch=batch, method="decode")
    np.testing.assert_allclose(draw(own, params, batch), want, atol=1e-5)
    assert np.abs(np.asarray(want - call(AWARE, params)(tokens, method="decode"))).max() > 1e-3

    def judge(_, images, batch):  # candidates are decoded with the caption of their image
        return images.mean((2, 3, 4))

    sampling = Sampling(decoder=BestOf(3, judge))
    best = jax.jit(
        lambda own, params: sampling.images(generator, AWARE, own, params, batch, order, keys=keys, extra={})[0]
    )(own, params)
    assert (best.mean((1, 2, 3)) >= want.mean((1, 2, 3)) - 1e-5).all()


def test_rare_codes_move_to_the_nearest_latent():
    codes, latents = np.float32([[0, 0], [5, 5]]), np.float32([[0, 1], [4, 4], [0, 2]])
    used, moved = anchored(np.float32([0.9, 0.0]), codes, latents, np.int32([0, 0, 0]))
    np.testing.assert_allclose(used, [0.99 * 0.9 + 0.01, 0], atol=1e-6)
    np.testing.assert_allclose(moved, [[0, 0], [4, 4]], atol=2e-3)


def test_the_two_trainings_move_what_they_say():
    shapes = param_shapes(FIRST)
    moved = {
        name: {part for part in shapes if is_trained(load_config(f"titok:{name}").tokenizer.optim, (part, "x"))}
        for name in ("l_32", "l_32_logits")
    }
    kept = {
        "encoder",
        "encoder_first",
        "encoder_positions",
        "queries",
        "query_positions",
        "patches",
        "to_code",
        "codebook",
    }
    assert moved == {"l_32": shapes.keys() - kept, "l_32_logits": shapes.keys() - {"proxy"}}
    no_decay = load_config("titok:l_32").tokenizer.optim.no_decay
    assert no_decay
    assert {*FIRST.no_decay} - {"text_positions"} < {*shapes}


def test_bad_input_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"^tokenizer\.size must be multiples of 4 pixels, got \(8, 18\)"):
        param_shapes(VAE.clone(size=(8, 18)))
    with pytest.raises(
        ValueError,
        match=r"^tokenizer\.proxy makes \(2, 4\) codes of .* but the decoder has \(2, 8\) patches of images of \(8, 16\)",
    ):
        param_shapes(FIRST.clone(drawn_cell=(4, 2)))
