"""GIVT: the causal and the masked transformer, and the autoencoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from parity.common import along, fixed

from ar_jax.convert.sources import param_shapes
from ar_jax.data import Info
from ar_jax.generators.causal import Causal
from ar_jax.generators.maskgit import MaskGIT, lowest, mask_ratio
from ar_jax.heads.gaussian_mixture import SMALLEST, GaussianMixture, Guided
from ar_jax.nets.conditioning import Label
from ar_jax.nets.vit import GPT
from ar_jax.orders import raster
from ar_jax.tokenizers.continuous import draw, patchify
from ar_jax.tokenizers.givt_vae import GivtVAE
from ar_jax.tokens import TokenSpec, grid


def fitting(module, params):
    """The parameters, if their shapes are those of the module."""
    shapes = param_shapes(module)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    return params


def params_of(weights, embedding, projection):
    """Our tree from GIVT's own layout: kernels [in ... out], layers on the second axis.

    Args:
      embedding: rows of the conditions.
      projection: path of the tokens' projection.
    """
    w = {name: jnp.asarray(value) for name, value in weights.items()}
    layer = lambda name: jnp.moveaxis(w[f"decoder/EncDecBlock/{name}"], 1, 0)  # noqa: E731
    qkv = jnp.stack([layer(f"SelfAttn/{name}/kernel") for name in ("query", "key", "value")], axis=-2)  # [l d h 3 e]
    out = layer("SelfAttn/out/kernel")
    leaves = {
        "conditioning/embedding": embedding,
        "backbone/positions": w["decoder/pos_emb"][0],
        "backbone/blocks/attention_norm/scale": layer("LayerNorm1/scale"),
        "backbone/blocks/mlp_norm/scale": layer("LayerNorm3/scale"),
        "backbone/blocks/qkv/kernel": qkv.reshape(*qkv.shape[:2], -1),
        "backbone/blocks/out/kernel": out.reshape(len(out), -1, out.shape[-1]),
    }
    for leaf in ("kernel", "bias"):
        leaves[f"{projection}/{leaf}"] = w[f"EmbedTargets/{leaf}"]
        leaves[f"head/readout/{leaf}"] = w[f"decoder/LogitsDense/{leaf}"]
        for i in range(2):
            leaves[f"backbone/blocks/fc{i + 1}/{leaf}"] = layer(f"MLP/Dense_{i}/{leaf}")
    leaves |= {f"backbone/norm/{leaf}": w[f"decoder/LayerNorm/{leaf}"] for leaf in ("scale", "bias")}
    assert sum(map(np.size, leaves.values())) == sum(map(np.size, w.values())) - w["EmbedLabels/embedding"].size + (
        embedding.size
    ), "a weight is left over"
    return traverse_util.unflatten_dict(leaves, sep="/")


def parts(h, rows):
    """Network, conditioning and head; and the tokens, of which only the number matters, as positions are learned."""
    fixed(
        h, scale_tol=SMALLEST, fix_square_plus=True, per_channel_mixtures=False, mask_style="concat", num_layers=0,
        multivariate=False, ln_eps=1e-6,
    )  # fmt: skip
    net = GPT(h["num_decoder_layers"], h["emb_dim"], h["num_heads"], hidden=h["mlp_dim"], rows=rows)
    spec = TokenSpec(grid(1, h["seq_len"]), channels=h["out_dim"])
    return (net, Label(h["emb_dim"]), GaussianMixture(h["num_mixtures"])), spec, Info(classes=h["num_labels"])


def mixtures(folder, logits, uncond, head):
    """Densities and guided samples of GIVT's head from its raw outputs."""
    pdf, without = (head.mixture(jnp.asarray(x)) for x in (logits, uncond))
    outputs = {"locs": pdf.mean, "log_prob": pdf.log_density(jnp.asarray(folder.io["sequence"]))}
    for case in folder.of(f"{folder.path.name}.get_pdf"):
        outputs["mixture_probs"] = jax.nn.softmax(pdf.logits * case.arguments["temperature_probs"])
        outputs["scales"] = pdf.scale * case.arguments["temperature_scales"]
    for case in folder.of(f"{folder.path.name}.guided_sampling"):
        outputs |= guided(folder, pdf, without, case.arguments)
    return outputs


def guided(folder, pdf, without, arguments):
    io, temperature = folder.io, arguments["temperature_scales"]
    hot, hot_without = (x.replace(scale=x.scale * temperature) for x in (pdf, without))
    index = jnp.asarray(io["guided.component"])
    mean, scale = hot.component(index)
    density = Guided(mean, scale, *hot_without.component(index), jnp.float32(1 + arguments["cfg_inference_weight"]))
    normals, uniforms = jnp.asarray(io["guided.proposal_normal"]), jnp.asarray(io["guided.uniform"])
    fixed(folder.h, max_samples=len(normals))
    otherwise = mean + scale * jnp.asarray(io["guided.fallback_normal"])
    x, accepted = density.draw(lambda j: (normals[j], uniforms[j]), otherwise, len(normals))
    return {
        "guided.log_bound": density.log_bound(),
        "guided.sample": x,
        "guided.success_percent": 100 * accepted.mean(),
        "guided.log_prob": density.log_density(x),
    }


def conditions(io):
    return {"label": jnp.asarray(io["labels"], jnp.int32)}, jnp.asarray(io["drop_labels"], bool)


def raw(generator, rows):
    """The head's raw outputs; of a bound generator."""
    return generator.head.readout(rows)


def causal(folder):
    h, io = folder.h, folder.io
    (net, conditioning, head), spec, info = parts(h, h["seq_len"])
    h["min_masking_rate_training"]  # of the masked form
    generator = Causal(net, conditioning, head).complete(spec, info)
    params = fitting(generator, params_of(folder.weights, folder.weights["EmbedLabels/embedding"], "inputs/projection"))
    tokens, (batch, drop) = jnp.asarray(io["sequence"]), conditions(io)

    @jax.jit
    def run(params, tokens, batch, drop):
        call, order = functools.partial(generator.apply, {"params": params}), raster(spec)

        def outputs(self, drop):
            return raw(self, self.hidden(tokens, self.condition(batch, drop), order))

        logits, uncond = (call(drop, method=outputs) for drop in (drop, jnp.ones_like(drop)))
        loss, weight, _ = call(tokens, batch, order, drop=drop, method="loss")
        return {
            "logits": logits,
            "logits_uncond": uncond,
            "loss": (loss * weight).sum() / weight.sum(),
            **mixtures(folder, logits, uncond, generator.head),
        }

    cached = along(generator, params, batch, raster, tokens, raw, guided=False)
    return run(params, tokens, batch, drop) | {"cached_logits": cached}


def masked(folder):
    h, io = folder.h, folder.io
    (net, conditioning, head), spec, info = parts(h, 0)
    generator = MaskGIT(net, conditioning, head, most=1 - h["min_masking_rate_training"]).complete(spec, info)
    labels, table = h["num_labels"], folder.weights["EmbedLabels/embedding"]  # classes, three signs, no class
    classes = np.concatenate([table[:labels], table[labels + 3 :]])
    tree = params_of(folder.weights, classes, "projection") | {"signs": table[labels:][:3]}
    params = fitting(generator, tree)
    tokens, hidden, (batch, drop) = jnp.asarray(io["sequence"]), jnp.asarray(io["input_mask"], bool), conditions(io)

    @jax.jit
    def run(params, tokens, hidden, batch, drop):
        def outputs(self, drop):
            return raw(self, self.hidden(tokens, hidden, self.condition(batch, drop)))

        call = functools.partial(generator.apply, {"params": params}, method=outputs)
        logits, uncond = call(drop), call(jnp.ones_like(drop))
        loss = -generator.head.mixture(logits).log_density(tokens)
        return {
            "logits": logits,
            "logits_uncond": uncond,
            "loss": (loss * hidden).sum() / hidden.sum(),
            **mixtures(folder, logits, uncond, generator.head),
        }

    outputs = run(params, tokens, hidden, batch, drop)
    for case in folder.of("givt_masked.select"):
        score = jnp.log(io["select.probs"]) + case.arguments["temperature"] * io["select.gumbel"]
        outputs["select.mask"] = lowest(score, case.arguments["mask_len"])
    return outputs | {"schedule.mask_ratio": mask_ratio(jnp.asarray(io["schedule.ratio"]))}


def autoencoder(folder):
    h, io = folder.h, folder.io
    vae = GivtVAE(
        size=folder.shape("image")[1:3], features=h["filters"], mult=tuple(h["channel_multipliers"]),
        res_blocks=h["num_res_blocks"], latent=h["codeword_dim"], patch=tuple(h["pixel_shuffle_patch_size"]),
        groups=h["norm_groups"],
    )  # fmt: skip
    fixed(h, norm_eps=1e-6, code_len=vae.spec.n, image_size=vae.size[0])
    names = {name.removeprefix("cnn_"): jnp.asarray(value) for name, value in folder.weights.items()}
    params = fitting(vae, traverse_util.unflatten_dict(names, sep="/"))

    @jax.jit
    def run(params, image, noise):
        mean, logvar = vae.apply({"params": params}, image, method="posterior")
        mean, logvar = (patchify(x, vae.patch) for x in (mean, logvar))
        z = draw(mean, logvar, noise)
        return {"mu": mean, "logvar": logvar, "z": z, "recon": vae.apply({"params": params}, z, method="decode")}

    return run(params, jnp.asarray(io["image"]), jnp.asarray(io["noise"]))


CASES = {"givt_ar": causal, "givt_masked": masked, "givt_vae": autoencoder}
