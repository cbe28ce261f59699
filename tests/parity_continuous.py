"""What the parity folders of continuous tokens ask for, computed from the folders' hyperparameters."""

import functools

import jax
from parity_llamagen import nchw, nhwc

from ar_jax.convert import mar
from ar_jax.convert.names import to_params
from ar_jax.tokenizers.continuous import draw, kl_divergence
from ar_jax.tokenizers.kl_vae import KLVAE


def with_params(module, weights, rules):
    """Parameters from a state dict, and the module's methods as functions of them."""
    params = to_params(weights, jax.eval_shape(module.init_params, jax.random.key(0)), rules)
    return params, functools.partial(module.apply, {"params": params})


def kl16_vae(meta, weights, io):
    h = meta["hyperparameters"]
    vae = KLVAE(
        size=(h["image_size"],) * 2, features=h["ch"], mult=tuple(h["ch_mult"]), res_blocks=h["num_res_blocks"],
        latent=h["embed_dim"], groups=h["norm_groups"], scale=(h["latent_scale"],),
    )  # fmt: skip
    params, call = with_params(vae, weights, mar.rules(vae))
    image, noise, rect = nhwc(io["image"]), nhwc(io["noise"]), nhwc(io["latent_rect"])
    encoder_out = vae.bind({"params": params}).encoder(image)
    mean, logvar = call(image, method="posterior")
    sample = draw(mean, logvar, noise)
    scaled = call(sample, method="standardise")
    return {
        "encoder_out": nchw(encoder_out),
        "moments": nchw(vae.bind({"params": params}).quant(encoder_out)),
        "mean": nchw(mean),
        "logvar": nchw(logvar),
        "kl": kl_divergence(mean, logvar),
        "sample": nchw(sample),
        "scaled_latent": nchw(scaled),
        "recon": nchw(call(scaled.reshape(len(scaled), vae.spec.n, -1), method="decode")),
        "recon_rect": nchw(call(rect, method="pixels")),
    }


CASES = {"kl16_vae": kl16_vae}
