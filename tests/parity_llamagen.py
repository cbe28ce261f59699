"""What each LlamaGen parity folder asks for, computed by the library from the folder's hyperparameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.convert import llamagen
from ar_jax.convert.names import to_params
from ar_jax.data import Info
from ar_jax.decode.guidance import interval
from ar_jax.decode.logits import top_k, top_p
from ar_jax.decode.sequential import Knobs, sample
from ar_jax.generators.causal import Causal
from ar_jax.nets.attention import visible
from ar_jax.nets.conditioning import Caption, Label, fold, paired
from ar_jax.nets.positions import NOWHERE, rotary
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec, grid


def nchw(x):
    return np.moveaxis(np.asarray(x), -1, 1)


def nhwc(x):
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def vq(meta, weights, io):
    h = meta["hyperparameters"]
    height, width = io["image"].shape[2:]
    tokenizer = VQGAN(
        size=(height, width), features=h["base_channels"], mult=tuple(h["encoder_ch_mult"]),
        decoder_mult=tuple(h["decoder_ch_mult"]), res_blocks=h["num_res_blocks"], latent=h["z_channels"],
        codes=h["codebook_size"], code_features=h["codebook_embed_dim"], groups=h["norm_num_groups"],
        l2_norm=h["codebook_l2_norm"], channels=h["in_channels"],
        vq=VectorLoss(commit=h["commit_loss_beta"], entropy=h["entropy_loss_ratio"], temperature=h["entropy_temperature"]),
    )  # fmt: skip
    shapes = jax.eval_shape(tokenizer.init_params, jax.random.key(0))
    params = to_params(weights, shapes, llamagen.vqgan_rules(tokenizer))
    call = functools.partial(tokenizer.apply, {"params": params})
    image, z, readout = nhwc(io["image"]), nhwc(io["loss_z"]), nhwc(io["loss_readout"])

    latents = call(image, method="latents")
    quant, _, _ = call(latents, method="quantise")
    tokens = jnp.asarray(io["code_indices"]).reshape(-1, tokenizer.spec.n, 1)
    _, loss_index, losses = call(z, method="quantise")

    def objective(params, z):
        quant, _, losses = tokenizer.apply({"params": params}, z, method="quantise")
        return sum(losses.values()) + (quant * readout).sum()

    grad_params, grad_z = jax.grad(objective, argnums=(0, 1))(params, z)
    return {
        "encoder_out": nchw(tokenizer.bind({"params": params}).encoder(image)),
        "pre_quant": nchw(latents),
        "quant": nchw(quant),
        "indices": call(image, method="encode").reshape(-1),
        "codebook_normalised": call(jnp.arange(tokenizer.codes)[None, :, None], method="embed")[0],
        "recon": nchw(call(image, method="autoencode")[0]),
        "decode_code_image": nchw(call(tokens, method="decode")),
        "code_entry": nchw(call(tokens, method="embed").reshape(len(tokens), *tokenizer.grid, -1)),
        "loss_indices": loss_index.reshape(-1),
        "loss_vq": losses["codebook"],
        "loss_commit": losses["commit"],
        "loss_entropy": losses["entropy"],
        "loss_grad_z": nchw(grad_z),
        "loss_grad_codebook": grad_params["codebook"],
    }


def build_gpt(meta, weights):
    h = meta["hyperparameters"]
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
    spec = TokenSpec(grid(side, side), codes=(h["vocab_size"],))
    generator = Causal(backbone, conditioning).complete(spec, info)
    shapes = jax.eval_shape(generator.init_params, jax.random.key(0))
    return generator, to_params(weights, shapes, llamagen.gpt_rules(generator))


def teacher_forced(generator, params, batch, tokens):
    """Logits [b n v] and per-rank losses [b n]."""
    order, drop, tokens = raster(generator.spec), jnp.zeros(len(tokens), bool), jnp.asarray(tokens)[..., None]

    def run(self):
        h = self.hidden(tokens, self.condition(batch, drop), order)
        return self.head(h), self.head.loss(h, tokens)

    return jax.jit(lambda p: generator.apply({"params": p}, method=run))(params)


def cached(generator, params, batch, tokens):
    """Logits [2b n v] of cached decoding along given tokens [b n]: conditional rows first, then unconditional ones."""
    generator, params = generator.unrolled(params)
    order, b = raster(generator.spec), len(tokens)
    call = functools.partial(generator.apply, {"params": params})
    cond, uncond = (call(batch, jnp.full(b, drop), method="condition") for drop in (False, True))
    cond = paired(cond, uncond)
    state = call(call(cond, order, b, method="begin"), generator.spec.n, cond, method="grow")
    state = state.replace(tokens=jnp.asarray(tokens)[..., None])

    def row(self, state, rank):
        h, cache = self.rows(state, rank, 1, cond, order)
        return self.head(h)[:, 0], state.replace(cache=cache)

    step = jax.jit(lambda state, rank: call(state, rank, method=row))
    rows = []
    for rank in range(generator.spec.n):
        logits, state = step(state, jnp.int32(rank))
        rows.append(logits)
    logits = jnp.stack(rows, axis=1)  # [2b n v], guided rows as neighbours
    return np.concatenate([logits[0::2], logits[1::2]])


def greedy(generator, params, batch, scale, last=-1):
    """Argmax tokens [b n] from the library's own sampler."""
    n, images = generator.spec.n, len(next(iter(batch.values())))
    generator, params = generator.unrolled(params)
    tokens = jax.jit(
        lambda params, batch: sample(
            generator,
            params,
            batch,
            raster(generator.spec),
            guided=scale > 1,
            knobs=Knobs(jnp.asarray(interval(scale, n, last)), jnp.zeros(n)),
            keys=jax.random.split(jax.random.key(0), images),
        )
    )(params, batch)
    return np.asarray(tokens[..., 0])


def c2i(meta, weights, io):
    h = meta["hyperparameters"]
    generator, params = build_gpt(meta, weights)
    logits, loss = teacher_forced(generator, params, {"label": jnp.asarray(io["labels"])}, io["tokens"])
    labels = {"label": jnp.asarray(io["gen_labels"])}
    head_dim = h["dim"] // h["n_head"]
    coords = np.concatenate([np.full((h["cls_token_num"], 3), NOWHERE), generator.spec.coords])[None]
    table = np.asarray(rotary(coords, head_dim, h["rope_base"]))[:, 0, :, ::2]
    cond = generator.apply({"params": params}, {"label": jnp.asarray(io["labels"])}, jnp.asarray(io["force_drop"], bool),
                           method="condition")  # fmt: skip
    cached_logits = cached(generator, params, labels, io["gen_tokens"])
    tokens = greedy(generator, params, labels, h["cfg_scale"])
    halves = np.split(cached_logits, 2)
    filter_logits = jnp.asarray(io["filter_logits"])
    both = top_p(top_k(filter_logits / h["sample_temperature"], h["filter_both_top_k"]), h["filter_both_top_p"])
    return {
        "freqs_cis": np.moveaxis(table, 0, -1),
        "tf_logits": logits,
        "tf_loss": loss.mean(),
        "label_embedding": cond.rows,
        "cached_logits": cached_logits,
        "cached_cfg_logits": fold(np.stack(halves, 1).reshape(-1, *halves[0].shape[1:]), 2, h["cfg_scale"]),
        "greedy_tokens": tokens,
        "greedy_path_logits": cached(generator, params, labels, tokens),
        "greedy_tokens_cfg_interval": greedy(generator, params, labels, h["cfg_scale"], h["cfg_interval"]),
        "greedy_tokens_no_cfg": greedy(generator, params, labels, 1.0),
        "filter_topk": top_k(filter_logits, h["filter_top_k"]),
        "filter_topp": top_p(filter_logits, h["filter_top_p"]),
        "filter_both": top_p(top_k(filter_logits, h["filter_both_top_k"]), h["filter_both_top_p"]),
        "filter_topk_ties": top_k(jnp.asarray(io["filter_logits_ties"]), h["filter_top_k"]),
        "sample_probs": jax.nn.softmax(both),
    }


def t2i(meta, weights, io):
    h = meta["hyperparameters"]
    generator, params = build_gpt(meta, weights)
    text, mask = jnp.asarray(io["text"]), jnp.asarray(io["text_mask"], bool)
    batch, bare = {"text": text, "text_mask": mask}, {"text": text, "text_mask": jnp.ones_like(mask)}
    logits, _ = teacher_forced(generator, params, batch, io["tokens"])
    drop = jnp.asarray(io["force_drop"], bool)
    dropped = generator.apply({"params": params}, batch, drop, method="condition")
    valid = batch | {"valid": jnp.asarray(io["valid"], jnp.float32)}
    tokens = jnp.asarray(io["tokens"])[..., None]
    rank_loss, weight, _ = generator.apply(
        {"params": params}, tokens, valid, raster(generator.spec), drop=jnp.zeros_like(drop), method="loss"
    )
    two, two_bare = jax.tree.map(lambda x: x[:2], (batch, bare))
    greedy_tokens = greedy(generator, params, two, h["cfg_scale"])

    def attention_mask(batch):
        cond = generator.apply({"params": params}, batch, jnp.zeros(len(batch["text"]), bool), method="condition")
        step = np.append(cond.step, np.arange(1, generator.spec.n + 1, dtype=np.int32))
        valid = jnp.pad(cond.valid, ((0, 0), (0, generator.spec.n)), constant_values=True)
        return visible(step, step, valid=valid)

    return {
        "attn_mask": attention_mask(batch),
        "tf_logits": logits,
        "tf_loss": (rank_loss * weight).sum() / jnp.maximum(weight.sum(), 1),
        "tf_logits_plain_causal": teacher_forced(generator, params, bare, io["tokens"])[0],
        "caption_embedding_dropped": dropped.rows,
        "greedy_tokens": greedy_tokens,
        "greedy_path_logits": cached(generator, params, two, greedy_tokens),
        "gen_attn_mask": np.concatenate([attention_mask(two)] * 2),
        "greedy_tokens_no_mask": greedy(generator, params, two_bare, h["cfg_scale"]),
    }


CASES = {"llamagen_vq": vq, "llamagen_gpt_c2i": c2i, "llamagen_gpt_t2i": t2i}
