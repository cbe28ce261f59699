"""FlexTok: registers, codes, the flow that paints from a part of them, its guidance and its training."""

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import loaded, nchw, nhwc

from ar_jax.convert import flextok as source
from ar_jax.convert.names import to_weights
from ar_jax.nets.attention import visible
from ar_jax.nets.fixed_norm import FixedNorm
from ar_jax.tokenizers.continuous import patchify, unpatchify
from ar_jax.tokenizers.flextok import FlexTok
from ar_jax.tokenizers.patches import Patches
from ar_jax.tokenizers.quantize_scalar import FSQ, bounded
from ar_jax.tokens import sides


def flextok(folder):
    h, io, patch = folder.h, folder.io, folder.h["patch_size"]
    grid, channels = h["grid"], h["latent_channels"]
    size = tuple(side * patch for side in sides(grid if isinstance(grid, int) else tuple(grid)))
    assert folder.shape("latents")[1:] == (channels, *size)

    def tower(name, kinds):
        width = h[f"{name}_dim"]
        hidden = 2 * int(h["mlp_ratio"] * width) // 3
        return FixedNorm(
            h[f"{name}_depth"], width, width // h["head_dim"], hidden=hidden, kinds=kinds, eps=h["norm_eps"]
        )

    module = FlexTok(
        Patches(size, patch, channels=channels), h["num_registers"], tower("encoder", 0), tower("decoder", 2),
        FSQ(tuple(h["fsq_levels"])), dropped=h["null_drop_prob"],
    )  # fmt: skip
    params, call = loaded(module, folder.weights, source)
    names = source.rules(module)
    patches = lambda name: patchify(nhwc(io[name]), patch)  # noqa: E731
    images = lambda x: nchw(unpatchify(x, module.base.grid, patch))  # noqa: E731
    x, count = patches("latents"), jnp.asarray(io["keep_k"])
    sigma, noise = jnp.asarray(io["flow.sigma"]), patches("flow.noise")

    @jax.jit
    def encoded():
        latents = call(x, method="registered")
        codes, index, _ = call(latents, method="quantise")
        return latents, codes, index

    latents, codes, index = encoded()
    steps = module.steps_of_rows
    outputs = {
        "registers": latents,
        "encoder_attention_mask": visible(steps, steps)[0],
        "fsq_bounded": bounded(latents, tuple(h["fsq_levels"])),
        "quants": codes,
        "tokens": index[..., 0],
        "fsq.codes": call(jnp.asarray(io["fsq.indices"])[None, :, None], method="embed"),
    }
    noised = sigma[:, None, None] * noise + (1 - sigma[:, None, None]) * x
    outputs["flow.noised"] = images(noised)

    @jax.jit
    def velocity(nothing):
        nothing = jnp.full(len(x), nothing)
        return images(call(noised, sigma, codes, count, nothing, method="velocity"))

    outputs |= {"decoder.velocity": velocity(False), "decoder.velocity_null": velocity(True)}
    for case in folder.of("flextok.sample"):
        drawn = module.clone(
            steps=case.arguments["timesteps"], guidance=float(case.arguments["guidance_scale"]),
            normalised=case.arguments["perform_norm_guidance"],
        )  # fmt: skip
        paint = jax.jit(
            lambda start, drawn=drawn: drawn.apply({"params": params}, start, codes, count, method="denoised")
        )
        (name,) = case.outputs
        outputs[name] = images(paint(patches("sample.start")))

    @jax.jit
    def trained(params):
        def loss(params):
            def run(self):
                codes, _, _ = self.quantise(self.registered(x))
                time = jax.nn.sigmoid(jnp.asarray(io["train.time_normal"]))
                nothing = jnp.asarray(io["train.null_uniform"]) < self.dropped
                found, loss = self.flow(x, codes, time, patches("train.noise"), count, nothing)
                return loss, found

            return module.apply({"params": params}, method=run)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, found), grads = trained(params)
    named = to_weights(jax.tree.map(np.asarray, grads), names)
    return outputs | {
        "train.loss": loss,
        "train.velocity": images(found),
        **{f"train.grad.{name}": named[name] for name in folder.outputs("train.grad.")},
    }


CASES = {"flextok": flextok}
