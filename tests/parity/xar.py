"""xAR."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import Given, by_way, constant_knobs, fixed, from_noise, guided_rows, loaded, nchw, nhwc, weights_of
from parity.flowar import backbone, batch_of, info, named

from ar_jax.convert import xar
from ar_jax.convert.names import to_weights
from ar_jax.generators.block_flow import BlockFlow
from ar_jax.heads.flow import uniform
from ar_jax.heads.integrate import annealed, schedule
from ar_jax.nets.attention import Rows
from ar_jax.nets.conditioning import Label, widen
from ar_jax.orders import Cells, to_ranks, to_slots
from ar_jax.tokens import TokenSpec, grid


class GivenBlock(Given, BlockFlow):
    table: Any = None


def generator_case(folder):
    h, (*_, height, width) = folder.h, folder.shape("latents")
    spec = TokenSpec(grid(height, width), channels=h["vae_embed_dim"])
    net = backbone(h)
    fixed(h, img_size=height * h["vae_stride"], rope_grid=height)
    plain = BlockFlow(net, Label(net.width)).complete(spec, info(h))
    params, _ = loaded(plain, folder.weights, xar)
    generator = GivenBlock(net, Label(net.width)).complete(spec, info(h))
    order = Cells(round(h["tokens_per_cell"] ** 0.5))(spec)
    assert order.sizes == (h["tokens_per_cell"],) * h["cells"]
    grads, outputs = trained(folder, generator, params, order)
    outputs |= {f"train.grad.{key}": value for key, value in to_weights(grads, xar.rules(plain)).items()}
    for case in folder.of("xar.sample_tokens"):
        outputs |= sampled(folder, generator, params, order, named(case), case.arguments)
    return outputs


def trained(folder, generator, params, order):
    """Gradients, and what the training pass gives."""
    h, io, spec = folder.h, folder.io, generator.spec
    x0 = to_ranks(nhwc(io["latents"]).reshape(-1, spec.n, spec.channels), order)
    images, cells = len(x0), h["cells"]
    drop, batch = jnp.asarray(io["train.label_drop_uniform"] < h["label_drop_prob"]), batch_of(io)

    @jax.jit
    def run(params, x0, normal, noise):
        t = jax.nn.sigmoid(normal).reshape(cells, images).T
        at = jnp.repeat(t, h["tokens_per_cell"], axis=1)[..., None]
        noisy = (1 - at) * x0 + at * noise

        def objective(params):
            run = lambda self: self.errors(x0, self.condition(batch, drop), order, t, noise).mean()  # noqa: E731
            return generator.apply({"params": params}, method=run)

        def inside(self):
            cond = self.condition(batch, drop)
            vector = cond.mod.vector + self.time(jnp.floor(1000 * t))
            net, coords = self.backbone, jnp.asarray(spec.coords)[order.slot]
            x = net.input_norm(self.input(noisy) + net.tables[0][order.slot])
            mod = cond.mod.replace(vector=vector, sizes=order.sizes)
            return (
                vector,
                net.encoder(x, Rows(order.step, coords), mod=mod)[0],
                self.velocity(noisy, t, cond, order, 0)[0],
            )

        loss, grads = jax.value_and_grad(objective)(params)
        vector, encoded, velocity = generator.apply({"params": params}, method=inside)
        return grads, {
            "cells": x0,
            "train.t": t.T,
            "train.cond": jnp.swapaxes(vector, 0, 1),
            "train.encoder_out": encoded,
            "train.velocity": velocity,
            "train.loss": loss,
        }

    return run(params, x0, jnp.asarray(io["train.time_normal"]), jnp.asarray(io["train.noise"]).reshape(x0.shape))


def sampled(folder, generator, params, order, name, given):
    io, cells, spec, images = folder.io, len(order.sizes), generator.spec, len(folder.io["labels"])
    ends = ("flow_upper_steps", "flow_lower_steps") if "flow_upper_steps" in given else ("num_steps",) * 2
    upper, lower = (given[end] for end in ends)
    ode = given["sampler"] == "euler_ode"
    assert ode or given["sampler"] == "euler_maruyama_sde"
    spans = [slice(end - size, end) for end, size in zip(np.cumsum(order.sizes), order.sizes)]
    start = [io[f"{name}.cell{s}.init_noise"] for s in range(cells)]
    more = [np.zeros((0, *start[s].shape)) if ode else io[f"{name}.cell{s}.step_noise"] for s in range(cells)]
    table = np.zeros((images, spec.n, 2 + max(map(len, more)), spec.channels), np.float32)
    table[:, :, 0] = np.concatenate(start, axis=1)
    for span, noise in zip(spans, more):
        table[:, span, 1 : 1 + len(noise)] = np.moveaxis(noise, 0, 2)
    fields = {"solver": "euler", "grid": uniform} if ode else {}
    generator = generator.clone(anneal="linear", steps=upper, last_steps=lower, **fields)
    weight = weights_of("ramp", given["cfg"] - 1, order)

    @jax.jit
    def run(params, table, start):
        cond = guided_rows(generator, params, batch_of(io))
        tokens = from_noise(generator.clone(table=table), params, cond, order, constant_knobs(weight), images)

        def first(s):
            now = (jnp.arange(cells) == s)[None].astype(jnp.float32)
            x = jnp.where(jnp.asarray(order.step == s)[None, :, None], start, tokens)
            return generator.apply({"params": params}, widen(x, 2), now, cond, order, 0, method="velocity")[0]

        return tokens, jax.lax.map(first, jnp.arange(cells))

    tokens, first = run(params, table, np.concatenate(start, axis=1))
    outputs = {
        f"{name}.steps_per_cell": annealed("linear", upper, lower, cells),
        f"{name}.cfg_per_cell": weight,
        f"{name}.latents": nchw(to_slots(tokens, order).reshape(images, *spec.scales[0], -1)),
    }
    for s, span in enumerate(spans):
        times, count = schedule(generator.grid, "linear", upper, lower, cells, s)
        outputs |= {
            f"{name}.cell{s}.first_velocity": by_way(np.asarray(first[s])[:, span]),
            f"{name}.cell{s}.t": times[:count],
            f"{name}.cell{s}.t_int": np.floor(times[:count] * np.float32(1000)),
            f"{name}.cell{s}.sample": tokens[:, span],
        }
    return outputs


CASES = {"xar": generator_case}
