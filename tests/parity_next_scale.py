"""What the parity folders of the pyramid tokenizers ask for, computed from the folders' hyperparameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from parity_llamagen import nchw, nhwc

from ar_jax.convert import llamagen, var
from ar_jax.convert.names import to_params
from ar_jax.nets.resize import resize
from ar_jax.tokenizers.pyramid import Pyramid
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokenizers.residual_pyramid import ResidualPyramid, smoother_of_level
from ar_jax.tokens import maps, sides


def with_params(tokenizer, weights, rules):
    """The tokenizer's methods as functions, on a state dict."""
    params = to_params(weights, jax.eval_shape(tokenizer.init_params, jax.random.key(0)), rules)
    return params, functools.partial(tokenizer.apply, {"params": params})


def scales_of(h):
    return tuple(scale if isinstance(scale, int) else tuple(scale) for scale in h["patch_nums"])


def residual_pyramid(h):
    """VAR's tokenizer with a folder's sizes."""
    scales = scales_of(h)
    return ResidualPyramid(
        size=tuple(h["downsample"] * side for side in sides(scales[-1])), scales=scales, features=h["base_channels"], mult=tuple(h["ch_mult"]),
        res_blocks=h.get("num_res_blocks", 2), codes=h["vocab_size"], code_features=h["z_channels"],
        kernel=h.get("quant_conv_kernel", 3), smoothers=h["share_quant_resi"], smoothing=h["quant_resi"],
        groups=h.get("norm_num_groups", 2), cosine=h.get("using_znorm", False),
        vq=VectorLoss(commit=h.get("beta", 0.25)),
    )  # fmt: skip


def independent_pyramid(h, size):
    """FlexVAR's tokenizer with a folder's sizes, for images of a size."""
    return Pyramid(
        size=size, scales=scales_of(h), features=h["base_channels"], mult=tuple(h["encoder_ch_mult"]),
        decoder_mult=tuple(h["decoder_ch_mult"]), res_blocks=h["num_res_blocks"], latent=h["z_channels"],
        codes=h["codebook_size"], code_features=h["codebook_embed_dim"], groups=h["norm_num_groups"],
        l2_norm=h["codebook_l2_norm"],
    )  # fmt: skip


def var_vqvae(meta, weights, io):
    tokenizer = residual_pyramid(meta["hyperparameters"])
    params, call = with_params(tokenizer, weights, var.rules(tokenizer))
    image, latent, readout = nhwc(io["image"]), nhwc(io["loss_latent"]), nhwc(io["loss_readout"])
    tokens, given = call(image, method="encode"), jnp.asarray(io["code_indices"])[..., None]
    sums = lambda tokens: np.stack([nchw(x) for x in call(tokens, method="sums")], 1)  # noqa: E731

    def objective(params, latent):
        total, _, _, losses = tokenizer.apply({"params": params}, latent, method="quantise")
        return sum(losses.values()) + (total * readout).sum()

    total, _, _, losses = call(latent, method="quantise")
    grads, grad_latent = jax.grad(objective, argnums=(0, 1))(params, latent)
    x, size = nhwc(io["resize_in"]), lambda name: tuple(meta["arrays"][name]["shape"][2:])
    first = int(np.prod(tokenizer.spec.scales[0]))
    choice = np.full(meta["arrays"]["phi_choice"]["shape"], -1)
    for levels in range(2, len(choice) + 1):
        choice[levels - 1, :levels] = smoother_of_level(levels, 4)
    smooth = {
        f"loss_grad_phi.qresi_ls.{i}.{key}": value
        for i in range(tokenizer.smoothers)
        for key, value in (
            ("weight", grads["smooth"]["kernel"][i].transpose(3, 2, 0, 1)), ("bias", grads["smooth"]["bias"][i])
        )
    }  # fmt: skip
    return {
        "latent": nchw(call(image, method="latents")),
        "indices": tokens[..., 0],
        "fhat_per_scale": sums(tokens),
        "recon": nchw(call(tokens, method="decode")),
        "code_fhat_per_scale": sums(given),
        "code_image": nchw(call(given, method="decode")),
        "var_input": call(given, method="context")[:, first:],
        "resize_bicubic_up": nchw(resize(x, size("resize_bicubic_up"))),
        "resize_bicubic_down": nchw(resize(x, size("resize_bicubic_down"))),
        "resize_bicubic_from_1x1": nchw(resize(x[:, :1, :1], size("resize_bicubic_from_1x1"))),
        "resize_area_down": nchw(resize(x, size("resize_area_down"), "area")),
        "resize_area_up": nchw(resize(x, size("resize_area_up"), "area")),
        "phi_choice": choice,
        "loss_fhat": nchw(total),
        "loss_vq": sum(losses.values()),
        "loss_grad_latent": nchw(grad_latent),
        "loss_grad_codebook": grads["codebook"],
        **smooth,
    }


def flexvar_vq(meta, weights, io):
    image = nhwc(io["image"])
    tokenizer = independent_pyramid(meta["hyperparameters"], image.shape[1:3])
    params, call = with_params(tokenizer, weights, llamagen.vqgan_rules(tokenizer))
    tokens = call(image, method="encode")
    first = int(np.prod(tokenizer.spec.scales[0]))
    outputs = {
        "continuous_latent": nchw(call(image, method="latents")),
        "train_input": call(tokens, method="context")[:, first:],
        "train_indices": tokens[..., 0],
    }
    codes = call(tokens, method="embed")
    for scale, index, map in zip(tokenizer.scales, maps(tokens, tokenizer.scales), maps(codes, tokenizer.scales)):
        alone = tokenizer.clone(scales=(scale,))
        outputs[f"multi_scale_quant.{scale}"] = nchw(map)
        decoded = alone.apply({"params": params}, index.reshape(len(index), -1, 1), method="decode")
        outputs[f"multi_scale_image.{scale}"] = nchw(decoded)
    return outputs


CASES = {"var_vqvae": var_vqvae, "flexvar_vq": flexvar_vq}
