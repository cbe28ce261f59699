"""What the parity folders of FlowAR and xAR ask for, computed from the folders' hyperparameters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity_continuous import numbered, with_head, with_params
from parity_llamagen import nchw, nhwc

from ar_jax.convert import flowar, xar
from ar_jax.convert.names import to_weights
from ar_jax.data import Info
from ar_jax.decode.guidance import ramp
from ar_jax.decode.sequential import Knobs
from ar_jax.generators.block_flow import BlockFlow
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import NextLatent
from ar_jax.heads.flow import uniform
from ar_jax.heads.integrate import annealed, integrate, schedule
from ar_jax.heads.joint_flow import JointFlow
from ar_jax.nets.attention import visible
from ar_jax.nets.conditioning import Label, paired, widen
from ar_jax.nets.gated import EncoderDecoder
from ar_jax.nets.positions import stretched
from ar_jax.orders import Cells, scales, scan_steps, to_ranks, to_slots
from ar_jax.tokenizers.latent_pyramid import LatentPyramid
from ar_jax.tokenizers.patches import Patches
from ar_jax.tokens import TokenSpec, grid, pyramid


class Given:
    """Takes noise from a table [images ranks 1+steps c]; a key's two words are image and rank."""

    def noise(self, keys, s):
        image, rank = jnp.moveaxis(jax.random.key_data(keys), -1, 0)
        return jnp.asarray(self.table)[image, rank, s]


class GivenJoint(Given, JointFlow):
    table: Any = None


class GivenBlock(Given, BlockFlow):
    table: Any = None


def backbone(h, **fields):
    return EncoderDecoder(
        h["encoder_depth"], h["encoder_embed_dim"], h["encoder_num_heads"], h["decoder_depth"], h["decoder_num_heads"],
        **fields,
    )  # fmt: skip


def info(h):
    return Info(classes=h["num_class_embeddings"] - 1)


def conditions(call, labels, guided):
    batch, images = {"label": jnp.asarray(labels, jnp.int32)}, len(labels)
    cond, uncond = (call(batch, jnp.full(images, drop), method="condition") for drop in (False, True))
    return paired(cond, uncond) if guided else cond


def drawn(generator, params, order, cond, knobs, tokenizer=None):
    """The library's sampling loop with given noise, tokens in rank order."""
    images = len(generator_table(generator))
    call = functools.partial(generator.apply, {"params": params})

    @jax.jit
    def run(cond):
        def step(state, i, first, size):
            keys = numbered(images, first + jnp.arange(size))
            return call(
                state, i, first, size, cond=cond, order=order, knobs=knobs, keys=keys, tokenizer=tokenizer,
                method="step",
            )  # fmt: skip

        grow = lambda state, ranks: call(state, ranks, cond, method="grow")  # noqa: E731
        return scan_steps(order.sizes, step, call(cond, order, images, method="begin"), grow=grow).tokens

    return run(cond)


def generator_table(generator):
    return generator.head.table if isinstance(generator, Causal) else generator.table


def by_way(x, guided):
    """Rows of cond, then of uncond."""
    return np.concatenate([x[0::2], x[1::2]]) if guided else x


def flowar_generator(meta, weights, io):
    h = meta["hyperparameters"]
    spec = TokenSpec(pyramid(tuple(h["scales"])), channels=h["vae_embed_dim"])
    head = GivenJoint(
        h["flow_width"], h["flow_depth"], heads=h["flow_heads"], cross=h["cross"], span=h["rope_grid"]
    )  # fmt: skip
    net = backbone(h, span=h["rope_grid"], last_positions=True)
    generator = Causal(net, Label(net.width), head, NextLatent(h["vae_embed_dim"])).complete(spec, info(h))
    rules = flowar.rules(generator)
    params, call = with_params(generator, weights, rules)
    order, sizes = scales(spec), generator.head.sizes
    side = h["scales"][-1]
    tokenizer = LatentPyramid(Patches((side, side), 1, channels=spec.channels), tuple(h["scales"]))
    frozen = functools.partial(tokenizer.apply, {})
    latents = nhwc(io["latents"])
    tokens = frozen(latents, method="averages")
    part = np.array(h["scales"]) ** 2 / side**2

    drop = jnp.asarray(io["train.label_drop_uniform"] < h["label_drop_prob"])
    t, noise = jnp.asarray(io["train.t"]).T[:, None], jnp.asarray(io["train.noise"])[:, None]
    batch = {"label": jnp.asarray(io["labels"], jnp.int32)}

    def objective(params):
        def run(self):
            z = self.hidden(tokens, self.condition(batch, drop), order, frozen)
            return z, self.head.errors(z, tokens, t, noise)[:, 0]

        z, errors = generator.apply({"params": params}, method=run)
        by_scale = jnp.stack([x.mean() for x in jnp.split(errors, np.cumsum(sizes)[:-1], axis=1)])
        return (by_scale * part).sum(), (z, by_scale)

    (loss, (z, by_scale)), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)

    def encoded(self):
        cond = self.condition(batch, drop)
        x, coords = self.inputs(tokens, cond, order, frozen, 0, order.n)
        net = self.backbone
        x = net.input_norm(x + net.tables[0])
        return net.encoder(x, order.step, stretched(coords, spec.scales, net.span), mod=cond.mod)[0]

    level = int(np.flatnonzero(np.array(sizes) == io["head.x"].shape[1])[0])
    places = stretched(spec.coords[spec.coords[:, 0] == level], spec.scales, h["rope_grid"])
    velocity = generator.bind({"params": params}).head.net(
        jnp.asarray(io["head.x"]), jnp.asarray(io["head.t"])[:, None], jnp.asarray(io["head.cond"]),
        np.zeros(len(places), np.int32), places,
    )  # fmt: skip
    outputs = {
        "train.pyramid_tokens": tokens,
        "train.input_tokens": frozen(tokens, method="context")[:, sizes[0] :],
        "train.encoder_out": call(method=encoded),
        "train.z": z,
        "train.scale_losses": by_scale,
        "train.loss": loss,
        **{f"train.grad.{key}": value for key, value in to_weights(grads, rules).items()},
        "attention_mask_allowed": visible(order.step, order.step)[0],
        "head.velocity": velocity,
    }
    for case in meta["cases"]:
        if case["function"] == "flowar.sample_tokens":
            name = case["outputs"][0].rsplit(".", 2)[0]
            outputs |= flowar_sampled(generator, params, tokenizer, io, name, case["arguments"])
    return outputs


def flowar_sampled(generator, params, tokenizer, io, name, given):
    spec, sizes, images = generator.spec, generator.head.sizes, len(io["labels"])
    steps, guided, order = len(sizes), given["cfg"] != 1, scales(spec)
    noise = [io[f"{name}.scale{k}.noise"] for k in range(steps)]
    upper, lower, latest = (given[key] for key in ("flow_upper_steps", "flow_lower_steps", "guidance_high"))
    generator = with_head(
        generator, anneal="linear", steps=upper, last_steps=lower, guided_until=latest,
        table=np.concatenate([x[:images] for x in noise], axis=1)[:, :, None],
    )  # fmt: skip
    head, weight = generator.head, ramp(given["cfg"] - 1, steps)
    knobs = Knobs(weight, np.ones(steps, np.float32))
    call = functools.partial(generator.apply, {"params": params})
    frozen = functools.partial(tokenizer.clone(via=given["upsample_grid"]).apply, {})
    cond = conditions(call, io["labels"], guided)
    tokens = drawn(generator, params, order, cond, knobs, frozen)
    hidden = jax.jit(lambda tokens: call(widen(tokens, 1 + guided), cond, order, frozen, method="hidden"))(tokens)
    outputs = {
        f"{name}.steps_requested": annealed("linear", upper, lower, steps),
        f"{name}.cfg_per_scale": weight,
        f"{name}.latents": nchw(frozen(tokens, method="decode")),
    }
    at = np.cumsum(sizes)
    for k in range(steps):
        span = slice(at[k] - sizes[k], at[k])
        rows = by_way(hidden[:, span], guided)
        times, count = schedule(head.grid, "linear", upper, lower, steps, k)
        sample = np.asarray(tokens[:, span])
        if guided:  # the rows without condition run on their own until guidance begins, then beside the others
            alone = int((times[:-1] > latest).sum()) if weight[k] > 1 else count

            def follow(h, x, k=k, times=times, alone=alone):
                run = lambda self, h, x: integrate(self.head.field(h, k), x, times, steps=alone)  # noqa: E731
                return np.asarray(call(h, jnp.asarray(x), method=run))

            without = follow(rows[images:], noise[k][images:])
            if alone < count:
                without = without + sample - follow(rows[:images], noise[k][:images])
            sample = np.concatenate([sample, without])
        outputs |= {
            f"{name}.scale{k}.z": rows,
            f"{name}.scale{k}.t": times[:count],
            f"{name}.scale{k}.t_int": np.floor(times[:count] * np.float32(1000)),
            f"{name}.scale{k}.sample": sample,
        }
    return outputs


def xar_generator(meta, weights, io):
    h = meta["hyperparameters"]
    side = h["img_size"] // h["vae_stride"] // h["patch_size"]
    spec = TokenSpec(grid(side, side), channels=h["vae_embed_dim"])
    net = backbone(h)
    generator = GivenBlock(net, Label(net.width)).complete(spec, info(h))
    rules = xar.rules(BlockFlow(net, Label(net.width)).complete(spec, info(h)))
    params, call = with_params(generator, weights, rules)
    order = Cells(round(h["tokens_per_cell"] ** 0.5))(spec)
    assert order.sizes == (h["tokens_per_cell"],) * h["cells"]
    x0 = to_ranks(nhwc(io["latents"]).reshape(-1, spec.n, spec.channels), order)
    images, cells = len(x0), h["cells"]
    t = jax.nn.sigmoid(jnp.asarray(io["train.time_normal"])).reshape(cells, images).T
    noise = jnp.asarray(io["train.noise"]).reshape(x0.shape)
    drop = jnp.asarray(io["train.label_drop_uniform"] < h["label_drop_prob"])
    batch = {"label": jnp.asarray(io["labels"], jnp.int32)}
    at = jnp.repeat(t, h["tokens_per_cell"], axis=1)[..., None]
    noisy = (1 - at) * x0 + at * noise

    def objective(params):
        run = lambda self: self.errors(x0, self.condition(batch, drop), order, t, noise).mean()  # noqa: E731
        return generator.apply({"params": params}, method=run)

    loss, grads = jax.jit(jax.value_and_grad(objective))(params)
    cond = call(batch, drop, method="condition")

    def inside(self):
        vector = cond.mod.vector + self.time(jnp.floor(1000 * t))
        net, coords = self.backbone, jnp.asarray(spec.coords)[order.slot]
        x = net.input_norm(self.input(noisy) + net.tables[0][order.slot])
        return vector, net.encoder(x, order.step, coords, mod=cond.mod.replace(vector=vector, sizes=order.sizes))[0]

    vector, encoded = call(method=inside)
    outputs = {
        "cells": x0,
        "train.t": t.T,
        "train.cond": jnp.swapaxes(vector, 0, 1),
        "train.encoder_out": encoded,
        "train.velocity": call(noisy, t, cond, order, 0, method="velocity")[0],
        "train.loss": loss,
        **{f"train.grad.{key}": value for key, value in to_weights(grads, rules).items()},
    }
    for case in meta["cases"]:
        if case["function"] == "xar.sample_tokens":
            name = case["outputs"][0].rsplit(".", 2)[0]
            outputs |= xar_sampled(generator, params, order, io, name, case["arguments"])
    return outputs


def xar_sampled(generator, params, order, io, name, given):
    cells, spec, images = len(order.sizes), generator.spec, len(io["labels"])
    upper, lower = (
        (given[f"flow_{end}_steps"] for end in ("upper", "lower"))
        if "flow_upper_steps" in given
        else (given["num_steps"],) * 2
    )
    ode = given["sampler"] == "euler_ode"
    start = [io[f"{name}.cell{s}.init_noise"] for s in range(cells)]
    more = [io.get(f"{name}.cell{s}.step_noise") for s in range(cells)]
    longest = 0 if ode else max(map(len, more))
    table = np.zeros((images, spec.n, 2 + longest, spec.channels), np.float32)
    table[:, :, 0] = np.concatenate(start, axis=1)
    for s, (size, end) in enumerate(zip(order.sizes, np.cumsum(order.sizes))):
        if not ode:
            table[:, end - size : end, 1 : 1 + len(more[s])] = np.moveaxis(more[s], 0, 2)
    fields = {"solver": "euler", "grid": uniform} if ode else {}
    generator = generator.clone(table=table, anneal="linear", steps=upper, last_steps=lower, **fields)
    weight = ramp(given["cfg"] - 1, cells)
    call = functools.partial(generator.apply, {"params": params})
    cond = conditions(call, io["labels"], True)
    tokens = drawn(generator, params, order, cond, Knobs(weight, np.ones(cells, np.float32)))
    side = spec.scales[0]
    outputs = {
        f"{name}.steps_per_cell": annealed("linear", upper, lower, cells),
        f"{name}.cfg_per_cell": weight,
        f"{name}.latents": nchw(to_slots(tokens, order).reshape(images, *side, -1)),
    }
    velocity = jax.jit(lambda x, t: call(widen(x, 2), t, cond, order, 0, method="velocity")[0])
    for s, (size, end) in enumerate(zip(order.sizes, np.cumsum(order.sizes))):
        times, count = schedule(generator.grid, "linear", upper, lower, cells, s)
        now = (jnp.arange(cells) == s)[None].astype(jnp.float32)
        first = velocity(tokens.at[:, end - size : end].set(start[s]), now)
        outputs |= {
            f"{name}.cell{s}.first_velocity": by_way(first[:, end - size : end], True),
            f"{name}.cell{s}.t": times[:count],
            f"{name}.cell{s}.t_int": np.floor(times[:count] * np.float32(1000)),
            f"{name}.cell{s}.sample": tokens[:, end - size : end],
        }
    return outputs


CASES = {"flowar": flowar_generator, "flowar_cross": flowar_generator, "xar": xar_generator}
