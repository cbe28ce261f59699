"""HMAR: both predictors, the joint model, and its sampler."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.common import begin, by_settings, by_way, fixed, guided_rows, loaded, step_of
from parity.var import batch_of, build, drawn, looks, residual_pyramid, stepped, teacher_forced

from ar_jax.convert import next_scale, var
from ar_jax.generators.base import Setting
from ar_jax.generators.hmar import Hmar
from ar_jax.nets.attention import visible
from ar_jax.orders import scales as by_scale


def hmar(folder):
    h, io, files = folder.h, folder.io, folder.files
    fixed(h["vae"], patch_nums=h["patch_nums"])
    tokenizer = residual_pyramid(h["vae"])
    frozen, call = loaded(tokenizer, files["vae.safetensors"], var)
    tokens, labels = jnp.asarray(io["tokens"])[..., None], io["labels"]
    generate = functools.partial(by_settings, tokenizer=tokenizer, order=by_scale, guidance=h["cfg"])

    scales, scale_params = build(folder, files["nsp.safetensors"])
    scales = scales.clone(backbone=scales.backbone.clone(sees="step"))
    drawing = generate(scales)
    order, first = drawing.order, drawing.order.sizes[0]
    made = drawn(drawing, scale_params, frozen, io["gen_labels"])
    outputs = {
        "attn_bias_finite": visible(order.step, order.step, own=True)[0],
        "ns_input": call(tokens, method="context")[:, first:],
        "nsp_logits": teacher_forced(scales, scale_params, io["tokens"], labels, tokenizer, frozen)[0],
        "mask_input": call(tokens, method="own")[:, first:],
        "nsp_image": looks(tokenizer, frozen, made)[1],
        "nsp_gen_raw_logits": stepped(drawing, scale_params, frozen, io["gen_labels"], made),
    }

    alone = dict(files["mp.safetensors"])
    merged = next_scale.merge(alone | {"word_embed.bias": alone["word_embed_bias"]}, alone, h["n_layers_train"])
    masks, mask_params = build(folder, merged)
    ends = np.cumsum([0, *order.sizes])
    picked = [start + io[f"mask_pick_{i}"] for i, start in enumerate(ends[:-1]) if f"mask_pick_{i}" in io]
    masked = np.zeros((1, order.n), bool)
    masked[0, np.concatenate(picked)] = True
    outputs["mask_positions"] = np.concatenate(picked) - first

    @jax.jit
    def redrawn(params, tokens):
        def run(self):
            cond = self.condition(batch_of(labels), jnp.zeros(len(labels), bool))
            return self.mask_head(self.masked_hidden(tokens, masked, cond, order, call))

        return masks.apply({"params": params}, method=run)

    outputs["mp_logits"] = redrawn(mask_params, tokens)

    joint, params = build(folder, folder.weights)
    assert type(joint) is Hmar
    assert h["mask_refinement_cfg_ratio"] < 1e-5, "the library redraws without guidance"
    joint = generate(joint.clone(refine=tuple(map(tuple, h["mask_schedule"]))), top_k=h["top_k"], top_p=h["top_p"])
    once = dataclasses.replace(joint, generator=joint.generator.clone(refine=()))
    made, scales, redraws = watched(joint, params, io["gen_labels"], call)
    np.testing.assert_array_equal(made, drawn(joint, params, frozen, io["gen_labels"]))
    made_once = drawn(once, params, frozen, io["gen_labels"])
    outputs["hmar_mask_logits"] = redraws
    outputs["hmar_ns_logits"] = scales
    outputs["hmar_no_mask_ns_logits"] = stepped(once, params, frozen, io["gen_labels"], made_once)
    for name, tokens in (("hmar_", made), ("hmar_no_mask_", made_once)):
        sums, image = looks(tokenizer, frozen, tokens)
        outputs |= {f"{name}tokens": tokens, f"{name}fhat_per_scale": sums, f"{name}image": image}
    return outputs


def watched(drawing, params, labels, call):
    """Tokens of the library's steps, and the logits of both heads for guided rows, of scales and of redraws.

    The library redraws with the conditional rows only; here its function is given the unconditional ones too.
    """
    net, order, knobs = drawing.generator, drawing.order, drawing.knobs
    rows, masked_rows = Hmar.rows, Hmar.masked_rows

    @jax.jit
    def run(params):
        cond = guided_rows(net, params, batch_of(labels))
        setting = Setting(cond, order, knobs, call)
        keys = jax.random.split(jax.random.key(0), (len(labels), order.n))

        def watched(module):
            scales, masks = [], []

            def watched_rows(module, *rest):
                h, cache = rows(module, *rest)
                scales.append(module.head(h))
                return h, cache

            def watched_masked_rows(module, tokens, masked, _, *rest):
                h = masked_rows(module, jnp.repeat(tokens, 2, 0), jnp.repeat(masked, 2, 0), cond, *rest)
                masks.append(module.mask_head(h))
                return h[::2]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Hmar, "rows", watched_rows)
                patch.setattr(Hmar, "masked_rows", watched_masked_rows)
                state, first = begin(module, setting, len(labels)), 0
                for i, size in enumerate(order.sizes):
                    state = step_of(module, state, i, first, keys[:, first : first + size], setting)
                    first += size
            return state.tokens, jnp.concatenate(scales, axis=1), jnp.concatenate(masks, axis=1)

        return net.apply({"params": params}, method=watched)

    tokens, scales, masks = map(np.asarray, run(params))
    return tokens, by_way(scales), by_way(masks)


CASES = {"hmar": hmar}
