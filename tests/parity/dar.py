"""D-AR: the sequential diffusion tokenizer with its previews, and the language model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import along, draws, fixed, loaded, logits, nchw, nhwc
from parity.elm import listed

from ar_jax.convert import dar as source
from ar_jax.convert.names import to_weights
from ar_jax.data import Info
from ar_jax.decode.guidance import Between
from ar_jax.decode.logits import Filter
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Label
from ar_jax.nets.head_norm import HeadNorm, Painter
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokenizers.dar import SequentialDiffusion
from ar_jax.tokens import TokenSpec, grid


def tokenizer(folder):
    h, io, paint = folder.h, folder.io, folder.h["diff_decoder"]
    size = folder.shape("image")[2:]

    def net(kind, layers, width):
        return kind(layers, width, width // source.FEATURES)

    fixed(h, vq_enable=True, num_query_groups=h["num_all_queries"] // h["queries_per_step"])
    fixed(h, sampling_resolution=size[0], image_size=size[0])
    fixed(paint, out_dim=paint["in_dim"], cond_dim=h["decoder_dim"], mlp_head=False, share_time_encoding=False)
    module = SequentialDiffusion(
        size, h["encoder_patch_size"], paint["patch_size"], h["num_all_queries"],
        net(HeadNorm, h["num_encoder_layers"], h["encoder_dim"]), net(HeadNorm, h["num_decoder_layers"], h["decoder_dim"]),
        net(Painter, paint["depth"], paint["dim"]), h["vq_codebook_size"], h["vq_dim"], h["num_denoising_steps"],
        h["queries_per_step"], rank=folder.weights["query_embedding.weight"].shape[1] * h["query_low_rank"],
        rows=len(folder.weights["query_embedding.weight"]), spread=paint["data_std"], delay=float(paint["time_shift"]),
        channels=paint["in_dim"],
    )  # fmt: skip
    params, call = loaded(module, folder.weights, source)
    image, codes = nhwc(io["image"]), jnp.asarray(folder.want["codes"])[..., None]
    whole, preview = folder.of("dar.decode_code")
    fixed(whole.arguments, num_denoising_steps=module.steps, solver="adams-bashforth 2", time_shift=paint["time_shift"])
    fixed(folder.of("dar.training_loss")[0].arguments, note="LPIPS and REPA terms omitted")

    @jax.jit
    def encoded(image):
        latents = call(image, method="registered")
        codes, index, _ = call(latents, method="quantise")
        return {"pre_quant": latents, "codes": index, "quantized": codes, "cond": call(codes, method="told")}

    @jax.jit
    def shown(noise, count):
        vectors = call(codes, method="embed")
        return nchw(call(nhwc(noise), vectors, jnp.full(len(codes), count), method="painted"))

    @jax.jit
    def trained(params):
        def loss(params):
            u = jnp.asarray(io["train.time_uniform"])
            _, losses, _ = module.apply({"params": params}, image, u, nhwc(io["train.noise"]), method="trained")
            return sum(losses.values()), losses

        return jax.grad(loss, has_aux=True)(params)

    grads, losses = trained(params)
    named = to_weights(jax.tree.map(np.asarray, grads), source.rules(module))
    cut = module.ends[preview.arguments["clip_steps"] - 1]
    return {
        **encoded(image),
        "decode.image": shown(io["decode.noise"], module.registers),
        "preview.image": shown(io["preview.noise"], cut),
        "net.v": nchw(
            jax.jit(lambda *arguments: call(*arguments, method="velocity")[0])(
                nhwc(io["net.xt"]), jnp.asarray(io["net.t"]), jnp.asarray(io["net.cond"])
            )
        ),
        "train.vq_loss": losses["codebook"],
        "train.commit_loss": losses["commit"],
        "train.fm_loss": losses["flow"],
        "train.entropy_raw": losses.get("entropy", jnp.zeros(())),
        **{f"train.grad.{name}": named[name] for name in folder.outputs("train.grad.")},
    }


class GivenUniforms(Categorical):
    """Draws how many cumulative probabilities are smaller than a uniform number of a table [images steps]."""

    table: Any = None

    def draw(self, logits, keys, knobs, i):
        below = jnp.cumsum(jax.nn.softmax(logits), axis=-1) < jnp.asarray(self.table)[:, i, None, None]
        return below.sum(-1)[..., None].astype(jnp.int32)


def gpt(folder):
    h, io = folder.h, folder.io
    hidden = -(-int(8 * h["dim"] / 3) // h["multiple_of"]) * h["multiple_of"]
    net = Transformer(
        h["n_layer"], h["dim"], h["n_head"], hidden=hidden, base=float(h["rope_base"]), eps=h["norm_eps"], line=True
    )
    spec = TokenSpec(grid(1, h["block_size"]), codes=(h["vocab_size"],))
    generator = Causal(net, Label(h["dim"])).complete(spec, Info(classes=h["num_classes"]))
    params, _ = loaded(generator, folder.weights, source)
    labels, order = {"label": jnp.asarray(io["labels"])}, raster(spec)
    tokens = jnp.asarray(io["tokens"])[..., None]
    drop = jnp.asarray(io["label_drop_uniform"]) < h["class_dropout_prob"]

    @jax.jit
    def forced(params):
        def run(self):
            loss, weight, _ = self.loss(tokens, labels, order, drop=drop)
            shown = self.head(self.hidden(tokens, self.condition(labels, drop), order))
            return (loss * weight).sum() / weight.sum(), shown

        return jax.value_and_grad(lambda params: generator.apply({"params": params}, method=run), has_aux=True)(params)

    (loss, shown), grads = forced(params)
    (case,) = folder.of("dar_gpt.generate")
    fixed(case.arguments, cfg_scale_schedule=h["cfg"], top_k=h["top_k"], top_p=h["top_p"])
    first, last = map(float, h["cfg"].split(","))
    sampling = Sampling(Between(first, last), Constant(case.arguments["temperature"]), Filter(h["top_k"], h["top_p"]))
    knobs = sampling.knobs(order, spec)
    given = generator.clone(head=GivenUniforms(codes=h["vocab_size"], table=listed(io["sample.uniform"])))
    ids = draws(given, params, labels, raster, knobs, guided=True)
    cond, uncond = np.split(along(generator, params, labels, raster, ids, logits), 2)
    guided = uncond + (cond - uncond) * knobs.guidance[None, :, None]
    named = to_weights(jax.tree.map(np.asarray, grads), source.rules(generator))
    return {
        "train.logits": shown,
        "train.loss": loss,
        **{f"train.grad.{name}": named[name] for name in folder.outputs("train.grad.")},
        "sample.tokens": ids,
        "sample.probs": jax.nn.softmax(knobs.filter(jnp.asarray(guided) / case.arguments["temperature"])),
    }


CASES = {"dar_tokenizer": tokenizer, "dar_gpt": gpt}
