"""FQGAN: the tokenizers with two and three codebooks, and the generator FAR."""

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import along, draws, fixed, loaded, nchw, nhwc

from ar_jax.convert import fqgan as source
from ar_jax.data import Info
from ar_jax.decode.guidance import BySubCode
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Joined
from ar_jax.heads.factorised import Factorised
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokenizers.fqgan import FQGAN
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokens import TokenSpec, grid


def vq(folder):
    h, io = folder.h, folder.io
    names = source.STREAMS[len(h["streams"])]
    heads = [name.removeprefix("sem_") if len(names) == 3 else name for name in names[1:]]
    tokenizer = FQGAN(
        size=(h["image_size"],) * 2, features=h["base_channels"], mult=tuple(h["encoder_ch_mult"]),
        decoder_mult=tuple(h["decoder_ch_mult"]), res_blocks=h["num_res_blocks"], latent=h["z_channels"],
        codes=h["codebook_size"], code_features=h["codebook_embed_dim"], groups=h["norm_num_groups"],
        l2_norm=h["codebook_l2_norm"], vq=VectorLoss(commit=h["commit_loss_beta"], entropy=h["entropy_loss_ratio"]),
        streams=len(names), layers=h["adapter_layers"], heads=h["adapter_heads"],
        feature_widths=tuple(h["feature_head_widths"]), feature_layers=h["feature_head_layers"],
        feature_heads=h["feature_head_heads"], disentangle=h["disentanglement_ratio"],
    )  # fmt: skip
    width = tokenizer.features * tokenizer.mult[-1]
    fixed(h, downsample=tokenizer.downsample, streams=list(names), adapter_width=width)
    params, _ = loaded(tokenizer, folder.weights, source)

    def training(self, image):
        recon, losses, seen = self.autoencode(image)
        x = self.encoder(image)
        codes, _, _ = self.quantise(seen["latents"])
        told = [head(code.reshape(len(code), -1, code.shape[-1])) for head, code in zip(self.told, codes[1:])]
        return recon, losses, [stream.features(x) for stream in self.stream], codes, told

    @jax.jit
    def run(params, image, tokens):
        call = lambda *args, method: tokenizer.apply({"params": params}, *args, method=method)  # noqa: E731
        recon, losses, wide, codes, told = call(image, method=training)
        index = call(image, method="encode")
        outputs = {
            "recon": nchw(recon),
            "decode_code_image": nchw(call(tokens, method="decode")),
            "loss_disentangle": losses["disentangle"],
        }
        for k, name in enumerate(names):
            outputs |= {
                f"encoder_out.{name}": nchw(wide[k]),
                f"quant.{name}": nchw(codes[k]),
                f"indices.{name}": index[..., k],
                f"loss_vq.{name}": losses[f"codebook/code{k}"],
                f"loss_commit.{name}": losses[f"commit/code{k}"],
                f"loss_entropy.{name}": losses[f"entropy/code{k}"],
            }
        return outputs | {f"semantic_feature.{name}": rows for name, rows in zip(heads, told)}

    tokens = np.stack([io[f"code.{name}"].reshape(-1, tokenizer.spec.n) for name in names], axis=-1)
    return run(params, nhwc(io["image"]), tokens)


def far(folder):
    h, io = folder.h, folder.io
    side, streams = round(h["block_size"] ** 0.5), h["num_streams"]
    fixed(h, model_type="c2i", cls_token_num=1, block_size=side**2)

    def net(layers, **options):
        return Transformer(
            layers, h["dim"], h["n_head"], hidden=h["ffn_hidden"], base=h["rope_base"], eps=h["norm_eps"], **options
        )

    head = Factorised(net(h["ar_n_layer"]))
    generator = Causal(net(h["n_layer"], final=False), Label(h["dim"]), head, Joined()).complete(
        TokenSpec(grid(side, side), codes=(h["vocab_size"],) * streams), Info(classes=h["num_classes"])
    )
    params, _ = loaded(generator, folder.weights, source)
    tokens = jnp.stack([io[f"tokens_{k + 1}"] for k in range(streams)], axis=-1)
    batch, order = {"label": jnp.asarray(io["labels"])}, raster(generator.spec)

    def forced(self):
        keep = jnp.zeros(len(tokens), bool)
        loss, weight, _ = self.loss(tokens, batch, order, drop=keep)
        logits = self.head(self.hidden(tokens, self.condition(batch, keep), order), tokens)
        return logits, (loss * weight).sum() / weight.sum()

    shown, loss = jax.jit(lambda params: generator.apply({"params": params}, method=forced))(params)
    labels = {"label": jnp.asarray(io["gen_labels"])}
    first, *others = h["cfg_scale"]
    knobs = Sampling(BySubCode(first, tuple(others)), Constant(0.0)).knobs(order, generator.spec)
    drawn = draws(generator, params, labels, raster, knobs, guided=True)
    hidden = along(generator, params, labels, raster, drawn, lambda generator, h: h)
    twice = jnp.concatenate([drawn, drawn])
    raw = jax.jit(
        lambda params: generator.apply({"params": params}, method=lambda self: self.head(jnp.asarray(hidden), twice))
    )(params)
    outputs = {"tf_loss": loss}
    for k in range(streams):
        outputs |= {
            f"tf_logits_{k + 1}": shown[k],
            f"gen_tokens_{k + 1}": drawn[..., k],
            f"gen_raw_logits_{k + 1}": raw[k],
        }
    return outputs


CASES = {"fqgan_dual_vq": vq, "fqgan_triple_vq": vq, "fqgan_dual_far": far, "fqgan_triple_far": far}
