"""What the parity folders of VAR, FlexVAR, HMAR and their schedules ask for, computed from the folders' hyperparameters."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity_llamagen import nchw
from parity_next_scale import independent_pyramid, residual_pyramid
from safetensors.numpy import load_file

from ar_jax.convert import flexvar, next_scale, var
from ar_jax.convert.names import to_params
from ar_jax.decode.logits import top_k, top_p
from ar_jax.decode.sequential import sample
from ar_jax.decode.settings import Sampling, arrange, make_knobs
from ar_jax.generators.causal import lognorm
from ar_jax.generators.hmar import Hmar
from ar_jax.generators.inputs import Upsampled
from ar_jax.nets.attention import visible
from ar_jax.nets.conditioning import fold, paired
from ar_jax.nets.positions import sine_grid
from ar_jax.orders import scales as by_scale
from ar_jax.tokens import TokenSpec, pyramid
from ar_jax.train.optim import Optim, decay_schedule, schedule


def build(h, weights, scales=()):
    """The generator of a state dict and its parameters."""
    shapes = {key: value.shape for key, value in weights.items()}
    generator = next_scale.build(
        "generator", shapes, size=0, heads=h["num_heads"], groups=0, scales=scales or tuple(h["patch_nums"])
    )
    shapes = jax.eval_shape(generator.init_params, jax.random.key(0))
    return generator, jax.tree.map(jnp.asarray, to_params(weights, shapes, next_scale.rules(generator)))


def frozen(tokenizer, weights, family):
    """The tokenizer's parameters, and its methods as one function."""
    shapes = jax.eval_shape(tokenizer.init_params, jax.random.key(0))
    params = jax.tree.map(jnp.asarray, to_params(weights, shapes, family.rules(tokenizer)))
    return params, functools.partial(tokenizer.apply, {"params": params})


def batch_of(labels):
    return {"label": jnp.asarray(labels)}


def teacher_forced(generator, params, tokens, labels, call):
    """Logits [b n v], and the loss as training weighs it."""
    order, tokens, batch = by_scale(generator.spec), jnp.asarray(tokens)[..., None], batch_of(labels)
    drop = jnp.zeros(len(tokens), bool)

    def run(self):
        logits = self.head(self.hidden(tokens, self.condition(batch, drop), order, call))
        loss, weight, _ = self.loss(tokens, batch, order, drop=drop, tokenizer=call)
        return logits, (loss * weight).sum() / weight.sum()

    return jax.jit(lambda p: generator.apply({"params": p}, method=run))(params)


def guided_cond(generator, params, labels):
    call = functools.partial(generator.apply, {"params": params})
    cond, uncond = (call(batch_of(labels), jnp.full(len(labels), drop), method="condition") for drop in (False, True))
    return paired(cond, uncond)


def halves(x):
    """Guided rows as neighbours to conditional ones first."""
    return np.concatenate([x[0::2], x[1::2]])


def drawn(generator, params, labels, call, tokenizer, settings):
    """Tokens [b n] of the library's own sampler."""
    generator, _ = arrange(settings, generator, tokenizer)
    order = by_scale(generator.spec)
    knobs, guided = make_knobs(settings, order, generator.spec.scales)
    unrolled, laid_out = generator.unrolled(params)
    tokens = jax.jit(
        lambda params: sample(
            unrolled, params, batch_of(labels), order, tokenizer=call, knobs=knobs, guided=guided,
            keys=jax.random.split(jax.random.key(0), len(labels)),
        )
    )(laid_out)  # fmt: skip
    return np.asarray(tokens[..., 0])


def cached(generator, params, labels, tokens, call):
    """Logits [2b n v] of the cached steps along given tokens [b n], conditional rows first."""
    order = by_scale(generator.spec)

    def run(params):
        cond = guided_cond(generator, params, labels)
        laid_out, params = generator.unrolled(params)
        apply = functools.partial(laid_out.apply, {"params": params})
        state = apply(cond, order, len(tokens), method="begin").replace(tokens=jnp.asarray(tokens)[..., None])
        parts, first = [], 0
        for size in order.sizes:
            state = apply(state, first + size, cond, method="grow")
            h, cache = apply(state, first, size, cond, order, call, method="rows")
            parts.append(apply(h, method=lambda self, h: self.head(h)))
            state, first = state.replace(cache=cache), first + size
        return jnp.concatenate(parts, axis=1)

    return halves(np.asarray(jax.jit(run)(params)))


def guided_logits(logits, knobs, sizes):
    """Folds [2b n v] with the weight of each rank's step."""
    both = np.stack(np.split(logits, 2), 1).reshape(-1, *logits.shape[1:])
    return fold(both, 2, np.repeat(knobs.guidance, sizes)[:, None])


def var_case(meta, weights, io):
    h = meta["hyperparameters"]
    generator, params = build(h, weights)
    tokenizer = residual_pyramid(h["vae"] | {"patch_nums": h["patch_nums"]})
    _, call = frozen(tokenizer, weights, var)
    spec, order = generator.spec, by_scale(generator.spec)
    logits, loss = teacher_forced(generator, params, io["tokens"], io["labels"], call)
    settings = Sampling(guidance=h["cfg"], guidance_rule="ramp", top_k=1)
    knobs, _ = make_knobs(settings, order, spec.scales)
    tokens = drawn(generator, params, io["gen_labels"], call, tokenizer, settings)
    raw = cached(generator, params, io["gen_labels"], tokens, call)
    filtered = jnp.asarray(io["filter_logits"])
    first = order.sizes[0]
    ids = jnp.asarray(tokens)[..., None]
    return {
        "level_index": spec.coords[:, 0],
        "attn_bias_finite": visible(order.step, order.step)[0],
        "tf_input": call(jnp.asarray(io["tokens"])[..., None], method="context")[:, first:],
        "tf_logits": logits,
        "tf_loss": loss,
        "gen_raw_logits": raw,
        "gen_cfg_logits": guided_logits(raw, knobs, order.sizes),
        "gen_tokens": tokens,
        "gen_fhat_per_scale": np.stack([nchw(x) for x in call(ids, method="sums")], 1),
        "gen_image": (nchw(call(ids, method="decode")) + 1) / 2,
        "cfg_schedule": knobs.guidance - 1,
        "filter_topk": top_k(filtered, h["filter_top_k"]),
        "filter_topp": top_p(filtered, h["filter_top_p"]),
        "filter_both": top_p(top_k(filtered, h["filter_both_top_k"]), h["filter_both_top_p"]),
    }


class Given(Upsampled):
    """Inputs that are given, whatever the tokens."""

    given: Any = None

    def context(self, tokens, order, tokenizer, first, size):
        return self.given


def flexvar_case(meta, weights, io):
    h = meta["hyperparameters"]
    generator, params = build(h, weights)
    scales, other = tuple(h["patch_nums"]), tuple(h["other_patch_nums"])
    tokenizer = independent_pyramid(h["vae"] | {"patch_nums": scales}, (scales[-1] * h["vae"]["downsample"],) * 2)
    tokenizer_params, _ = frozen(tokenizer, weights, flexvar)
    outputs = {"pos_init": sine_grid(h["position_grid"], h["embed_dim"])[:5, :6].transpose(2, 0, 1)}
    for name, some in (("a", scales), ("b", other)):
        net = generator.on(TokenSpec(pyramid(some), codes=generator.spec.codes))
        given = jnp.pad(jnp.asarray(io[f"input_{name}"]), ((0, 0), (some[0] ** 2, 0), (0, 0)))
        # the input is given, not the codes it is made of
        fields = {field: getattr(net.inputs, field) for field in ("channels", "levels", "width", "spec", "side")}
        fixed = net.clone(inputs=Given(given=given, **fields))
        logits, loss = teacher_forced(fixed, params, io[f"tokens_{name}"], io["labels"], print)
        outputs[f"tf_logits_{name}"], outputs[f"tf_loss_{name}"] = logits, loss
        outputs[f"pos_{name}"] = net.apply({"params": params}, method=lambda self: self.inputs.positions())[None]
    labels = io["gen_labels"]
    ramp = Sampling(guidance=h["cfg"], guidance_rule="ramp", guidance_reach=9, temperature=0.0)
    for name, settings in (
        ("ramp", ramp),
        ("flat", Sampling(guidance=h["cfg"], temperature=0.0)),
        ("other_scales", Sampling(**vars(ramp) | {"scales": other, "largest": h["max_pn_other"]})),
    ):
        net, decoder = arrange(settings, generator, tokenizer)
        calls = functools.partial(decoder.apply, {"params": tokenizer_params})
        tokens = drawn(generator, params, labels, calls, tokenizer, settings)
        order = by_scale(net.spec)
        knobs, _ = make_knobs(settings, order, net.spec.scales)
        raw = cached(net, params, labels, tokens, calls)
        outputs |= {
            f"gen_raw_logits_{name}": raw,
            f"gen_cfg_logits_{name}": guided_logits(raw, knobs, order.sizes),
            f"gen_tokens_{name}": tokens,
            f"gen_image_{name}": nchw(calls(jnp.asarray(tokens)[..., None], method="decode")),
        }
    return outputs


def hmar_case(meta, weights, io):
    h = meta["hyperparameters"]
    files = {entry["file"]: load_file(pathlib.Path(meta["folder"]) / entry["file"]) for entry in meta["weights"]}
    tokenizer = residual_pyramid(h["vae"])
    _, call = frozen(tokenizer, files["vae.safetensors"], var)
    order = None
    tokens, labels = jnp.asarray(io["tokens"])[..., None], io["labels"]
    drop = jnp.zeros(len(labels), bool)

    nsp, nsp_params = build(h, files["nsp.safetensors"])
    nsp = nsp.clone(backbone=nsp.backbone.clone(sees="step"))
    order, first = by_scale(nsp.spec), nsp.spec.scales[0][0] ** 2
    outputs = {
        "attn_bias_finite": visible(order.step, order.step, own=True)[0],
        "ns_input": call(tokens, method="context")[:, first:],
        "nsp_logits": teacher_forced(nsp, nsp_params, io["tokens"], labels, call)[0],
        "mask_input": call(tokens, method="own")[:, first:],
    }
    greedy = Sampling(guidance=h["cfg"], guidance_rule="ramp", temperature=0.0)
    made = drawn(nsp, nsp_params, io["gen_labels"], call, tokenizer, greedy)
    outputs["nsp_image"] = picture(call, made)
    outputs["nsp_gen_raw_logits"] = cached(nsp, nsp_params, io["gen_labels"], made, call)

    mp_weights = files["mp.safetensors"]
    alone = mp_weights | {"word_embed.bias": mp_weights["word_embed_bias"]}
    mp, mp_params = build(h, next_scale.merge(alone, mp_weights, h["n_layers_train"]))
    ends = np.cumsum([0, *order.sizes])
    picked = [start + io[f"mask_pick_{i}"] for i, start in enumerate(ends[:-1]) if f"mask_pick_{i}" in io]
    masked = np.zeros((1, order.n), bool)
    masked[0, np.concatenate(picked)] = True
    outputs["mask_positions"] = np.concatenate(picked) - first

    def run(self):
        cond = self.condition(batch_of(labels), drop)
        return self.mask_head(self.masked_hidden(tokens, masked, cond, order, call))

    outputs["mp_logits"] = jax.jit(lambda params: mp.apply({"params": params}, method=run))(mp_params)

    joint, params = build(h, files["weights.safetensors"])
    assert type(joint) is Hmar
    settings = Sampling(
        guidance=h["cfg"], guidance_rule="ramp", temperature=0.0, top_k=h["top_k"], top_p=h["top_p"],
    )  # fmt: skip
    for name, refine in (("hmar_", tuple(map(tuple, h["mask_schedule"]))), ("hmar_no_mask_", ())):
        net = joint.clone(refine=refine)
        made, scales, masks = watched_sampling(net, params, io["gen_labels"], call, settings)
        outputs |= {
            f"{name}ns_logits": scales,
            f"{name}tokens": made,
            f"{name}fhat_per_scale": np.stack([nchw(x) for x in call(made[..., None], method="sums")], 1),
            f"{name}image": picture(call, made),
        }
        if refine:
            outputs["hmar_mask_logits"] = masks
        np.testing.assert_array_equal(made, drawn(net, params, io["gen_labels"], call, tokenizer, settings))
    return outputs


def picture(call, tokens):
    return (nchw(call(jnp.asarray(tokens)[..., None], method="decode")) + 1) / 2


def watched_sampling(net, params, labels, call, settings):
    """Tokens of the library's steps, and the logits of both heads for guided rows, of scales and of redraws.

    The library redraws with the conditional rows only; here its function is given the unconditional ones too.
    """
    order = by_scale(net.spec)
    knobs, _ = make_knobs(settings, order, net.spec.scales)
    original = Hmar.masked_rows

    def run(params):
        apply, scales, masks = functools.partial(net.apply, {"params": params}), [], []
        cond = guided_cond(net, params, labels)
        state = apply(cond, order, len(labels), method="begin")
        keys = jax.random.split(jax.random.key(0), (len(labels), order.n))

        def watched(module, tokens, masked, _, *rest):
            h = original(module, jnp.repeat(tokens, 2, 0), jnp.repeat(masked, 2, 0), cond, *rest)
            masks.append(module.mask_head(h))
            return h[::2]

        def step(module, state, i, first, size):
            scales.append(module.head(module.rows(state, first, size, cond, order, call)[0]))
            return module.step(
                state, i, first, size, cond=cond, order=order, knobs=knobs, tokenizer=call,
                keys=keys[:, first : first + size],
            ), (scales, masks)  # fmt: skip

        Hmar.masked_rows, first = watched, 0
        try:
            for i, size in enumerate(order.sizes):
                scales, masks = [*scales], [*masks]
                state, (scales, masks) = apply(state, i, first, size, method=step)
                first += size
        finally:
            Hmar.masked_rows = original
        return state.tokens[..., 0], jnp.concatenate(scales, axis=1), masks and jnp.concatenate(masks, axis=1)

    tokens, scales, masks = jax.jit(run)(params)
    return np.asarray(tokens), halves(np.asarray(scales)), masks if net.refine == () else halves(np.asarray(masks))


def training_schedules(meta, weights, io):
    h = meta["hyperparameters"]
    steps = jnp.asarray(io["iterations"])
    v, c = h["var"], h["cosine"]
    common = {"lr": v["peak_lr"], "warmup": v["warmup"], "warmup_start": v["warmup_start_ratio"], "last": True,
              "end_lr": v["end_ratio"] * v["peak_lr"]}  # fmt: skip

    def rates(total, **settings):
        return jax.vmap(schedule(Optim(**settings), total))(steps)

    decay = Optim(weight_decay=v["weight_decay"], weight_decay_end=v["weight_decay_end"])
    spec = TokenSpec(pyramid(tuple(h["patch_nums"])))
    return {
        "var_lr_lin0": rates(v["total"], schedule="linear", hold=0.05, **common),
        "var_lr_lin": rates(v["total"], schedule="linear", hold=0.15, **common),
        "var_lr_cos": rates(v["total"], schedule="cosine", **common),
        "var_weight_decay": jax.vmap(decay_schedule(decay, v["total"]))(steps),
        "cosine_lr": rates(c["total"], lr=c["base_lr"], warmup=c["warmup"], schedule="cosine", end_lr=c["end_lr"]),
        "hmar_loss_weight_lognorm": lognorm(spec),
        "hmar_loss_weight_equal": np.concatenate([np.full(h * w, 1 / (h * w)) for h, w in spec.scales]),
    }


CASES = {
    "var": var_case,
    "var_shared_adaln": var_case,
    "flexvar": flexvar_case,
    "hmar": hmar_case,
    "training_schedules": training_schedules,
}
LATER = {"rar_random_ratio"}  # outputs of methods that are not here yet
