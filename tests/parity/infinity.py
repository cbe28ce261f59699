"""Infinity's tokenizer: bits of several scales, self-correction, losses, scale lists."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import fixed, loaded, nchw, nhwc

from ar_jax.convert import infinity as source
from ar_jax.heads.bitwise import by_scale, cross_entropy
from ar_jax.tokenizers.bit_pyramid import BitPyramid, scales_of_ratio
from ar_jax.tokenizers.quantize import normalise
from ar_jax.tokenizers.quantize_spherical import (
    SphericalLoss,
    bit_entropies,
    bits_of,
    corner,
    flipped,
    spherical_quantise,
    unlikely,
)
from ar_jax.tokens import maps


def tokenizer_of(h, **fields):
    scales = tuple(map(tuple, h["scale_schedule"]))
    loss = SphericalLoss(h["commitment_weight"], h["entropy_weight"], h["inv_temperature"])
    fields = {
        "size": tuple(h["downsample"] * side for side in scales[-1]), "scales": scales, "features": h["base_channels"],
        "mult": tuple(h["ch_mult"]), "res_blocks": h["num_res_blocks"], "bits": h["codebook_dim"],
        "groups": h["norm_num_groups"], "vq": loss,
    } | fields  # fmt: skip
    tokenizer = BitPyramid(**fields)
    fixed(h, norm_eps=1e-6, downsample=tokenizer.downsample, bit_loss="mean over bits, reweighted by scale")
    return tokenizer


def vae(folder):
    h, io = folder.h, folder.io
    tokenizer = tokenizer_of(h)
    _, call = loaded(tokenizer, folder.weights, source)
    np.testing.assert_array_equal(source.fills(tokenizer)[source.PLACES[0]], folder.weights[source.PLACES[0]])

    @jax.jit
    def images(image, bits):
        tokens = call(image, method="encode")
        sums = call(tokens, method="sums")[-1]
        return {
            "latent": nchw(call(image, method="latents")),
            "quantized": nchw(sums),
            "indices": tokens,
            "decoder_out": nchw(call(sums, method="pixels")),
            "recon": nchw(call(tokens, method="decode")),
            "bits_sum": nchw(call(bits, method="sums")[-1]),
            "bits_image": nchw(call(bits, method="decode")),
        }

    outputs = images(nhwc(io["image"]), jnp.asarray(io["bits"]))
    patched = tuple(map(tuple, h["patch_scale_schedule"]))
    patched = tokenizer_of(h, patch=2, scales=patched, size=tuple(2 * h["downsample"] * side for side in patched[-1]))
    given = {name: jnp.asarray(io[name]) for name in io}
    outputs |= jax.jit(functools.partial(of_bits, tokenizer, patched))(given)
    outputs |= jax.jit(functools.partial(quantiser, loss=tokenizer.vq))(nhwc(io["loss_features"]))
    return outputs | {"scale_lists": np.array([scales_of_ratio(ratio) for ratio in h["aspect_ratios"]])}


def later(tokenizer, rows):
    """Rows of all scales but the first."""
    return rows[:, int(np.prod(tokenizer.spec.scales[0])) :]


def of_bits(tokenizer, patched, io):
    """What needs no network: contexts and right bits where some are flipped; the loss of bits."""

    def corrected(tokenizer, prefix, strength=1):
        uniform = maps(io[f"{prefix}flip_uniform"], tokenizer.sizes)
        flips = [flipped(x, strength * io[f"{prefix}flip_percent"][i]) for i, x in enumerate(uniform)]
        labels, inputs = tokenizer.apply({}, nhwc(io[f"{prefix}features"]), flips, method="corrected")
        return {"labels": labels, "inputs": later(tokenizer, inputs)}

    outputs = {"int_codes": nchw(corner(bits_of(io["int_labels"][:, 0], tokenizer.bits)))}
    for name, found in {
        "bsc": corrected(tokenizer, ""), "clean": corrected(tokenizer, "", 0), "patch_bsc": corrected(patched, "patch_"),
    }.items():  # fmt: skip
        outputs |= {f"{name}_{what}": value for what, value in found.items()}
    tokens, weight = io["token_bits"], by_scale(tokenizer.spec)
    logits = io["bit_logits"].reshape(*outputs["bsc_labels"].shape, 2)

    def bit_loss(logits):
        each = cross_entropy(logits, outputs["bsc_labels"])
        return (each.mean(-1) * weight).sum(1).mean(), each

    (loss, each), grad = jax.value_and_grad(bit_loss, has_aux=True)(logits)
    return outputs | {
        "token_sum": nchw(patched.apply({}, tokens, method="sums")[-1]),
        "token_next_inputs": later(patched, patched.apply({}, tokens, method="context")),
        "bit_loss": loss, "bit_loss_per_token": each.mean(-1), "bit_logits.grad": grad, "scale_weights": weight,
        "bit_loss_sum_uniform": each.sum(-1).mean(),
    }  # fmt: skip


def quantiser(z, loss):
    """One call: its losses, and its gradient for given weights of its code."""
    readout = nhwc(jnp.linspace(-1, 1, z.size).reshape(nchw(z).shape))
    u = normalise(z)
    sample, batch = bit_entropies(u, loss.sharpness)
    aux = lambda z: sum(spherical_quantise(z, loss)[2].values())  # noqa: E731
    return {
        "entropy_per_sample": sample,
        "entropy_codebook": batch,
        "entropy_avg_prob": unlikely(u, loss.sharpness).mean((0, 1, 2)),
        "commitment": spherical_quantise(z, SphericalLoss(commit=1.0))[2]["commit"],
        "aux_loss": aux(z),
        "aux_loss.grad": nchw(jax.grad(aux)(z)),
        "straight_through.grad": nchw(jax.grad(lambda z: (spherical_quantise(z, loss)[0] * readout).sum())(z)),
    }


CASES = {"infinity_bsq_vae": vae}
