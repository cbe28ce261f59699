"""LightGen: text asked between the decoder and the head."""

import functools
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
    weights_of,
    with_head,
)

from ar_jax.convert import lightgen
from ar_jax.convert.names import to_weights
from ar_jax.generators.lightgen import Aligned, Crossed, LightGen
from ar_jax.heads.diffusion import TRAINED, Diffusion
from ar_jax.nets.vit import ViT
from ar_jax.orders import Order, cosine_sizes, rooms, to_ranks, to_slots
from ar_jax.tokenizers.continuous import patchify, unpatchify
from ar_jax.tokens import TokenSpec, grid


class GivenDiffusion(Given, Diffusion):
    table: Any = None


def build(folder):
    """The generator, its parameters, and height and width of the latents."""
    h, width = folder.h, folder.h["width_model"]
    fixed(h, diffusion_steps=TRAINED)
    latents = tuple(h[side] // h["vae_stride"] for side in ("height", "width"))
    patch = h["patch_size"]

    def net(kind, name):
        return kind(h[f"{name}_depth"], width, h["heads"], hidden=int(h["mlp_ratio"] * width))

    generator = LightGen(
        net(ViT, "encoder"),
        net(ViT, "decoder"),
        Aligned(net(ViT, "text"), h["max_length"], h["text_dim"]),
        GivenDiffusion(
            h["diffloss_w"], h["diffloss_d"], multiplier=h["diffusion_batch_mul"], steps=h["num_sampling_steps"]
        ),
        cross=net(Crossed, "cross"),
        places=h["position_grid"],
    ).on(TokenSpec(grid(*(side // patch for side in latents)), channels=h["vae_embed_dim"] * patch**2))
    return generator, *loaded(generator, folder.weights, lightgen), latents


def whole(folder):
    h, io = folder.h, folder.io
    generator, params, _, latents = build(folder)
    outputs = sampled(folder, generator, params, latents)
    mask = np.asarray(io["mask"], bool)
    slot = np.argsort(mask, axis=1, kind="stable").astype(np.int32)  # the known ones first, in their order
    images, n = slot.shape
    order, known = Order(slot, (1,) * n), int(n - mask[0].sum())
    t = jnp.asarray(io["t"], jnp.int32).reshape(-1, images, n).swapaxes(0, 1)
    noise = jnp.asarray(io["noise"]).reshape(-1, images, n, generator.spec.channels).swapaxes(0, 1)

    @jax.jit
    def run(params, image, text, drop, t, noise):
        call, batch, no = functools.partial(generator.apply, {"params": params}), {"text": text}, jnp.zeros(images, bool)
        tokens = patchify(image, h["patch_size"])
        inside = to_ranks(tokens, order)[:, :known]

        def seen(self):
            cond = self.condition(batch, no)
            encoded = self.encode(inside, known, cond, order)
            return cond.rows, encoded, self.decode(encoded, known, known, order)

        def z_of(self, drop):
            return to_slots(self.hidden(inside, jnp.int32(known), self.condition(batch, drop), order), order)

        def objective(params):
            def run(self):
                z = z_of(self, no)
                return z, self.head.errors(z, tokens, t, noise)

            z, (square, bound) = generator.apply({"params": params}, method=run)
            return ((square + bound).mean(1) * mask).sum() / mask.sum(), z

        (loss, z), grads = jax.value_and_grad(objective, has_aux=True)(params)
        aligned, encoded, decoded = call(method=seen)
        return grads, {
            "tokens": tokens, "pos_encoder": call(method=lambda self: self.encoder_positions)[None], "encoder": encoded,
            "decoder": to_slots(decoded, order), "text_aligned": aligned, "z": z, "z_dropped": call(drop, method=z_of),
            "loss": loss[None],
        }  # fmt: skip

    grads, found = run(params, nhwc(io["latents"]), io["text"], jnp.asarray(io["drop"], bool), t, noise)
    grads = to_weights(grads, lightgen.rules(generator))
    return outputs | found | {f"loss.grad.{key}": value for key, value in grads.items()}


def sampled(folder, generator, params, latents):
    """Latents of all samplings, with noise given by place."""
    h, io, outputs = folder.h, folder.io, {}
    slot = np.asarray(io["orders"], np.int32)[:, ::-1]
    images, n = slot.shape
    sizes = cosine_sizes(n, h["num_iter"])
    order = Order(slot, sizes, rooms(sizes, 2))
    noise = jnp.concatenate([io["noise_init"][None], io["noise_steps"]])  # by head step, image and place
    given = with_head(generator, table=jnp.stack([noise[:, b, slot[b]].swapaxes(0, 1) for b in range(images)]))
    text = {"text": jnp.asarray(io["text"])}
    for name in folder.outputs("sample_"):
        rule = {"constant": "constant", "linear": "linear"}.get(name)
        weight = weights_of(rule, h["cfg"], order) if rule else np.ones(len(sizes), np.float32)
        knobs = constant_knobs(weight, h["temperature"])

        @jax.jit
        def run(params, knobs, rule=rule, name=name):
            cond = guided_rows(given, params, text, guided=bool(rule))
            if name == "null":
                call = functools.partial(given.apply, {"params": params}, method="condition")
                cond = call(text, jnp.ones(images, bool))
            return to_slots(from_noise(given, params, cond, order, knobs, images), order)

        tokens = run(params, knobs)
        outputs[f"sample_{name}"] = nchw(unpatchify(tokens, generator.spec.scales[0], h["patch_size"]))
    return outputs


CASES = {"lightgen": whole}
