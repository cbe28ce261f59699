"""VAR: its tokenizer, and its transformer in both forms."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import along, by_settings, draws, fixed, loaded, logits, nchw, nhwc

from ar_jax.convert import next_scale, var
from ar_jax.convert.names import to_weights
from ar_jax.decode.logits import top_k, top_p
from ar_jax.nets.attention import visible
from ar_jax.nets.conditioning import fold
from ar_jax.nets.resize import resize
from ar_jax.orders import scales as by_scale
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokenizers.residual_pyramid import ResidualPyramid, smoother_of_level
from ar_jax.tokens import sides


def scales_of(h):
    return tuple(scale if isinstance(scale, int) else tuple(scale) for scale in h["patch_nums"])


def residual_pyramid(h):
    """VAR's tokenizer with a folder's sizes."""
    scales = scales_of(h)
    tokenizer = ResidualPyramid(
        size=tuple(h["downsample"] * side for side in sides(scales[-1])), scales=scales, features=h["base_channels"],
        mult=tuple(h["ch_mult"]), res_blocks=h.get("num_res_blocks", 2), codes=h["vocab_size"],
        code_features=h["z_channels"], kernel=h.get("quant_conv_kernel", 3), smoothers=h["share_quant_resi"],
        smoothing=h["quant_resi"], groups=h["norm_num_groups"], cosine=h.get("using_znorm", False),
        vq=VectorLoss(commit=h.get("beta", 0.25)),
    )  # fmt: skip
    fixed(h, downsample=tokenizer.downsample)
    return tokenizer


def var_vqvae(folder):
    io = folder.io
    tokenizer = residual_pyramid(folder.h)
    params, _ = loaded(tokenizer, folder.weights, var)
    first = int(np.prod(tokenizer.spec.scales[0]))

    @jax.jit
    def run(params, image, given, latent, readout):
        call = lambda *args, method: tokenizer.apply({"params": params}, *args, method=method)  # noqa: E731
        sums = lambda tokens: jnp.stack([nchw(x) for x in call(tokens, method="sums")], 1)  # noqa: E731

        def objective(params, latent):
            total, _, _, losses = tokenizer.apply({"params": params}, latent, method="quantise")
            return sum(losses.values()) + (total * readout).sum()

        tokens = call(image, method="encode")
        total, _, _, losses = call(latent, method="quantise")
        grads, grad_latent = jax.grad(objective, argnums=(0, 1))(params, latent)
        return grads, {
            "latent": nchw(call(image, method="latents")),
            "indices": tokens[..., 0],
            "fhat_per_scale": sums(tokens),
            "recon": nchw(call(tokens, method="decode")),
            "code_fhat_per_scale": sums(given),
            "code_image": nchw(call(given, method="decode")),
            "var_input": call(given, method="context")[:, first:],
            "loss_fhat": nchw(total),
            "loss_vq": sum(losses.values()),
            "loss_grad_latent": nchw(grad_latent),
            "loss_grad_codebook": grads["codebook"],
        }

    given = io["code_indices"][..., None]
    grads, outputs = run(params, nhwc(io["image"]), given, nhwc(io["loss_latent"]), nhwc(io["loss_readout"]))
    prefix = "quantize.quant_resi."
    grads = {name: value for name, value in to_weights(grads, var.rules(tokenizer)).items() if name.startswith(prefix)}
    return {
        **outputs,
        **{f"loss_grad_phi.{name.removeprefix(prefix)}": value for name, value in grads.items()},
        **resized(folder),
        "phi_choice": choices(folder),
    }


def resized(folder):
    x, outputs = nhwc(folder.io["resize_in"]), {}
    for name in folder.outputs("resize_"):
        size = folder.shape(f"resize_{name}")[2:]
        source = x[:, :1, :1] if name.endswith("from_1x1") else x
        outputs[f"resize_{name}"] = nchw(resize(source, size, "area" if name.startswith("area") else "bicubic"))
    return outputs


def choices(folder):
    """Which convolution smooths which of so many levels; -1 where there is none."""
    choice = np.full(folder.shape("phi_choice"), -1)
    smoothers = int(re.search(r"(\d+) shared convs", folder.arrays["phi_choice"]["meaning"])[1])
    for levels in range(2, len(choice) + 1):
        choice[levels - 1, :levels] = smoother_of_level(levels, smoothers)
    return choice


def build(folder, weights):
    """The generator of a state dict, with a folder's sizes, and its parameters."""
    h = folder.h
    shapes = {key: np.shape(weights[key]) for key in weights}
    generator = next_scale.build(
        "generator", shapes, size=0, heads=h["num_heads"], groups=0, scales=tuple(h["patch_nums"])
    )
    net = generator.backbone
    fixed(
        h, embed_dim=net.width, mlp_ratio=(net.hidden or 4 * net.width) / net.width, shared_aln=net.shared,
        num_classes=generator.conditioning.classes, attn_l2_norm=net.l2_norm, norm_eps=net.eps, depth=net.depth,
    )  # fmt: skip
    return generator, loaded(generator, weights, next_scale)[0]


def batch_of(labels):
    return {"label": jnp.asarray(labels)}


def teacher_forced(generator, params, tokens, labels, tokenizer=None, frozen=None):
    """Logits [b n v], and the loss as training weighs it."""
    order, drop = by_scale(generator.spec), jnp.zeros(len(labels), bool)

    @jax.jit
    def run(params, frozen, tokens, batch):
        call = lambda *args, method: tokenizer.apply({"params": frozen}, *args, method=method)  # noqa: E731

        def both(self):
            out = self.head(self.hidden(tokens, self.condition(batch, drop), order, call))
            loss, weight, _ = self.loss(tokens, batch, order, drop=drop, tokenizer=call)
            return out, (loss * weight).sum() / weight.sum()

        return generator.apply({"params": params}, method=both)

    return run(params, frozen, jnp.asarray(tokens)[..., None], batch_of(labels))


def guided_logits(logits, knobs, sizes):
    """Folds [2b n v] with the weight of each rank's step."""
    both = np.stack(np.split(logits, 2), 1).reshape(-1, *logits.shape[1:])
    return fold(both, 2, np.repeat(knobs.guidance, sizes)[:, None])


def drawn(drawing, params, frozen, labels):
    """Tokens [b n 1] of the library's sampler, by settings."""
    return draws(
        drawing.generator, params, batch_of(labels), by_scale, drawing.knobs, drawing.guided, drawing.tokenizer, frozen
    )  # fmt: skip


def stepped(drawing, params, frozen, labels, tokens):
    """Logits [2b n v] of the cached steps along given tokens."""
    return along(
        drawing.generator, params, batch_of(labels), by_scale, tokens, logits, tokenizer=drawing.tokenizer, frozen=frozen
    )  # fmt: skip


def looks(tokenizer, frozen, tokens):
    """The sums of scales [b l c h w] and the image [b c h w] of tokens [b n 1]."""
    return _looks(tokenizer)(frozen, tokens)


@functools.cache
def _looks(tokenizer):
    @jax.jit
    def run(frozen, tokens):
        call = lambda method: tokenizer.apply({"params": frozen}, tokens, method=method)  # noqa: E731
        return jnp.stack([nchw(x) for x in call("sums")], 1), (nchw(call("decode")) + 1) / 2

    return run


def transformer(folder):
    h, io = folder.h, folder.io
    weights, theirs = folder.weights, folder.files["vae.safetensors"]
    generator, params = build(folder, weights)
    fixed(h["vae"], patch_nums=h["patch_nums"])
    tokenizer = residual_pyramid(h["vae"])
    frozen, call = loaded(tokenizer, theirs, var)
    out, loss = teacher_forced(generator, params, io["tokens"], io["labels"], tokenizer, frozen)
    drawing = by_settings(generator, tokenizer, by_scale, guidance=h["cfg"], temperature=1.0, top_k=1)
    tokens = drawn(drawing, params, frozen, io["gen_labels"])
    raw = stepped(drawing, params, frozen, io["gen_labels"], tokens)
    order, spec, knobs = drawing.order, generator.spec, drawing.knobs
    sums, image = looks(tokenizer, frozen, tokens)
    given = jnp.asarray(io["filter_logits"])
    return {
        "level_index": spec.coords[:, 0],
        "attn_bias_finite": visible(order.step, order.step)[0],
        "tf_input": call(jnp.asarray(io["tokens"])[..., None], method="context")[:, order.sizes[0] :],
        "tf_logits": out,
        "tf_loss": loss,
        "gen_raw_logits": raw,
        "gen_cfg_logits": guided_logits(raw, knobs, order.sizes),
        "gen_tokens": tokens,
        "gen_fhat_per_scale": sums,
        "gen_image": image,
        "cfg_schedule": knobs.guidance - 1,
        "filter_topk": top_k(given, h["filter_top_k"]),
        "filter_topp": top_p(given, h["filter_top_p"]),
        "filter_both": top_p(top_k(given, h["filter_both_top_k"]), h["filter_both_top_p"]),
    }


CASES = {"var_vqvae": var_vqvae, "var": transformer, "var_shared_adaln": transformer}
