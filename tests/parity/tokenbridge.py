"""TokenBridge: the quantiser of every number, the head that draws them one by one, training and sampling with it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import constant_knobs, draws, fixed, loaded, nchw, nhwc, weights_of, with_head

from ar_jax.convert import tokenbridge as source
from ar_jax.convert.names import to_weights
from ar_jax.data import Info
from ar_jax.generators.masked import Masked
from ar_jax.heads.by_dimension import Dimensions
from ar_jax.heads.categorical import Categorical
from ar_jax.heads.factorised import Factorised
from ar_jax.nets.conditioning import Label
from ar_jax.nets.vit import ViT
from ar_jax.orders import Order, cosine_sizes, rooms, to_ranks
from ar_jax.tokenizers.dimensionwise import Dimensionwise
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokenizers.quantize_normal import normal_bins


class GivenUniforms(Factorised):
    """Draws how many cumulative probabilities are no larger than a uniform number of a table [images m k]."""

    table: Any = None

    def draw(self, j, y, keys, knobs, i):
        logits = self.readouts[j].filtered(y, len(y), knobs, i)
        total = jnp.cumsum(jax.nn.softmax(logits), axis=-1)
        return (total <= jnp.asarray(self.table)[..., j, None]).sum(-1, keepdims=True).astype(jnp.int32), 0.0


def build(folder):
    """The tokenizer, the generator and its parameters."""
    h = folder.h

    def net(name):
        width = h[f"{name}_embed_dim"]
        return ViT(h[f"{name}_depth"], width, h[f"{name}_num_heads"], hidden=int(h["mlp_ratio"] * width))

    fixed(h, patch_size=1, norm_eps=1e-6)
    tokenizer = Dimensionwise(
        KLVAE((16 * h["grid"], 16 * h["grid"]), latent=h["vae_embed_dim"]), h["quant_levels"],
        (h["quant_min"], h["quant_max"]), h["std_range"],
    )  # fmt: skip
    small = Dimensions(h["channel_depth"], h["channel_embed_dim"], h["channel_heads"], plain_start=True)
    parts = (small, Categorical(bias=True), tuple(h["channel_order"]), True, "rows")
    plain, generator = (
        Masked(
            net("encoder"), net("decoder"), Label(h["encoder_embed_dim"], apart=True), head, h["buffer_size"],
            vectors=h["vae_embed_dim"],
        ).complete(tokenizer.spec, Info(classes=h["class_num"]))
        for head in (Factorised(*parts), GivenUniforms(*parts))
    )  # fmt: skip
    params, _ = loaded(plain, folder.weights, source)
    for key, value in source.fills(plain).items():
        np.testing.assert_allclose(folder.weights[key], value, atol=2e-5)
    return tokenizer, generator, plain, params


def bridge(folder):
    h, io = folder.h, folder.io
    tokenizer, given, generator, params = build(folder)
    order, spread = np.array(h["channel_order"]), h["std_range"]
    inverse = np.argsort(order)
    outputs = {}
    for name in folder.outputs("boundaries"):
        outputs[f"boundaries{name}"], outputs[f"reconstruction_values{name}"] = normal_bins(
            int(name[1:] or 0) if name else h["quant_levels"], spread
        )
    show = jax.jit(lambda latents: tokenizer.apply({}, latents, method=rounded))
    indices, outputs["dequantised"] = show(nhwc(io["latents"]))
    outputs["indices"] = indices

    greedy, warm = (constant_knobs([1.0], temperature) for temperature in (0.0, h["temperature"]))
    drawing = with_head(given, table=io["uniforms"][None])

    @jax.jit
    def head(params, features, targets):
        keys = jax.random.split(jax.random.key(0), (1, len(features)))

        def call(generator, *arguments, method):
            run = lambda self: getattr(self.head, method)(*arguments)  # noqa: E731
            return generator.apply({"params": params}, method=run)

        return {
            "head_logits": jnp.stack(call(generator, features[None], targets[None, :, inverse], method="__call__"), 2),
            "head_greedy": call(generator, features[None], keys, greedy, 0, method="sample")[..., order],
            "head_sampled": call(drawing, features[None], keys, warm, 0, method="sample")[..., order],
        }

    outputs |= head(params, jnp.asarray(io["features"]), jnp.asarray(io["targets"]))
    return (
        outputs | trained(folder, tokenizer, generator, params, indices) | sampled(folder, tokenizer, generator, params)
    )


def rounded(self, latents):
    tokens = self.rounded(latents.reshape(len(latents), -1, latents.shape[-1]))
    return tokens, self.embed(tokens)


def trained(folder, tokenizer, generator, params, tokens):
    io, n = folder.io, generator.spec.n
    slot = np.asarray(io["orders"], np.int32)[:, ::-1]
    order, known = Order(slot, (1,) * n), n - int(np.ceil(n * io["mask_ratio"]))
    batch = {"label": jnp.asarray(io["labels"], jnp.int32)}
    embed = functools.partial(tokenizer.apply, {})

    @jax.jit
    def run(params, tokens):
        target = to_ranks(tokens, order)

        def objective(params):
            def run(self):
                cond = self.condition(batch, jnp.zeros(len(tokens), bool))
                h = self.hidden(self.shown(target[:, :known], embed), jnp.int32(known), cond, order)
                return self.head.loss(h[:, known:], target[:, known:]).mean()

            return generator.apply({"params": params}, method=run)

        return jax.value_and_grad(objective)(params)

    loss, grads = run(params, tokens)
    return {"loss": loss} | {f"loss.grad.{k}": v for k, v in to_weights(grads, source.rules(generator)).items()}


def sampled(folder, tokenizer, generator, params):
    h, io = folder.h, folder.io
    slot, sizes = np.asarray(io["orders"], np.int32)[:, ::-1], cosine_sizes(generator.spec.n, h["num_iter"])
    order, outputs = Order(slot, sizes, rooms(sizes, 2)), {}
    batch = {"label": jnp.asarray(io["labels"], jnp.int32)}
    ordered = lambda spec: order  # noqa: E731
    for name in ("sample", "sample_linear", "sample_constant"):
        rule = name.removeprefix("sample").removeprefix("_")
        weight = weights_of(rule, h["cfg"], order) if rule else np.ones(len(sizes), np.float32)
        tokens = draws(generator, params, batch, ordered, constant_knobs(weight, 0.0), bool(rule), tokenizer, {})
        values = tokenizer.apply({}, tokens, method="embed")
        outputs |= {f"{name}_indices": tokens, name: nchw(values.reshape(len(tokens), *tokenizer.grid, -1))}
    return outputs


CASES = {"tokenbridge": bridge}
