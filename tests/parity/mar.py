"""MAR, and its sampling with annealed steps (DiSA)."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import (
    Given,
    constant_knobs,
    fixed,
    from_noise,
    guided_rows,
    loaded,
    nchw,
    nhwc,
    numbered,
    weights_of,
    with_head,
)  # fmt: skip

from ar_jax.convert import mar
from ar_jax.convert.names import to_weights
from ar_jax.data import Info
from ar_jax.generators.masked import Masked
from ar_jax.heads.diffusion import TRAINED, Chain, Diffusion, cosine_betas, kept_steps
from ar_jax.heads.integrate import annealed
from ar_jax.nets.conditioning import Label, fold
from ar_jax.nets.mlp import sinusoids
from ar_jax.nets.vit import ViT
from ar_jax.orders import Order, cosine_sizes, rooms, to_ranks, to_slots
from ar_jax.tokenizers.continuous import patchify, unpatchify
from ar_jax.tokens import TokenSpec, grid


class GivenDiffusion(Given, Diffusion):
    table: Any = None


def build(folder, latents, **head):
    """The generator for latents of the given array's shape, and its parameters."""
    h, (*_, height, width) = folder.h, folder.shape(latents)
    patch, ratio = h["patch_size"], h["mlp_ratio"]

    def net(name):
        width = h[f"{name}_embed_dim"]
        return ViT(h[f"{name}_depth"], width, h[f"{name}_num_heads"], hidden=int(ratio * width))

    fixed(h, img_size=height * h["vae_stride"], norm_eps=1e-6, attn_dropout=0.0, proj_dropout=0.0,
          diffusion_steps=TRAINED, noise_schedule="cosine")  # fmt: skip
    generator = Masked(
        net("encoder"),
        net("decoder"),
        Label(h["encoder_embed_dim"], apart=True),
        GivenDiffusion(h["diffloss_w"], h["diffloss_d"], multiplier=h.get("diffusion_batch_mul", 4), **head),
        buffer=h["buffer_size"],
    ).complete(
        TokenSpec(grid(height // patch, width // patch), channels=h["vae_embed_dim"] * patch**2),
        Info(classes=h["class_num"]),
    )
    return generator, *loaded(generator, folder.weights, mar)


def sampled(folder, generator, params, name, labels, arguments):
    """What MAR's sampler gives for the given orders and noise; runs the library's steps in few padded scans."""
    io, steps = folder.io, arguments["num_iter"]
    n, channels, images = generator.spec.n, generator.spec.channels, len(labels)
    sizes = cosine_sizes(n, steps)
    slot = np.asarray(io[f"{name}.orders"], np.int32)[:, ::-1]
    order = Order(slot, sizes, rooms(sizes, 2))
    first = np.cumsum(sizes) - sizes
    rows = [np.argsort(slot[:, f : f + size], axis=1) for f, size in zip(first, sizes)]  # by place in the image
    longest = max(len(io[f"{name}.iter{i}.step_noise"]) for i in range(steps))
    table = np.zeros((images, n, 1 + longest, channels), np.float32)
    for i, (f, size) in enumerate(zip(first, sizes)):
        start, more = io[f"{name}.iter{i}.init_noise"], io[f"{name}.iter{i}.step_noise"]
        noise = np.concatenate([start[None], more[:, : len(start)]]).reshape(1 + len(more), images, size, channels)
        for b in range(images):
            table[b, f + rows[i][b], : 1 + len(more)] = noise[:, b].swapaxes(0, 1)
    scale = arguments["cfg"]
    weight = weights_of(arguments["cfg_schedule"], scale, order)
    knobs, batch = constant_knobs(weight, arguments["temperature"]), {"label": jnp.asarray(labels, jnp.int32)}

    @jax.jit
    def run(params, table):
        cond = guided_rows(generator, params, batch, guided=scale != 1)
        tokens = from_noise(with_head(generator, table=table), params, cond, order, knobs, images)

        def look(_, known):
            hidden = generator.apply({"params": params}, tokens, known, cond, order, method="hidden")
            return None, hidden

        return tokens, jax.lax.scan(look, None, jnp.asarray(first, jnp.int32))[1]

    tokens, hidden = run(params, table)
    place, patch = np.argsort(slot, axis=1), folder.h["patch_size"]
    outputs = {
        f"{name}.cfg_per_iter": weight,
        f"{name}.mask_per_iter": np.stack([place >= f for f in first]),
        f"{name}.latents": nchw(unpatchify(to_slots(tokens, order), generator.spec.scales[0], patch)),
    }
    for i, (f, size) in enumerate(zip(first, sizes)):
        z = np.asarray(hidden[i])[:, f : f + size]
        ways = [np.take_along_axis(z[w :: len(z) // images], rows[i][..., None], 1) for w in range(len(z) // images)]
        outputs[f"{name}.iter{i}.z"] = np.concatenate([way.reshape(images * size, -1) for way in ways])
    return outputs


def named(case):
    """What the outputs of a sampling case begin with."""
    return next(name for name in case.outputs if name.endswith(".latents")).removesuffix(".latents")


def generator_case(folder):
    h, io = folder.h, folder.io
    generator, params, _ = build(folder, "latents", steps=h["num_sampling_steps"])
    outputs = {}
    for case in folder.of("mar.sample_tokens"):
        outputs |= sampled(folder, generator, params, named(case), io["sample.labels"], case.arguments)
    return outputs | trained(folder, generator, params) | denoised(folder, generator, params) | tables(folder)


def trained(folder, generator, params):
    """Tokens, the network with and without a backward pass."""
    h, io = folder.h, folder.io
    slot = np.asarray(io["orders"], np.int32)[:, ::-1]
    images, n = slot.shape
    order, mask = Order(slot, (1,) * n), np.asarray(io["mask"], bool)
    known, buffer = int(n - mask[0].sum()), h["buffer_size"]
    by_place = np.argsort(slot[:, :known], axis=1)[..., None]
    batch = {"label": jnp.asarray(io["labels"], jnp.int32)}
    drop = jnp.asarray(io["train.label_drop_uniform"] < h["label_drop_prob"])
    t = jnp.asarray(io["train.t"], jnp.int32).reshape(-1, images, n).swapaxes(0, 1)
    noise = jnp.asarray(io["train.noise"]).reshape(-1, images, n, generator.spec.channels).swapaxes(0, 1)

    @jax.jit
    def run(params, latents, t, noise):
        tokens = patchify(latents, h["patch_size"])
        inside = to_ranks(tokens, order)[:, :known]
        call = functools.partial(generator.apply, {"params": params})

        def z_of(self, drop):
            return to_slots(self.hidden(inside, jnp.int32(known), self.condition(batch, drop), order), order)

        def objective(params):
            def run(self):
                z = z_of(self, drop)
                return z, self.head.errors(z, tokens, t, noise)

            z, (square, bound) = generator.apply({"params": params}, method=run)
            loss = ((square + bound).mean(1) * mask).sum() / mask.sum()
            return loss, (z, square, bound)

        cond = call(batch, jnp.zeros(images, bool), method="condition")
        encoded = call(inside, known, cond, order, method="encode")
        kept = jnp.concatenate([encoded[:, :buffer], jnp.take_along_axis(encoded[:, buffer:], by_place, axis=1)], 1)
        (loss, (z, square, bound)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return grads, {
            "tokens": tokens,
            "encoder_out": kept,
            "z": call(jnp.zeros(images, bool), method=z_of),
            "train.z": z,
            "train.mse_rows": square.swapaxes(0, 1),
            "train.vb_rows": bound.swapaxes(0, 1),
            "train.loss": loss,
        }

    grads, outputs = run(params, nhwc(io["latents"]), t, noise)
    grads = to_weights(grads, mar.rules(generator))
    return outputs | {f"train.grad.{key}": value for key, value in grads.items()}


def denoised(folder, generator, params):
    """The head alone: its network, one step, a whole chain."""
    io, (of_net, of_step, of_loop) = folder.io, (
        folder.of(f"diff{name}")[0].arguments for name in ("loss.net_cfg", "usion.p_sample", "loss.sample")
    )  # fmt: skip
    levels, index = kept_steps(of_step["respacing"]), np.asarray(io["step.t_index"])
    temperature = of_step["temperature"] * (index > 0)[:, None]
    noise = np.concatenate([io["loop.init_noise"][None], io["loop.step_noise"]]).swapaxes(0, 1)[:, None]
    looping = with_head(generator, steps=of_loop["respacing"], table=noise)
    fixed(of_loop, cfg=1.0)
    knobs = constant_knobs([of_loop["cfg"]], of_loop["temperature"])

    @jax.jit
    def run(params, x, t, c, x_t, c_t, step_noise, z):
        def net(x, t, c):
            time = jnp.asarray(t, jnp.float32)
            return generator.apply({"params": params}, method=lambda self: self.head.net(x, time, c))

        half, channels = len(x) // 2, x.shape[-1]
        both = net(jnp.concatenate([x[:half]] * 2), t, c)
        neighbours = jnp.stack([both[:half], both[half:]], 1).reshape(2 * half, -1)
        guided = jnp.concatenate([fold(neighbours[:, :channels], 2, of_net["cfg_scale"])] * 2)
        chain = Chain.of(levels).at(index[:, None])
        eps, variance = jnp.split(net(x_t, levels[index], c_t), 2, axis=-1)
        clean = chain.clean(x_t, eps)
        mean, log_variance = chain.mean(x_t, clean), chain.log_variance(variance)
        looped = looping.apply(
            {"params": params}, method=lambda self: self.head.sample(z[:, None], numbered(len(z), [0]), knobs, 0)
        )
        return {
            "head.timestep_embedding": sinusoids(t.astype(jnp.float32)),
            "head.out": net(x, t, c),
            "head.out_cfg": jnp.concatenate([guided, both[:, channels:]], axis=1),
            "step.mean": mean,
            "step.log_variance": log_variance,
            "step.pred_xstart": clean,
            "step.sample": mean + temperature * jnp.exp(0.5 * log_variance) * step_noise,
            "loop.out": looped,
        }

    names = *(f"head.{name}" for name in "xtc"), "step.x", "step.c", "step.noise", "loop.z"
    return run(params, *(io[name] for name in names))


def tables(folder):
    everything = Chain.of(np.arange(TRAINED))
    spacings = [name.removesuffix("]") for name in folder.outputs("sched.timesteps[")]
    return {
        "sched.betas": cosine_betas(),
        "sched.alphas_cumprod": everything.kept,
        "sched.posterior_log_variance_clipped": everything.log_posterior,
        "sched.spaced_betas": np.exp(Chain.of(kept_steps(folder.h["plain_respacing"])).log_beta),
        **{f"sched.timesteps[{spacing}]": kept_steps(spacing) for spacing in spacings},
    }


def disa(folder):
    h = folder.h
    outputs = disa_tables(folder)
    latest = {"DiSA": h["clip_timesteps"], "DDIM": h["clip_timesteps_ddim"]}
    for case in folder.of("disa_mar.sample_tokens"):
        given, name = case.arguments, named(case)
        rule, upper = given["diff_annealing_strategy"].replace("-", "_"), given["diff_upper_steps"]
        lower, sampler = given["diff_lower_steps"], given["diff_sampler"]
        head = {"anneal": rule, "last_steps": lower, "latest": latest[sampler]}
        if rule == "constant":  # theirs takes the smaller number
            upper = lower
        ddim = {"steps": f"ddim{upper}", "sampler": "ddim"} if sampler == "DDIM" else {"steps": str(upper)}
        generator, params, _ = build(folder, f"{name}.latents", **head, **ddim)
        outputs |= sampled(folder, generator, params, name, folder.io["labels"], given)
        _, which, lengths = generator.head.chains(given["num_iter"])
        outputs[f"{name}.diffusion_steps_per_iter"] = lengths[which]
    return outputs


def disa_tables(folder):
    """Tables whose names say what they are of."""
    clip, clip_ddim, outputs = folder.h["clip_timesteps"], folder.h["clip_timesteps_ddim"], {}
    for name in folder.outputs("table."):
        if match := re.fullmatch(r"actual_steps_for_request_(\d+)_to_(\d+)", name):
            lower, upper = map(int, match.groups())
            outputs[f"table.{name}"] = [len(kept_steps(str(n), clip)) for n in range(lower, upper + 1)]
        elif match := re.fullmatch(r"(timesteps|betas)_((ddim)?\d+)", name):
            kept = kept_steps(match[2], clip_ddim if match[3] else clip)
            outputs[f"table.{name}"] = kept if match[1] == "timesteps" else np.exp(Chain.of(kept).log_beta)
        elif match := re.fullmatch(r"(.*)\.requested_steps", name):
            meaning = folder.arrays[f"table.{name}"]["meaning"]
            upper, lower, steps = map(int, re.search(r"upper (\d+), lower (\d+), (\d+) iterations", meaning).groups())
            rule = match[1].replace("-", "_")
            upper = lower if rule == "constant" else upper  # theirs takes the smaller number
            outputs[f"table.{name}"] = annealed(rule, upper, lower, steps)
    return outputs


CASES = {"mar": generator_case, "disa_mar": disa}
