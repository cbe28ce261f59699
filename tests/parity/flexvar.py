"""FlexVAR: its tokenizer and its transformer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import by_settings, fixed, loaded, nchw, nhwc
from parity.var import build, drawn, guided_logits, scales_of, stepped, teacher_forced

from ar_jax.convert import flexvar
from ar_jax.convert.next_scale import FLEXVAR_SAMPLING
from ar_jax.generators.inputs import Upsampled
from ar_jax.nets.positions import sine_grid
from ar_jax.orders import scales as by_scale
from ar_jax.tokenizers.pyramid import Pyramid
from ar_jax.tokens import TokenSpec, maps, pyramid


def independent_pyramid(h, size, scales):
    """FlexVAR's tokenizer with a folder's sizes, for images of a size."""
    tokenizer = Pyramid(
        size=size, scales=scales, features=h["base_channels"], mult=tuple(h["encoder_ch_mult"]),
        decoder_mult=tuple(h["decoder_ch_mult"]), res_blocks=h["num_res_blocks"], latent=h["z_channels"],
        codes=h["codebook_size"], code_features=h["codebook_embed_dim"], groups=h["norm_num_groups"],
        l2_norm=h["codebook_l2_norm"],
    )  # fmt: skip
    fixed(h, downsample=tokenizer.downsample)
    return tokenizer


def tokenizer(folder):
    module = independent_pyramid(folder.h, folder.shape("image")[2:], scales_of(folder.h))
    params, _ = loaded(module, folder.weights, flexvar)
    decoded = folder.outputs("multi_scale_image.")

    @jax.jit
    def run(params, image):
        call = lambda *args, method, net=module: net.apply({"params": params}, *args, method=method)  # noqa: E731
        tokens = call(image, method="encode")
        first = int(np.prod(module.spec.scales[0]))
        outputs = {
            "continuous_latent": nchw(call(image, method="latents")),
            "train_input": call(tokens, method="context")[:, first:],
            "train_indices": tokens[..., 0],
        }
        codes = maps(call(tokens, method="embed"), module.scales)
        for scale, index, code in zip(module.scales, maps(tokens, module.scales), codes):
            outputs[f"multi_scale_quant.{scale}"] = nchw(code)
            if str(scale) in decoded:
                alone, index = module.clone(scales=(scale,)), index.reshape(len(index), -1, 1)
                outputs[f"multi_scale_image.{scale}"] = nchw(call(index, method="decode", net=alone))
        return outputs

    return run(params, nhwc(folder.io["image"]))


class Given(Upsampled):
    """Inputs that are given, whatever the tokens."""

    given: Any = None

    def context(self, tokens, order, tokenizer, first, size):
        return self.given


def transformer(folder):
    h, io = folder.h, folder.io
    generator, params = build(folder, folder.weights)
    scales, other = tuple(h["patch_nums"]), tuple(h["other_patch_nums"])
    vae = independent_pyramid(h["vae"], (scales[-1] * h["vae"]["downsample"],) * 2, scales)
    frozen, _ = loaded(vae, folder.files["vae.safetensors"], flexvar)
    fixed(h, position_grid=generator.inputs.side)
    _, _, height, width = folder.shape("pos_init")
    outputs = {"pos_init": sine_grid(h["position_grid"], h["embed_dim"])[:height, :width].transpose(2, 0, 1)}
    for name, some in (("a", scales), ("b", other)):
        net = generator.on(TokenSpec(pyramid(some), codes=generator.spec.codes))
        given = jnp.pad(jnp.asarray(io[f"input_{name}"]), ((0, 0), (some[0] ** 2, 0), (0, 0)))
        # the input is given, not the codes it is made of
        fields = {field: getattr(net.inputs, field) for field in ("channels", "levels", "width", "spec", "side")}
        fixed_inputs = net.clone(inputs=Given(given=given, **fields))
        out, loss = teacher_forced(fixed_inputs, params, io[f"tokens_{name}"], io["labels"])
        outputs[f"tf_logits_{name}"], outputs[f"tf_loss_{name}"] = out, loss
        outputs[f"pos_{name}"] = net.apply({"params": params}, method=lambda self: self.inputs.positions())[None]
    for case in folder.of("FlexVAR.autoregressive_infer_cfg"):
        name = next(output for output in case.outputs if output.startswith("gen_tokens_")).removeprefix("gen_tokens_")
        settings = {"ramp": "flat" not in case.function, "guidance": h["cfg"]}
        if settings["ramp"]:
            settings["reach"] = FLEXVAR_SAMPLING.guidance.reach
        if "scales other_patch_nums" in case.function:
            settings["scales"] = other
        if "max_pn as in the hyperparameters" in case.function:
            settings["largest"] = h["max_pn_other"]
        drawing = by_settings(generator, vae, by_scale, **settings)
        tokens = drawn(drawing, params, frozen, io["gen_labels"])
        raw = stepped(drawing, params, frozen, io["gen_labels"], tokens)
        decode = jax.jit(
            lambda frozen, tokens, net=drawing.tokenizer: net.apply({"params": frozen}, tokens, method="decode")
        )
        outputs |= {
            f"gen_raw_logits_{name}": raw,
            f"gen_cfg_logits_{name}": guided_logits(raw, drawing.knobs, drawing.order.sizes),
            f"gen_tokens_{name}": tokens,
            f"gen_image_{name}": nchw(decode(frozen, tokens)),
        }
    return outputs


CASES = {"flexvar_vq": tokenizer, "flexvar": transformer}
