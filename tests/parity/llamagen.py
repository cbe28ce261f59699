"""LlamaGen: the tokenizer, and the class- and the text-conditional transformer."""

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import along, constant_knobs, draws, fixed, loaded, logits, nchw, nhwc, weights_of

from ar_jax.convert import llamagen
from ar_jax.data import Info
from ar_jax.decode.logits import top_k, top_p
from ar_jax.generators.causal import Causal
from ar_jax.nets.attention import visible
from ar_jax.nets.conditioning import Caption, Label, fold
from ar_jax.nets.positions import NOWHERE, rotary
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec, grid


def vq(folder):
    h, io = folder.h, folder.io
    tokenizer = VQGAN(
        size=folder.shape("image")[2:], features=h["base_channels"], mult=tuple(h["encoder_ch_mult"]),
        decoder_mult=tuple(h["decoder_ch_mult"]), res_blocks=h["num_res_blocks"], latent=h["z_channels"],
        codes=h["codebook_size"], code_features=h["codebook_embed_dim"], groups=h["norm_num_groups"],
        l2_norm=h["codebook_l2_norm"], channels=h["in_channels"],
        vq=VectorLoss(commit=h["commit_loss_beta"], entropy=h["entropy_loss_ratio"], temperature=h["entropy_temperature"]),
    )  # fmt: skip
    fixed(h, downsample=tokenizer.downsample, out_channels=tokenizer.channels)
    params, _ = loaded(tokenizer, folder.weights, llamagen)

    @jax.jit
    def run(params, image, z, readout, tokens):
        call = lambda *args, method: tokenizer.apply({"params": params}, *args, method=method)  # noqa: E731
        latents = call(image, method="latents")
        quant, _, _ = call(latents, method="quantise")
        _, loss_index, losses = call(z, method="quantise")

        def objective(params, z):
            quant, _, losses = tokenizer.apply({"params": params}, z, method="quantise")
            return sum(losses.values()) + (quant * readout).sum()

        grad_params, grad_z = jax.grad(objective, argnums=(0, 1))(params, z)
        code_maps = call(tokens, method="embed").reshape(*folder.shape("code_entry")[:1], *tokenizer.grid, -1)
        return {
            "encoder_out": nchw(call(image, method=lambda self, x: self.encoder(x))),
            "pre_quant": nchw(latents),
            "quant": nchw(quant),
            "indices": call(image, method="encode"),
            "codebook_normalised": call(jnp.arange(tokenizer.codes)[None, :, None], method="embed"),
            "recon": nchw(call(image, method="autoencode")[0]),
            "decode_code_image": nchw(call(tokens, method="decode")),
            "code_entry": nchw(code_maps),
            "loss_indices": loss_index,
            "loss_vq": losses["codebook"],
            "loss_commit": losses["commit"],
            "loss_entropy": losses["entropy"],
            "loss_grad_z": nchw(grad_z),
            "loss_grad_codebook": grad_params["codebook"],
        }

    tokens = io["code_indices"].reshape(-1, tokenizer.spec.n, 1)
    return run(params, nhwc(io["image"]), nhwc(io["loss_z"]), nhwc(io["loss_readout"]), tokens)


def build(folder):
    """The generator and its parameters."""
    h = folder.h
    side = round(h["block_size"] ** 0.5)
    if h["model_type"] == "c2i":
        conditioning, info = Label(h["dim"]), Info(classes=h["num_classes"])
    else:
        conditioning = Caption(h["dim"])
        info = Info(captions=True, text_rows=h["cls_token_num"], text_width=h["caption_dim"])
    backbone = Transformer(
        layers=h["n_layer"], width=h["dim"], heads=h["n_head"], hidden=h["ffn_hidden"], base=h["rope_base"],
        eps=h["norm_eps"], dropout=0.1,
    )  # fmt: skip
    generator = Causal(backbone, conditioning).complete(TokenSpec(grid(side, side), codes=(h["vocab_size"],)), info)
    fixed(h, block_size=generator.spec.n)
    return generator, loaded(generator, folder.weights, llamagen)[0]


def teacher_forced(generator, batch, tokens, drop):
    """Logits [b n v], and per-rank losses and weights [b n]; of a bound generator."""
    order = raster(generator.spec)
    loss, weight, _ = generator.loss(tokens, batch, order, drop=drop)
    return generator.head(generator.hidden(tokens, generator.condition(batch, drop), order)), loss, weight


def greedy(generator, params, batch, scale, last=-1):
    """Argmax tokens [b n] from the library's own sampler."""
    knobs = constant_knobs(weights_of("constant", scale, raster(generator.spec), last), 0.0)
    return draws(generator, params, batch, raster, knobs, guided=scale > 1)[..., 0]


def cached(generator, params, batch, tokens):
    """Logits [2b n v] of cached decoding along given tokens [b n]: conditional rows first, then unconditional ones."""
    return along(generator, params, batch, raster, jnp.asarray(tokens)[..., None], logits)


def c2i(folder):
    h, io = folder.h, folder.io
    generator, params = build(folder)

    @jax.jit
    def run(params, labels, tokens, force_drop):
        call = lambda *args, method: generator.apply({"params": params}, *args, method=method)  # noqa: E731
        keep = jnp.zeros(len(labels), bool)
        out, loss, weight = call({"label": labels}, tokens[..., None], keep, method=teacher_forced)
        cond = call({"label": labels}, force_drop, method="condition")
        return {"tf_logits": out, "tf_loss": (loss * weight).sum() / weight.sum(), "label_embedding": cond.rows}

    labels = {"label": jnp.asarray(io["gen_labels"])}
    coords = np.concatenate([np.full((h["cls_token_num"], 3), NOWHERE), generator.spec.coords])[None]
    table = np.asarray(rotary(coords, h["dim"] // h["n_head"], h["rope_base"]))[:, 0, :, ::2]
    cached_logits = cached(generator, params, labels, io["gen_tokens"])
    scale, tokens = h["cfg_scale"], greedy(generator, params, labels, h["cfg_scale"])
    halves, given = np.split(cached_logits, 2), jnp.asarray(io["filter_logits"])
    both = lambda x: top_p(top_k(x, h["filter_both_top_k"]), h["filter_both_top_p"])  # noqa: E731
    return {
        **run(params, io["labels"], io["tokens"], jnp.asarray(io["force_drop"], bool)),
        "freqs_cis": np.moveaxis(table, 0, -1),
        "cached_logits": cached_logits,
        "cached_cfg_logits": fold(np.stack(halves, 1).reshape(-1, *halves[0].shape[1:]), 2, scale),
        "greedy_tokens": tokens,
        "greedy_path_logits": cached(generator, params, labels, tokens),
        "greedy_tokens_cfg_interval": greedy(generator, params, labels, scale, h["cfg_interval"]),
        "greedy_tokens_no_cfg": greedy(generator, params, labels, 1.0),
        "filter_topk": top_k(given, h["filter_top_k"]),
        "filter_topp": top_p(given, h["filter_top_p"]),
        "filter_both": both(given),
        "filter_topk_ties": top_k(jnp.asarray(io["filter_logits_ties"]), h["filter_top_k"]),
        "sample_probs": jax.nn.softmax(both(given / h["sample_temperature"])),
    }


def t2i(folder):
    h, io = folder.h, folder.io
    generator, params = build(folder)
    text, mask, tokens = jnp.asarray(io["text"]), jnp.asarray(io["text_mask"], bool), jnp.asarray(io["tokens"])
    batch, bare = {"text": text, "text_mask": mask}, {"text": text, "text_mask": jnp.ones_like(mask)}

    @jax.jit
    def run(params, batch, tokens, valid, force_drop):
        call = lambda *args, method: generator.apply({"params": params}, *args, method=method)  # noqa: E731
        keep = jnp.zeros(len(tokens), bool)
        out, loss, weight = call(batch | {"valid": valid}, tokens[..., None], keep, method=teacher_forced)
        dropped = call(batch, force_drop, method="condition")
        loss = (loss * weight).sum() / jnp.maximum(weight.sum(), 1)
        return {"tf_logits": out, "tf_loss": loss, "caption_embedding_dropped": dropped.rows}

    def attention_mask(batch):
        cond = generator.apply({"params": params}, batch, jnp.zeros(len(batch["text"]), bool), method="condition")
        step = np.append(cond.step, np.arange(1, generator.spec.n + 1, dtype=np.int32))
        valid = jnp.pad(cond.valid, ((0, 0), (0, generator.spec.n)), constant_values=True)
        return visible(step, step, valid=valid)

    valid, drop = jnp.asarray(io["valid"], jnp.float32), jnp.asarray(io["force_drop"], bool)
    some, some_bare = jax.tree.map(lambda x: x[: folder.shape("greedy_tokens")[0]], (batch, bare))
    greedy_tokens = greedy(generator, params, some, h["cfg_scale"])
    return {
        **run(params, batch, tokens, valid, drop),
        "attn_mask": attention_mask(batch),
        "tf_logits_plain_causal": run(params, bare, tokens, valid, drop)["tf_logits"],
        "greedy_tokens": greedy_tokens,
        "greedy_path_logits": cached(generator, params, some, greedy_tokens),
        "gen_attn_mask": np.concatenate([attention_mask(some)] * 2),
        "greedy_tokens_no_mask": greedy(generator, params, some_bare, h["cfg_scale"]),
    }


CASES = {"llamagen_vq": vq, "llamagen_gpt_c2i": c2i, "llamagen_gpt_t2i": t2i}
