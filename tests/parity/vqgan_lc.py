"""VQGAN-LC: the tokenizer with frozen features as codebook."""

import jax
import jax.numpy as jnp
from parity.common import fixed, loaded, nchw, nhwc

from ar_jax.convert import vqgan_lc as source
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokenizers.vqgan_lc import VQGANLC


def vq(folder):
    h, io = folder.h, folder.io
    levels, weight = len(h["ch_mult"]), h["quant_weight"]
    sides = [h["resolution"] // 2**level for level in range(levels)]
    tokenizer = VQGANLC(
        size=folder.shape("image")[2:], features=h["base_channels"], mult=tuple(h["ch_mult"]),
        res_blocks=h["num_res_blocks"], latent=h["z_channels"], codes=h["codebook_size"], code_features=h["embed_dim"],
        groups=h["norm_num_groups"], feature_width=h["codebook_dim"],
        attention=tuple(level for level, side in enumerate(sides) if side in h["attn_resolutions"]),
        vq=VectorLoss(codebook=weight * h["codebook_term_weight"], commit=weight),
    )  # fmt: skip
    fixed(h, downsample=tokenizer.downsample, norm_eps=1e-6)
    params, _ = loaded(tokenizer, folder.weights, source)

    def objective(params, image):
        recon, losses, _ = tokenizer.apply({"params": params}, image, method="autoencode")
        distance, quant = jnp.abs(image - recon).mean(), sum(losses.values())
        return distance + quant, (recon, distance, quant / weight)

    def quantiser(params, z):
        _, _, losses = tokenizer.apply({"params": params}, z, method="quantise")
        return sum(losses.values()) / weight

    @jax.jit
    def run(params, image, z, tokens):
        call = lambda *args, method: tokenizer.apply({"params": params}, *args, method=method)  # noqa: E731
        latents = call(image, method="latents")
        index = call(image, method="encode")
        (loss, (recon, distance, quant)), grads = jax.value_and_grad(objective, has_aux=True)(params, image)
        own, (own_grads, grad_z) = jax.value_and_grad(quantiser, argnums=(0, 1))(params, z)

        def maps(tokens):
            return nchw(call(tokens, method="embed").reshape(len(tokens), *tokenizer.grid, -1))

        return {
            "latent": nchw(latents),
            "quantized": maps(index),
            "indices": index,
            "projected_codebook": call(jnp.arange(tokenizer.codes)[None, :, None], method="embed"),
            "recon": nchw(recon),
            "rec_loss": distance,
            "quant_loss_image": quant,
            "train_loss": loss,
            "train_loss.grad.codebook_projection.weight": grads["projector"]["kernel"].T,
            "train_loss.grad.codebook_projection.bias": grads["projector"]["bias"],
            "train_loss.grad.quant_conv.weight": grads["quant"]["kernel"].T,
            "train_loss.grad.post_quant_conv.weight": grads["post_quant"]["kernel"].T,
            "train_loss.grad.encoder.conv_in.weight": grads["encoder"]["conv_in"]["kernel"].transpose(3, 2, 0, 1),
            "quant_loss": own,
            "quant_loss.grad.features": nchw(grad_z),
            "quant_loss.grad.codebook_projection.weight": own_grads["projector"]["kernel"].T,
            "code_quantized": maps(tokens),
            "code_image": nchw(call(tokens, method="decode")),
        }

    return run(params, nhwc(io["image"]), nhwc(io["features"]), io["codes"][..., None])


CASES = {"vqgan_lc": vq}
