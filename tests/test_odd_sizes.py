"""The parity modules on folders of other sizes than the fixtures', against closed forms and second paths."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from parity import givt, mar
from parity.common import Case, Folder, Noted
from scipy.special import logsumexp
from scipy.stats import norm

from ar_jax.convert.sources import export
from ar_jax.data import Info
from ar_jax.generators.masked import Masked
from ar_jax.heads.diffusion import Diffusion, cosine_betas
from ar_jax.nets.conditioning import Label
from ar_jax.nets.vit import ViT
from ar_jax.orders import cosine_sizes
from ar_jax.tokens import TokenSpec, grid

NUMBERS = np.random.default_rng(0)


def random(*shape):
    return NUMBERS.normal(size=shape).astype(np.float32)


def made(name, h, weights, io, cases=(), **shapes):
    """A folder that lies nowhere."""
    folder = object.__new__(Folder)
    folder.path, folder.h, folder.io, folder.cases = pathlib.Path(name), Noted(h), Noted(io), cases
    folder.files, folder.arrays = {"weights.safetensors": Noted(weights)}, {k: {"shape": v} for k, v in shapes.items()}
    return folder


def test_mar_of_pairs_of_widths_and_oblong_grids_of_patches():
    """Rows of the network, denoised by hand, are the tokens that the sampler drew: 2x3 patches of 2x2 latents."""
    h = {
        "vae_stride": 4, "patch_size": 2, "vae_embed_dim": 3, "encoder_embed_dim": 24, "encoder_depth": 1,
        "encoder_num_heads": 2, "decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 4, "mlp_ratio": 3,
        "class_num": 5, "buffer_size": 3, "diffloss_d": 1, "diffloss_w": 16, "img_size": 16,
    }  # fmt: skip
    images, n, channels, scale, temperature = 2, 6, 12, 1.7, 0.9
    net = Masked(ViT(1, 24, 2, hidden=72), ViT(2, 16, 4, hidden=48), Label(24, apart=True), Diffusion(16, 1), buffer=3)
    keys = export(net.complete(TokenSpec(grid(2, 3), channels=channels), Info(classes=5)), "generator").keys
    sizes, io = cosine_sizes(n, 3), {"odd.orders": NUMBERS.permuted(np.tile(np.arange(n), (images, 1)), axis=1)}
    for i, size in enumerate(sizes):
        io[f"odd.iter{i}.init_noise"] = random(images * size, channels)
        io[f"odd.iter{i}.step_noise"] = np.tile(random(3, images * size, channels), (1, 2, 1))
    weights = {key: 0.3 * random(*shape) for key, shape in keys.items()}
    folder = made("mar", h, weights, io, **{"odd.latents": (images, 3, 4, 6)})
    given = Noted({"num_iter": 3, "cfg": scale, "cfg_schedule": "linear", "temperature": temperature})
    generator, params, _ = mar.build(folder, "odd.latents", steps="3,0")
    out = mar.sampled(folder, generator, params, "odd", np.array([1, 4]), given)
    assert not [*folder.unread(), *given.unread()]

    x = np.asarray(out["odd.latents"]).reshape(images, 3, 2, 2, 3, 2)  # image, channel, row, y, column, x
    tokens = x.transpose(0, 2, 4, 1, 3, 5).reshape(images, n, channels)
    head = jax.jit(lambda x, t, z: generator.apply({"params": params}, method=lambda self: self.head.net(x, t, z)))
    levels, first = np.array([0, 250, 499]), np.cumsum(sizes) - sizes
    kept = np.cumprod(1 - cosine_betas())[levels]
    after = np.append(1.0, kept[:-1])
    beta = 1 - kept / after
    posterior = beta * (1 - after) / (1 - kept)
    posterior[0] = posterior[1]
    for i, (start, size) in enumerate(zip(first, sizes)):
        slots = np.sort(io["odd.orders"][:, ::-1][:, start : start + size], axis=1)
        x, weight = io[f"odd.iter{i}.init_noise"], 1 + (scale - 1) * min(start + size, n - 1) / n
        np.testing.assert_allclose(out["odd.cfg_per_iter"][i], weight, rtol=1e-6)
        for s, k in enumerate(reversed(range(3))):
            result = head(np.concatenate([x, x]), jnp.full(2 * len(x), float(levels[k])), out[f"odd.iter{i}.z"])
            with_, without = np.split(np.asarray(result, np.float64), 2)
            noise = without[:, :channels] + weight * (with_ - without)[:, :channels]
            part = (with_[:, channels:] + 1) / 2
            log_variance = part * np.log(beta[k]) + (1 - part) * np.log(posterior[k])
            clean = x / np.sqrt(kept[k]) - np.sqrt(1 / kept[k] - 1) * noise
            mean = (beta[k] * np.sqrt(after[k]) * clean + (1 - after[k]) * np.sqrt(1 - beta[k]) * x) / (1 - kept[k])
            more = temperature * np.exp(log_variance / 2) * io[f"odd.iter{i}.step_noise"][s, : len(x)]
            x = np.float32(mean + (k > 0) * more)
        want = np.take_along_axis(tokens, slots[..., None], axis=1).reshape(-1, channels)
        np.testing.assert_allclose(x, want, rtol=2e-3, atol=2e-3)


def givt_folder(name, rows, cases=(), **inputs):
    """Seven tokens of three numbers."""
    n, width, heads, hidden, layers, labels, mixtures, channels = 7, 24, 3, 20, 2, 5, 2, 3
    h = {
        "num_heads": heads, "num_decoder_layers": layers, "mlp_dim": hidden, "emb_dim": width, "num_labels": labels,
        "seq_len": n, "num_mixtures": mixtures, "out_dim": channels, "min_masking_rate_training": 0.2,
    }  # fmt: skip
    block = "decoder/EncDecBlock/"
    shapes = {
        "EmbedLabels/embedding": (labels + 1 + (3 if rows > n else 0), width),
        "EmbedTargets/kernel": (channels, width),
        "EmbedTargets/bias": (width,),
        "decoder/pos_emb": (1, rows, width),
        **{f"{block}LayerNorm{i}/scale": (width, layers) for i in (1, 3)},
        **{
            f"{block}SelfAttn/{part}/kernel": (width, layers, heads, width // heads)
            for part in ("query", "key", "value")
        },
        f"{block}SelfAttn/out/kernel": (heads, layers, width // heads, width),
        f"{block}MLP/Dense_0/kernel": (width, layers, hidden),
        f"{block}MLP/Dense_0/bias": (hidden, layers),
        f"{block}MLP/Dense_1/kernel": (hidden, layers, width),
        f"{block}MLP/Dense_1/bias": (width, layers),
        "decoder/LayerNorm/scale": (width,),
        "decoder/LayerNorm/bias": (width,),
        "decoder/LogitsDense/kernel": (width, mixtures * (1 + 2 * channels)),
        "decoder/LogitsDense/bias": (mixtures * (1 + 2 * channels),),
    }
    weights = {key: 0.4 * random(*shape) for key, shape in shapes.items()}
    io = {"sequence": random(2, n, channels), "labels": np.array([4, 0]), "drop_labels": np.array([0, 0])}
    return made(name, h, weights, io | inputs, cases)


def log_density(raw, x, mixtures=2):
    """Of GIVT's mixtures, from raw outputs."""
    part, rest = np.split(np.asarray(raw, np.float64), [mixtures], axis=-1)
    mean, spread = np.moveaxis(rest.reshape(*part.shape, 2, -1), -2, 0)
    each = norm.logpdf(x[..., None, :], mean, (spread + np.sqrt(spread**2 + 4)) / 2).sum(-1)
    return logsumexp(part - logsumexp(part, axis=-1, keepdims=True) + each, axis=-1)


def test_givt_of_seven_tokens_step_by_step_and_by_its_density():
    folder = givt_folder("givt_ar", 7)
    out = givt.causal(folder)
    np.testing.assert_allclose(out["cached_logits"], out["logits"], atol=1e-4)
    density = log_density(out["logits"], folder.io["sequence"])
    np.testing.assert_allclose(out["log_prob"], density, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(out["loss"], -density.mean(), rtol=1e-4)
    assert not folder.unread()


def test_masked_givt_of_seven_tokens_keeps_as_many_as_it_is_told():
    hidden = np.array([[1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0, 0]])
    probs, gumbel = NUMBERS.random((2, 7)).astype(np.float32), random(2, 7)
    select = Case(0, "givt_masked.select", [], ["select.mask"], Noted({"mask_len": 5, "temperature": 0.5}))
    inputs = {
        "input_mask": hidden,
        "select.probs": probs,
        "select.gumbel": gumbel,
        "schedule.ratio": np.float32([0, 1]),
    }
    folder = givt_folder("givt_masked", 8, (select,), **inputs)
    out = givt.masked(folder)
    density = log_density(out["logits"], folder.io["sequence"])
    np.testing.assert_allclose(out["loss"], -(density * hidden).sum() / hidden.sum(), rtol=1e-4)
    lowest = np.argsort(np.log(probs) + 0.5 * gumbel, axis=1)[:, :5]
    np.testing.assert_array_equal(np.sort(np.nonzero(out["select.mask"])[1].reshape(2, 5)), np.sort(lowest))
    assert not folder.unread()
