"""What the parity folders of continuous tokens ask for, computed from the folders' hyperparameters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from parity_llamagen import nchw, nhwc

from ar_jax.convert import mar
from ar_jax.convert.names import to_params, to_weights
from ar_jax.data import Info
from ar_jax.decode.guidance import linear
from ar_jax.decode.sequential import Knobs
from ar_jax.generators.causal import Causal
from ar_jax.generators.masked import Masked
from ar_jax.generators.maskgit import MaskGIT, lowest, mask_ratio
from ar_jax.heads.diffusion import Chain, Diffusion, cosine_betas, kept_steps
from ar_jax.heads.gaussian_mixture import GaussianMixture, Guided
from ar_jax.heads.integrate import annealed
from ar_jax.nets.conditioning import Label, fold, paired
from ar_jax.nets.mlp import sinusoids
from ar_jax.nets.vit import GPT, ViT
from ar_jax.orders import Order, cosine_sizes, raster, rooms, scan_steps, to_ranks, to_slots
from ar_jax.tokenizers.continuous import draw, kl_divergence, patchify
from ar_jax.tokenizers.givt_vae import GivtVAE
from ar_jax.tokenizers.kl_vae import KLVAE
from ar_jax.tokens import TokenSpec, grid


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


class Given(Diffusion):
    """Takes noise from a table [images ranks 1+steps c]; a key's two words are image and rank."""

    table: Any = None

    def noise(self, keys, s):
        image, rank = jnp.moveaxis(jax.random.key_data(keys), -1, 0)
        return jnp.asarray(self.table)[image, rank, s]


def numbered(images, ranks):
    """Keys for `Given`, [b m]."""
    image, rank = jnp.broadcast_arrays(jnp.arange(images)[:, None], jnp.asarray(ranks)[None])
    return jax.random.wrap_key_data(jnp.stack([image, rank], -1).astype(jnp.uint32))


def build_mar(meta, weights, **head):
    h = meta["hyperparameters"]
    side = h["img_size"] // h["vae_stride"] // h["patch_size"]
    width = h["encoder_embed_dim"]
    generator = Masked(
        ViT(h["encoder_depth"], width, h["encoder_num_heads"]),
        ViT(h["decoder_depth"], h["decoder_embed_dim"], h["decoder_num_heads"]),
        Label(width, apart=True),
        Given(h["diffloss_w"], h["diffloss_d"], multiplier=h.get("diffusion_batch_mul", 4), **head),
        buffer=h["buffer_size"],
    ).complete(TokenSpec(grid(side, side), channels=h["vae_embed_dim"]), Info(classes=h["class_num"]))
    return generator, *with_params(generator, weights, mar.generator_rules(generator))


def with_head(generator, **fields):
    return generator.clone(head=generator.head.clone(**fields))


def sampled(generator, params, io, name, labels, steps, scale, schedule, temperature):
    """What MAR's sampler gives for the given orders and noise; runs the library's steps in few padded scans."""
    n, channels, images = generator.spec.n, generator.spec.channels, len(labels)
    sizes = cosine_sizes(n, steps)
    slot = np.asarray(io[f"{name}.orders"], np.int32)[:, ::-1]
    order = Order(slot, sizes, rooms(sizes, 2))
    first = np.cumsum(sizes) - sizes
    rows = [np.argsort(slot[:, f : f + size], axis=1) for f, size in zip(first, sizes)]  # by place in the image
    longest = max(len(io[f"{name}.iter{i}.step_noise"]) for i in range(steps))
    table = np.zeros((images, n, 1 + longest, channels), np.float32)
    for i, (f, size) in enumerate(zip(first, sizes)):
        start, more = io[f"{name}.iter{i}.init_noise"], io[f"{name}.iter{i}.step_noise"]
        noise = np.concatenate([start[None], more[:, : len(start)]]).reshape(1 + len(more), images, size, channels)
        for b in range(images):
            table[b, f + rows[i][b], : 1 + len(more)] = noise[:, b].swapaxes(0, 1)
    generator = with_head(generator, table=table)
    call = functools.partial(generator.apply, {"params": params})
    weight = linear(scale, sizes) if schedule == "linear" else np.full(steps, scale, np.float32)
    knobs = Knobs(weight, np.full(steps, temperature, np.float32))
    batch = {"label": jnp.asarray(labels, jnp.int32)}
    cond, uncond = (call(batch, jnp.full(images, drop), method="condition") for drop in (False, True))
    cond = cond if scale == 1 else paired(cond, uncond)

    @jax.jit
    def run(cond):
        def step(state, i, first, size):
            keys = numbered(images, jnp.minimum(first + jnp.arange(size), n - 1))
            return call(state, i, first, size, cond=cond, order=order, knobs=knobs, keys=keys, method="step")

        grow = lambda state, ranks: call(state, ranks, cond, method="grow")  # noqa: E731
        state = call(cond, order, images, method="begin")
        return scan_steps(sizes, step, state, rooms=order.rooms, grow=grow).tokens

    tokens = run(cond)
    place = np.argsort(slot, axis=1)
    hidden = jax.jit(lambda tokens, known: call(tokens, known, cond, order, method="hidden"))
    outputs = {
        f"{name}.cfg_per_iter": weight,
        f"{name}.mask_per_iter": np.stack([place >= f for f in first]),
        f"{name}.latents": nchw(to_slots(tokens, order).reshape(images, *grid_of(generator), channels)),
    }
    for i, (f, size) in enumerate(zip(first, sizes)):
        z = np.asarray(hidden(tokens, jnp.int32(f)))[:, f : f + size]
        ways = [np.take_along_axis(z[w :: len(z) // images], rows[i][..., None], 1) for w in range(len(z) // images)]
        outputs[f"{name}.iter{i}.z"] = np.concatenate([way.reshape(images * size, -1) for way in ways])
    return outputs


def grid_of(generator):
    return tuple(generator.spec.coords.max(0)[1:] + 1)


def mar_generator(meta, weights, io):
    h = meta["hyperparameters"]
    generator, params, call = build_mar(meta, weights, steps=h["num_sampling_steps"])
    tokens = patchify(nhwc(io["latents"]), h["patch_size"])
    images, n = tokens.shape[:2]
    slot = np.asarray(io["orders"], np.int32)[:, ::-1]
    order = Order(slot, (1,) * n)
    mask = np.asarray(io["mask"], bool)
    known = int(n - mask[0].sum())
    batch = {"label": jnp.asarray(io["labels"], jnp.int32)}
    inside = functools.partial(to_ranks(tokens, order).__getitem__, (slice(None), slice(known)))

    def z_of(self, drop):
        return to_slots(self.hidden(inside(), jnp.int32(known), self.condition(batch, drop), order), order)

    cond = call(batch, jnp.zeros(images, bool), method="condition")
    encoded = np.asarray(call(inside(), known, cond, order, method="encode"))
    by_place = np.argsort(slot[:, :known], axis=1)[..., None]
    buffer = h["buffer_size"]
    kept = np.concatenate([encoded[:, :buffer], np.take_along_axis(encoded[:, buffer:], by_place, axis=1)], 1)

    drop = jnp.asarray(io["train.label_drop_uniform"] < h["label_drop_prob"])
    t = jnp.asarray(io["train.t"], jnp.int32).reshape(-1, images, n).swapaxes(0, 1)
    noise = jnp.asarray(io["train.noise"]).reshape(-1, *tokens.shape).swapaxes(0, 1)

    def objective(params):
        def run(self):
            z = z_of(self, drop)
            return z, self.head.errors(z, tokens, t, noise)

        z, (square, bound) = generator.apply({"params": params}, method=run)
        loss = ((square + bound).mean(1) * mask).sum() / mask.sum()
        return loss, (z, square, bound)

    (loss, (z, square, bound)), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    grads = to_weights(grads, mar.generator_rules(generator))

    def net(x, t, c):
        return generator.apply({"params": params}, method=lambda self: self.head.net(x, jnp.asarray(t, jnp.float32), c))

    x, t, c = (jnp.asarray(io[f"head.{name}"]) for name in "xtc")
    half, channels = len(x) // 2, x.shape[-1]
    both = net(jnp.concatenate([x[:half]] * 2), t, c)
    neighbours = jnp.stack([both[:half], both[half:]], 1).reshape(2 * half, -1)
    guided = jnp.concatenate([fold(neighbours[:, :channels], 2, 2.5)] * 2)

    kept_few = kept_steps(h["num_sampling_steps"])
    index = np.asarray(io["step.t_index"])
    chain = Chain.of(kept_few).at(index[:, None])
    x_t, step_noise = jnp.asarray(io["step.x"]), jnp.asarray(io["step.noise"])
    eps, variance = jnp.split(net(x_t, kept_few[index], jnp.asarray(io["step.c"])), 2, axis=-1)
    clean = chain.clean(x_t, eps)
    mean, log_variance = chain.mean(x_t, clean), chain.log_variance(variance)
    temperature = 0.9 * (index > 0)[:, None]

    loop_noise = np.concatenate([io["loop.init_noise"][None], io["loop.step_noise"]]).swapaxes(0, 1)[:, None]
    plain = with_head(generator, steps=h["plain_respacing"], table=loop_noise)
    knobs = Knobs(np.ones(1, np.float32), np.ones(1, np.float32))
    z_rows = jnp.asarray(io["loop.z"])[:, None]
    looped = plain.apply(
        {"params": params}, method=lambda self: self.head.sample(z_rows, numbered(len(z_rows), [0]), knobs, 0)
    )
    everything = Chain.of(np.arange(1000))
    return {
        "tokens": tokens,
        "encoder_out": kept,
        "z": call(jnp.zeros(images, bool), method=z_of),
        "train.z": z,
        "train.mse_rows": square.swapaxes(0, 1),
        "train.vb_rows": bound.swapaxes(0, 1),
        "train.loss": loss,
        **{f"train.grad.{key}": value for key, value in grads.items()},
        "head.timestep_embedding": sinusoids(jnp.asarray(t, jnp.float32)),
        "head.out": net(x, t, c),
        "head.out_cfg": jnp.concatenate([guided, both[:, channels:]], axis=1),
        "sched.betas": cosine_betas(),
        "sched.alphas_cumprod": everything.kept,
        "sched.posterior_log_variance_clipped": everything.log_posterior,
        **{f"sched.timesteps[{spacing}]": kept_steps(spacing) for spacing in ("4,1", "5", "100", "ddim25")},
        "sched.spaced_betas": np.exp(Chain.of(kept_steps(h["plain_respacing"])).log_beta),
        "step.mean": mean,
        "step.log_variance": log_variance,
        "step.pred_xstart": clean,
        "step.sample": mean + temperature * jnp.exp(0.5 * log_variance) * step_noise,
        "loop.out": looped,
        **sampled(generator, params, io, "sample.linear", io["sample.labels"], 5, 2.7, "linear", 0.93),
        **sampled(generator, params, io, "sample.constant", io["sample.labels"], 3, 1.8, "constant", 1.0),
        **sampled(generator, params, io, "sample.nocfg", io["sample.labels"], 2, 1.0, "linear", 1.0),
    }


def disa_mar(meta, weights, io):
    h = meta["hyperparameters"]
    upper, lower, clip, clip_ddim = (
        h[name] for name in ("diff_upper_steps", "diff_lower_steps", "clip_timesteps", "clip_timesteps_ddim")
    )
    generator, params, _ = build_mar(meta, weights, last_steps=lower)
    outputs = {
        "table.actual_steps_for_request_5_to_50": [len(kept_steps(str(n), clip)) for n in range(5, 51)],
        "table.timesteps_50": kept_steps("50", clip),
        "table.timesteps_5": kept_steps("5", clip),
        "table.betas_5": np.exp(Chain.of(kept_steps("5", clip)).log_beta),
        "table.timesteps_ddim13": kept_steps("ddim13", clip_ddim),
        **{
            f"table.{rule.replace('_', '-')}.requested_steps": annealed(rule, 50, 5, 64)
            for rule in ("linear", "cosine", "two_stage")
        },
        "table.constant.requested_steps": annealed("constant", 5, 5, 64),  # theirs takes the smaller number
    }
    plain = {"steps": str(upper), "latest": clip}
    for name, head, steps, scale, temperature in (
        ("linear", plain | {"anneal": "linear"}, 5, 2.4, 1.0),
        ("cosine", plain | {"anneal": "cosine"}, 4, 1.0, 0.9),
        ("ddim", {"steps": f"ddim{upper}", "latest": clip_ddim, "anneal": "linear", "sampler": "ddim"}, 3, 1.0, 1.0),
    ):
        annealing = with_head(generator, **head)
        outputs |= sampled(annealing, params, io, f"sample.{name}", io["labels"], steps, scale, "linear", temperature)
        _, which, lengths = annealing.head.chains(steps)
        outputs[f"sample.{name}.diffusion_steps_per_iter"] = lengths[which]
    return outputs


def givt_params(weights, projection):
    """Our tree from GIVT's own layout: kernels [in ... out], layers on the second axis.

    Args:
      projection: path of the tokens' projection.
    """
    w = {name: jnp.asarray(value) for name, value in weights.items()}
    layer = lambda name: jnp.moveaxis(w[f"decoder/EncDecBlock/{name}"], 1, 0)  # noqa: E731
    qkv = jnp.stack([layer(f"SelfAttn/{name}/kernel") for name in ("query", "key", "value")], axis=-2)  # [l d h 3 e]
    out = layer("SelfAttn/out/kernel")
    leaves = {
        "conditioning/embedding": w["EmbedLabels/embedding"],
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
    return traverse_util.unflatten_dict(leaves, sep="/")


def mixtures(meta, io, logits, uncond, head, cfg):
    """Densities and guided samples of GIVT's head from its raw outputs."""
    temperature, sharpness = 0.95, 1.1
    pdf, without = (head.mixture(jnp.asarray(x)) for x in (logits, uncond))
    hot, hot_without = (x.replace(scale=x.scale * temperature) for x in (pdf, without))
    index = jnp.asarray(io["guided.component"])
    mean, scale = hot.component(index)
    guided = Guided(mean, scale, *hot_without.component(index), jnp.float32(1 + cfg))
    normals, uniforms = jnp.asarray(io["guided.proposal_normal"]), jnp.asarray(io["guided.uniform"])
    x, accepted = jax.jit(
        lambda guided: guided.draw(
            lambda j: (normals[j], uniforms[j]), mean + scale * jnp.asarray(io["guided.fallback_normal"]), len(normals)
        )
    )(guided)
    return {
        "mixture_probs": jax.nn.softmax(pdf.logits * sharpness),
        "locs": pdf.mean,
        "scales": hot.scale,
        "log_prob": pdf.log_density(jnp.asarray(io["sequence"])),
        "guided.log_bound": guided.log_bound(),
        "guided.sample": x,
        "guided.success_percent": 100 * accepted.mean(),
        "guided.log_prob": guided.log_density(x),
    }


def givt_ar(meta, weights, io):
    h = meta["hyperparameters"]
    n, channels, width = h["seq_len"], h["out_dim"], h["emb_dim"]
    side = round(n**0.5)
    spec, info = TokenSpec(grid(side, side), channels=channels), Info(classes=h["num_labels"])
    generator = Causal(
        GPT(h["num_decoder_layers"], width, h["num_heads"], hidden=h["mlp_dim"], rows=n),
        Label(width),
        GaussianMixture(h["num_mixtures"]),
    ).complete(spec, info)
    params = givt_params(weights, "inputs/projection")
    shapes = jax.eval_shape(generator.init_params, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    call = functools.partial(generator.apply, {"params": params})
    tokens, order = jnp.asarray(io["sequence"]), raster(spec)
    batch, drop = {"label": jnp.asarray(io["labels"], jnp.int32)}, jnp.asarray(io["drop_labels"], bool)

    def raw(self, drop):
        return self.head.readout(self.hidden(tokens, self.condition(batch, drop), order))

    logits, uncond = (jax.jit(lambda d: call(d, method=raw))(d) for d in (drop, jnp.ones_like(drop)))
    loss, weight, _ = call(tokens, batch, order, drop=drop, method="loss")

    decoder, laid_out = generator.unrolled(params)
    step = functools.partial(decoder.apply, {"params": laid_out})
    cond = step(batch, jnp.zeros_like(drop), method="condition")
    state = step(step(cond, order, len(tokens), method="begin"), n, cond, method="grow").replace(tokens=tokens)

    def row(self, state, rank):
        rows, cache = self.rows(state, rank, 1, cond, order)
        return self.head.readout(rows)[:, 0], state.replace(cache=cache)

    one, cached = jax.jit(lambda state, rank: step(state, rank, method=row)), []
    for rank in range(n):
        out, state = one(state, jnp.int32(rank))
        cached.append(out)
    return {
        "logits": logits,
        "logits_uncond": uncond,
        "loss": (loss * weight).sum() / weight.sum(),
        "cached_logits": jnp.stack(cached, 1),
        **mixtures(meta, io, logits, uncond, generator.head, h["cfg_w"]),
    }


def givt_masked(meta, weights, io):
    h = meta["hyperparameters"]
    n, channels, width, labels = h["seq_len"], h["out_dim"], h["emb_dim"], h["num_labels"]
    side = round(n**0.5)
    spec, info = TokenSpec(grid(side, side), channels=channels), Info(classes=labels)
    generator = MaskGIT(
        GPT(h["num_decoder_layers"], width, h["num_heads"], hidden=h["mlp_dim"], rows=0),
        Label(width),
        GaussianMixture(h["num_mixtures"]),
        most=1 - h["min_masking_rate_training"],
    ).complete(spec, info)
    table = weights["EmbedLabels/embedding"]  # classes, three signs, no class
    classes = np.concatenate([table[:labels], table[labels + 3 :]])
    params = givt_params(weights | {"EmbedLabels/embedding": classes}, "projection") | {"signs": table[labels:][:3]}
    shapes = jax.eval_shape(generator.init_params, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    tokens, hidden = jnp.asarray(io["sequence"]), jnp.asarray(io["input_mask"], bool)
    batch, drop = {"label": jnp.asarray(io["labels"], jnp.int32)}, jnp.asarray(io["drop_labels"], bool)

    @jax.jit
    def rows(drop):
        return generator.apply(
            {"params": params}, drop, method=lambda self, drop: self.hidden(tokens, hidden, self.condition(batch, drop))
        )

    readout = functools.partial(generator.apply, {"params": params}, method=lambda self, rows: self.head.readout(rows))
    score = jnp.log(io["select.probs"]) + 3.0 * io["select.gumbel"]
    logits, uncond = readout(rows(drop)), readout(rows(jnp.ones_like(drop)))
    loss = -generator.head.mixture(logits).log_density(tokens)
    return {
        "logits": logits,
        "logits_uncond": uncond,
        "loss": (loss * hidden).sum() / hidden.sum(),
        "select.mask": lowest(score, 8),
        "schedule.mask_ratio": mask_ratio(jnp.asarray(io["schedule.ratio"])),
        **mixtures(meta, io, logits, uncond, generator.head, h["cfg_w"]),
    }


def givt_vae(meta, weights, io):
    h = meta["hyperparameters"]
    vae = GivtVAE(
        size=(h["image_size"],) * 2, features=h["filters"], mult=tuple(h["channel_multipliers"]),
        res_blocks=h["num_res_blocks"], latent=h["codeword_dim"], groups=h["norm_groups"],
    )  # fmt: skip
    params = traverse_util.unflatten_dict({name.removeprefix("cnn_"): x for name, x in weights.items()}, sep="/")
    shapes = jax.eval_shape(vae.init_params, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    call = functools.partial(vae.apply, {"params": params})
    mean, logvar = (
        x.reshape(len(x), -1, h["codeword_dim"]) for x in call(jnp.asarray(io["image"]), method="posterior")
    )
    z = draw(mean, logvar, jnp.asarray(io["noise"]))
    return {"mu": mean, "logvar": logvar, "z": z, "recon": call(z, method="decode")}


CASES = {
    "kl16_vae": kl16_vae,
    "mar": mar_generator,
    "disa_mar": disa_mar,
    "givt_ar": givt_ar,
    "givt_masked": givt_masked,
    "givt_vae": givt_vae,
}
