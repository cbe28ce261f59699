"""The parity modules on folders of other sizes than the fixtures', against closed forms and second paths."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from parity import flowar, givt, mar, xar
from parity.common import Case, Noted, loaded, made
from scipy.special import logsumexp
from scipy.stats import norm

from ar_jax.convert import flowar as flowar_names
from ar_jax.convert.sources import export
from ar_jax.data import Info
from ar_jax.generators.block_flow import BlockFlow
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import NextLatent
from ar_jax.generators.masked import Masked
from ar_jax.heads.diffusion import Diffusion, cosine_betas
from ar_jax.heads.joint_flow import JointFlow
from ar_jax.nets.conditioning import Label
from ar_jax.nets.gated import EncoderDecoder
from ar_jax.nets.vit import ViT
from ar_jax.orders import cosine_sizes
from ar_jax.tokens import TokenSpec, grid, pyramid

NUMBERS = np.random.default_rng(0)


def random(*shape):
    return NUMBERS.normal(size=shape).astype(np.float32)


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


def gated(info, spec, make):
    """A generator of two gated stacks, the hyperparameters of its networks, and random weights under published names."""
    h = {
        "encoder_embed_dim": 24, "encoder_depth": 1, "encoder_num_heads": 3, "decoder_embed_dim": 24, "decoder_depth": 2,
        "decoder_num_heads": 2, "vae_stride": 4, "patch_size": 1, "vae_embed_dim": spec.channels, "mlp_ratio": 3,
        "label_drop_prob": 0.4, "num_class_embeddings": info.classes + 1, "null_class": info.classes, "rope_theta": 10000,
        "rms_eps": 1e-6, "batch": 2, "labels": [1, 0],
    }  # fmt: skip
    net = make(lambda **fields: EncoderDecoder(1, 24, 3, 2, 2, hidden=48, **fields)).complete(spec, info)
    keys = export(net, "generator").keys
    return net, h, {key: 0.2 * random(*shape) for key, shape in keys.items()}


def test_flowar_of_other_scales_follows_its_velocities():
    """Each scale by hand: Euler in two speeds, fewer steps from scale to scale, guided from the middle on."""
    sides, images, channels, scale, latest = (1, 2, 6), 2, 5, 1.9, 0.5
    spec = TokenSpec(pyramid(sides), channels=channels)
    net, h, weights = gated(
        Info(classes=3), spec, lambda stacks: Causal(
            stacks(span=6, last_positions=True), Label(24), JointFlow(16, 1, heads=2, cross=True, span=6), NextLatent(channels)
        )
    )  # fmt: skip
    h |= {"img_size": 24, "scales": sides, "rope_grid": 6, "buffer_size": 0, "cross": True}
    h |= {"flow_width": 16, "flow_depth": 1, "flow_heads": 2}
    io = {
        "latents": random(images, channels, 6, 6), "labels": np.array([1, 0]), "train.label_drop_uniform": np.array([0.1, 0.9]),
        "train.t": np.float32(NUMBERS.random((3, images))), "train.noise": random(images, 41, channels),
        "head.x": random(images, 4, channels), "head.t": np.float32([0.3, 0.8]), "head.cond": random(images, 4, 24),
    }  # fmt: skip
    noise = [io.setdefault(f"odd.scale{k}.noise", random(2 * images, side**2, channels)) for k, side in enumerate(sides)]
    given = {"cfg": scale, "flow_upper_steps": 5, "flow_lower_steps": 3, "guidance_high": latest, "upsample_grid": 12}
    case = Case(0, "flowar.sample_tokens", [], ["odd.latents"], Noted(given))
    folder = made("flowar", h, weights, io, (case,))
    out = flowar.generator_case(folder)
    assert not folder.unread()

    x = np.moveaxis(io["latents"], 1, -1)
    means = [x.reshape(images, s, 6 // s, s, 6 // s, channels).mean((2, 4)).reshape(images, -1, channels) for s in sides]
    np.testing.assert_allclose(out["train.pyramid_tokens"], np.concatenate(means, 1), atol=1e-5)
    loss = (np.array([1, 4, 36]) / 36 * out["train.scale_losses"]).sum()
    np.testing.assert_allclose(out["train.loss"], loss, rtol=1e-5)
    params, _ = loaded(net, folder.weights, flowar_names)
    times = [[1, 0.3, 0.25, 0.125, 0], [1, 0.3, 0.25, 0.125, 0], [1, 0.25, 0]]
    for k, (t, weight) in enumerate(zip(times, 1 + (scale - 1) * np.arange(3) / 2)):
        z = out[f"odd.scale{k}.z"]
        velocity = jax.jit(
            lambda x, t, z=z, k=k: net.apply({"params": params}, method=lambda self: self.head.field(jnp.asarray(z), k)(x, t))
        )
        np.testing.assert_allclose(out[f"odd.scale{k}.t"], t[:-1], rtol=1e-6)
        x = noise[k]
        for now, then in itertools.pairwise(t):
            together = weight > 1 and now <= latest
            v = velocity(np.tile(x[:images], (2, 1, 1)) if together else x, np.float32(now))
            if together:
                with_, without = np.split(v, 2)
                v = np.tile(without + weight * (with_ - without), (2, 1, 1))
            x = x + (then - now) * v
        np.testing.assert_allclose(out[f"odd.scale{k}.sample"], x, rtol=1e-3, atol=1e-3)
    latents = np.moveaxis(out["odd.scale2.sample"][:images].reshape(images, 6, 6, channels), -1, 1)
    np.testing.assert_allclose(out["odd.latents"], latents, atol=1e-5)


def test_xar_of_oblong_grids_takes_one_step_by_its_first_velocity():
    images, channels, cells, scale = 2, 5, 6, 1.9
    spec = TokenSpec(grid(4, 6), channels=channels)
    _, h, weights = gated(Info(classes=3), spec, lambda stacks: BlockFlow(stacks(), Label(24)))
    h |= {"img_size": 16, "rope_grid": 4, "cells": cells, "tokens_per_cell": 4}
    latents, noise = random(images, channels, 4, 6), random(images, cells, 4, channels)
    io = {
        "latents": latents, "labels": np.array([1, 0]), "train.label_drop_uniform": np.array([0.1, 0.9]),
        "train.time_normal": random(cells * images), "train.noise": noise,
    }  # fmt: skip
    start = [io.setdefault(f"odd.cell{s}.init_noise", random(images, 4, channels)) for s in range(cells)]
    given = {"cfg": scale, "sampler": "euler_ode", "num_steps": 1}
    case = Case(0, "xar.sample_tokens", [], ["odd.latents"], Noted(given))
    folder = made("xar", h, weights, io, (case,), latents=latents.shape)
    out = xar.generator_case(folder)
    assert not folder.unread()
    x = latents.reshape(images, channels, 2, 2, 3, 2).transpose(0, 2, 4, 3, 5, 1).reshape(images, -1, channels)
    np.testing.assert_array_equal(np.reshape(out["cells"], x.shape), x)
    error = noise.reshape(x.shape) - x - np.reshape(out["train.velocity"], x.shape)
    np.testing.assert_allclose(out["train.loss"], (error**2).mean(), rtol=1e-5)
    for s, weight in enumerate(1 + (scale - 1) * np.arange(cells) / (cells - 1)):
        with_, without = np.split(out[f"odd.cell{s}.first_velocity"], 2)
        want = start[s] - (without + weight * (with_ - without))
        np.testing.assert_allclose(out[f"odd.cell{s}.sample"], want, rtol=1e-4, atol=1e-4)
