"""FlowAR with both of its flow heads."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import (
    Given,
    by_way,
    constant_knobs,
    fixed,
    from_noise,
    guided_rows,
    loaded,
    nchw,
    nhwc,
    weights_of,
    with_head,
)  # fmt: skip

from ar_jax.convert import flowar
from ar_jax.convert.names import to_weights
from ar_jax.data import Info
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import NextLatent
from ar_jax.heads.integrate import annealed, integrate, schedule
from ar_jax.heads.joint_flow import JointFlow
from ar_jax.nets.attention import Rows, visible
from ar_jax.nets.conditioning import Label, widen
from ar_jax.nets.gated import EPS, EncoderDecoder
from ar_jax.nets.positions import stretched
from ar_jax.orders import scales
from ar_jax.tokenizers.latent_pyramid import LatentPyramid
from ar_jax.tokenizers.patches import Patches
from ar_jax.tokens import TokenSpec, pyramid


class GivenJoint(Given, JointFlow):
    table: Any = None


def backbone(h, **fields):
    """The two stacks of FlowAR and xAR, and what both say again."""
    fixed(h, rope_theta=10000, rms_eps=EPS, null_class=h["num_class_embeddings"] - 1, patch_size=1,
          decoder_embed_dim=h["encoder_embed_dim"])  # fmt: skip
    return EncoderDecoder(
        h["encoder_depth"], h["encoder_embed_dim"], h["encoder_num_heads"], h["decoder_depth"], h["decoder_num_heads"],
        hidden=int(2 * h["mlp_ratio"] * h["encoder_embed_dim"] / 3), **fields,
    )  # fmt: skip


def info(h):
    return Info(classes=h["num_class_embeddings"] - 1)


def batch_of(io):
    return {"label": jnp.asarray(io["labels"], jnp.int32)}


def named(case):
    """What the outputs of a sampling case begin with."""
    return next(name for name in case.outputs if name.endswith(".latents")).removesuffix(".latents")


def generator_case(folder):
    h = folder.h
    spec = TokenSpec(pyramid(tuple(h["scales"])), channels=h["vae_embed_dim"])
    head = GivenJoint(h["flow_width"], h["flow_depth"], heads=h["flow_heads"], cross=h["cross"], span=h["rope_grid"])
    net = backbone(h, span=h["rope_grid"], last_positions=True)
    generator = Causal(net, Label(net.width), head, NextLatent(h["vae_embed_dim"])).complete(spec, info(h))
    params, _ = loaded(generator, folder.weights, flowar)
    side = h["scales"][-1]
    fixed(h, buffer_size=0, img_size=side * h["vae_stride"])
    tokenizer = LatentPyramid(Patches((side, side), 1, channels=spec.channels), tuple(h["scales"]))
    outputs = trained(folder, generator, params, tokenizer)
    for case in folder.of("flowar.sample_tokens"):
        outputs |= sampled(folder, generator, params, tokenizer, named(case), case.arguments)
    return outputs


def trained(folder, generator, params, tokenizer):
    h, io = folder.h, folder.io
    spec, order, sizes = generator.spec, scales(generator.spec), generator.head.sizes
    part = np.array(h["scales"]) ** 2 / h["scales"][-1] ** 2
    drop = jnp.asarray(io["train.label_drop_uniform"] < h["label_drop_prob"])
    t, noise = jnp.asarray(io["train.t"]).T[:, None], jnp.asarray(io["train.noise"])[:, None]
    frozen, batch = functools.partial(tokenizer.apply, {}), batch_of(io)
    level = sizes.index(io["head.x"].shape[1])
    places = stretched(spec.coords[spec.coords[:, 0] == level], spec.scales, h["rope_grid"])

    @jax.jit
    def run(params, latents, t, noise, x, at, cond):
        call = functools.partial(generator.apply, {"params": params})
        tokens = frozen(latents, method="averages")

        def objective(params):
            def run(self):
                z = self.hidden(tokens, self.condition(batch, drop), order, frozen)
                return z, self.head.errors(z, tokens, t, noise)[:, 0]

            z, errors = generator.apply({"params": params}, method=run)
            by_scale = jnp.stack([x.mean() for x in jnp.split(errors, np.cumsum(sizes)[:-1], axis=1)])
            return (by_scale * part).sum(), (z, by_scale)

        def encoded(self):
            cond = self.condition(batch, drop)
            x, coords = self.inputs(tokens, cond, order, frozen, 0, order.n)
            net = self.backbone
            x = net.input_norm(x + net.tables[0])
            return net.encoder(x, Rows(order.step, stretched(coords, spec.scales, net.span)), mod=cond.mod)[0]

        def velocity(self):
            return self.head.net(x, at[:, None], cond, np.zeros(len(places), np.int32), places)

        (loss, (z, by_scale)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return grads, {
            "train.pyramid_tokens": tokens,
            "train.input_tokens": frozen(tokens, method="context")[:, sizes[0] :],
            "train.encoder_out": call(method=encoded),
            "train.z": z,
            "train.scale_losses": by_scale,
            "train.loss": loss,
            "head.velocity": call(method=velocity),
        }

    grads, outputs = run(params, nhwc(io["latents"]), t, noise, *(io[f"head.{name}"] for name in ("x", "t", "cond")))
    outputs["attention_mask_allowed"] = visible(order.step, order.step)[0]
    return outputs | {f"train.grad.{key}": value for key, value in to_weights(grads, flowar.rules(generator)).items()}


def sampled(folder, generator, params, tokenizer, name, given):
    io, spec, sizes, images = folder.io, generator.spec, generator.head.sizes, len(folder.io["labels"])
    steps, guided, order = len(sizes), given["cfg"] != 1, scales(spec)
    noise = [io[f"{name}.scale{k}.noise"] for k in range(steps)]
    upper, lower, latest = (given[key] for key in ("flow_upper_steps", "flow_lower_steps", "guidance_high"))
    table = np.concatenate([x[:images] for x in noise], axis=1)[:, :, None]
    generator = with_head(generator, anneal="linear", steps=upper, last_steps=lower, guided_until=latest)
    head, weight = generator.head, weights_of("ramp", given["cfg"] - 1, order)
    frozen = functools.partial(tokenizer.clone(via=given["upsample_grid"]).apply, {})
    times = [schedule(head.grid, "linear", upper, lower, steps, k) for k in range(steps)]
    ends = np.cumsum(sizes)
    spans = [slice(end - size, end) for end, size in zip(ends, sizes)]
    # the rows without condition run on their own until guidance begins, then beside the others
    alone = [int((t[:-1] > latest).sum()) if weight[k] > 1 else count for k, (t, count) in enumerate(times)]

    @jax.jit
    def run(params, table, noise):
        call, batch = functools.partial(generator.apply, {"params": params}), batch_of(io)
        cond = guided_rows(generator, params, batch, guided)
        given = with_head(generator, table=table)
        tokens = from_noise(given, params, cond, order, constant_knobs(weight), images, frozen)
        hidden = call(widen(tokens, 1 + guided), cond, order, frozen, method="hidden")

        def follow(k):
            """Where all rows end that run on their own."""
            h = jnp.concatenate([hidden[i::2, spans[k]] for i in range(2)])
            velocity = lambda self, h: integrate(self.head.field(h, k), noise[k], times[k][0], steps=alone[k])  # noqa: E731
            return jnp.split(call(h, method=velocity), 2)

        ends = []
        for k, span in enumerate(spans):
            sample = tokens[:, span]
            if guided:
                with_, without = follow(k)
                without = without + sample - with_ if alone[k] < times[k][1] else without
                sample = jnp.concatenate([sample, without])
            ends.append(sample)
        return hidden, ends, frozen(tokens, method="decode")

    hidden, samples, latents = run(params, table, noise)
    outputs = {
        f"{name}.steps_requested": annealed("linear", upper, lower, steps),
        f"{name}.cfg_per_scale": weight,
        f"{name}.latents": nchw(latents),
    }
    for k, (t, count) in enumerate(times):
        rows = np.asarray(hidden[:, spans[k]])
        outputs |= {
            f"{name}.scale{k}.z": by_way(rows) if guided else rows,
            f"{name}.scale{k}.t": t[:count],
            f"{name}.scale{k}.t_int": np.floor(t[:count] * np.float32(1000)),
            f"{name}.scale{k}.sample": samples[k],
        }
    return outputs


CASES = {"flowar": generator_case, "flowar_cross": generator_case}
