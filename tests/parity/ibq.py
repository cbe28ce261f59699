"""IBQ: the tokenizer and the generator."""

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import along, constant_knobs, draws, fixed, loaded, logits, nchw, nhwc
from parity.open_magvit2 import gradients

from ar_jax.convert import ibq as source
from ar_jax.data import Info
from ar_jax.generators.causal import Causal
from ar_jax.nets.conditioning import Label, fold
from ar_jax.nets.modulated import Modulated
from ar_jax.orders import raster
from ar_jax.tokenizers import quantize_blocks as blocks
from ar_jax.tokenizers.ibq import IBQ
from ar_jax.tokenizers.quantize_index import IndexLoss, index_quantise, products
from ar_jax.tokens import TokenSpec, grid


def vq(folder):
    h, io = folder.h, folder.io
    loss = IndexLoss(codebook=h["beta"], entropy=h["entropy_weight"], temperature=h["entropy_temperature"])
    sides = [h["resolution"] >> level for level in range(len(h["ch_mult"]))]
    tokenizer = IBQ(
        size=folder.shape("image")[2:], features=h["base_channels"], mult=tuple(h["ch_mult"]),
        res_blocks=h["num_res_blocks"], latent=h["z_channels"], codes=h["codebook_size"], code_features=h["codebook_dim"],
        groups=h["norm_num_groups"], vq=loss, channels=folder.shape("image")[1],
        attention=tuple(level for level, side in enumerate(sides) if side in h["attn_resolutions"]),
    )  # fmt: skip
    fixed(h, downsample=tokenizer.downsample, norm_eps=1e-6)
    params, _ = loaded(tokenizer, folder.weights, source)
    pull = nhwc(jnp.linspace(-1, 1, io["features"].size).reshape(io["features"].shape))
    few = 3 * io["features"].size // h["codebook_dim"]  # blocks of three codes

    @jax.jit
    def run(params, image, features, codes):
        def call(method, *args):
            return tokenizer.apply({"params": params}, *args, method=method)

        def maps(codes):
            return nchw(codes.reshape(len(codes), *tokenizer.grid, -1))

        def train(params):
            made, losses, seen = tokenizer.apply({"params": params}, image, method="autoencode")
            return jnp.abs(image - made).mean() + sum(losses.values()), (made, seen)

        def parts(z, book):
            code, _, losses = index_quantise(z, book, loss, few)
            entropy = losses.pop("entropy") / loss.entropy
            return sum(losses.values()), entropy, (code * pull).sum()

        (value, (made, seen)), grads = jax.value_and_grad(train, has_aux=True)(params)
        book, rows = params["codebook"], blocks.rows_of(features)
        sharp = lambda some: products(features, some) / loss.temperature  # noqa: E731
        _, top = blocks.best(sharp, book, rows, few)
        sample, average = blocks.entropies(sharp, book, top, rows, few)
        back = jax.jacrev(parts, argnums=(0, 1))(features, book)
        named = {
            f"{name}.grad.{of}": nchw(x) if of == "features" else x
            for name, pair in zip(("quant_loss", "entropy_loss", "code"), back)
            for of, x in zip(("features", "codebook"), pair)
        }
        quant, entropy, _ = parts(features, book)
        found = {
            "latent": nchw(seen["latents"]),
            "quantized": maps(call("embed", seen["tokens"])),
            "indices": seen["tokens"],
            "recon": nchw(made),
            "train_loss": value,
            "quant_loss": quant,
            "sample_entropy": sample,
            "avg_entropy": average,
            "entropy_loss": entropy,
            "code_quantized": maps(call("embed", codes)),
            "code_image": nchw(call("decode", codes)),
        }
        return found | named, grads

    found, grads = run(params, nhwc(io["image"]), nhwc(io["features"]), jnp.asarray(io["codes"])[..., None])
    return found | gradients(folder, tokenizer, grads, source)


def ar(folder):
    h, io, width = folder.h, folder.io, folder.h["dim"]
    multiple = h["ffn_multiple_of"]
    backbone = Modulated(
        h["layers"], width, h["heads"], hidden=-(-(8 * width // 3) // multiple) * multiple, base=h["rope_base"],
        eps=h["norm_eps"],
    )  # fmt: skip
    fixed(h, top_k=0)
    spec = TokenSpec(grid(h["grid"], h["grid"]), codes=(h["vocab_size"],))
    generator = Causal(backbone, Label(width)).complete(spec, Info(classes=h["class_num"]))
    params = loaded(generator, {"transformer." + key: x for key, x in folder.weights.items()}, source)[0]
    tokens, labels = jnp.asarray(io["tokens"])[..., None], {"label": jnp.asarray(io["labels"])}
    order, keep = raster(spec), jnp.zeros(len(io["tokens"]), bool)

    @jax.jit
    def forced(params):
        def run(self):
            loss, weight, _ = self.loss(tokens, labels, order, drop=keep)
            shown = self.head(self.hidden(tokens, self.condition(labels, keep), order))
            return (loss * weight).sum() / weight.sum(), shown

        return jax.value_and_grad(lambda params: generator.apply({"params": params}, method=run), has_aux=True)(params)

    (loss, shown), grads = forced(params)
    batch = {"label": jnp.asarray(io["gen_labels"])}
    knobs = constant_knobs(np.full(spec.n, h["guidance_scale"]), 0.0)
    drawn = draws(generator, params, batch, raster, knobs, guided=True)
    raw = along(generator, params, batch, raster, drawn, logits)
    neighbours = np.stack(np.split(raw, 2), 1).reshape(raw.shape)
    return {
        "logits": shown,
        "loss": loss,
        "gen_tokens": drawn,
        "gen_probs": jax.nn.softmax(fold(neighbours, 2, h["guidance_scale"]) / h["temperature"]),
    } | gradients(folder, generator, grads, source, "transformer.", "loss")


CASES = {"ibq_vq": vq, "ibq_ar": ar}
