"""Hita: the tokenizer with its carriers, whose teacher is replaced by its output, and the transformer."""

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import Asked, along, constant_knobs, draws, fixed, loaded, nchw, nhwc
from parity.gigatok import square

from ar_jax.convert import hita as source
from ar_jax.data import Info
from ar_jax.generators.causal import Causal
from ar_jax.generators.hita import ByLevel, Holistic, TwoTables
from ar_jax.nets.conditioning import Label, fold
from ar_jax.nets.positions import NOWHERE, rotary
from ar_jax.orders import raster
from ar_jax.tokenizers.hita import Hita
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokens import TokenSpec, grid, pyramid


def vq(folder):
    h, io = folder.h, folder.io
    image, seen = nhwc(io["image"]), jnp.asarray(io["vfm_tokens"])
    tokenizer = Hita(
        size=image.shape[1:3], carriers=h["n_carrier"], features=h["base_channels"], mult=tuple(h["ch_mult"]),
        res_blocks=h["num_res_blocks"], latent=h["dim"], layers=h["depth"], heads=h["num_heads"],
        head_features=h["dim_head_first_transformer"], hidden=h["swiglu_hidden"], early=h["shift_k"],
        codes=h["codebook_size"], code_features=h["codebook_embed_dim"], carrier_features=h["codebook_slots_embed_dim"],
        groups=h["norm_num_groups"], vq=VectorLoss(commit=h["commit_loss_beta"]), feature_width=h["vfm_channels"],
        side=h["vfm_grid"], tell=float(h["enable_vfm_recon"]), channels=image.shape[-1],
    )  # fmt: skip
    fixed(h, image_size=square(image), z_channels=tokenizer.latent, layer_norm_eps=1e-5)
    fixed(h, swiglu_hidden=-(-(2 * h["mlp_dim"] // 3) // 8) * 8)
    params, _ = loaded(tokenizer, folder.weights, source)

    def stages(self, image, seen, tokens):
        x = self.encoder(image)
        carriers, patches = self.mixed(x, seen)
        codes, index, _ = self.quantise(self.latents(image, seen))
        shown, _ = self.spread(self.carrier_post_quant(codes[0]), self.post_quant(codes[1]))
        told = self.spread(*self.given(tokens))[1]
        return {
            "cnn_features": nchw(x),
            "patch_states": nchw(patches),
            "holistic_states": carriers,
            "patch_quant": nchw(codes[1]),
            "holistic_quant": codes[0],
            "patch_indices": index[1],
            "holistic_indices": index[0],
            "decoded_codes": nchw(self.decode(tokens)),
            "shifted_features": nchw(shown),
            **({} if told is None else {"vfm_recon_codes": told.reshape(len(told), -1, told.shape[-1])}),
        }

    def training(params):
        recon, losses, _ = tokenizer.apply({"params": params}, image, seen, method="whole")
        both = lambda name: losses[f"{name}/carriers"] + losses[f"{name}/patches"]  # noqa: E731
        parts = {"vq": both("codebook"), "commit": both("commit"), "mse": jnp.square(recon - image).mean()}
        parts |= {"vfm": losses["features"]} if "features" in losses else {}
        total = sum(parts.values()) + parts["mse"]
        return total, {f"loss.{name}": part for name, part in (parts | {"total": total}).items()}

    asked = Asked(params, source.rules(tokenizer), folder.outputs("grad."))

    @jax.jit
    def run(params, tokens):
        (_, parts), grads = jax.value_and_grad(training, has_aux=True)(params)
        return tokenizer.apply({"params": params}, image, seen, tokens, method=stages) | parts, asked.of(grads)

    tokens = np.concatenate([io["holistic_codes"], io["patch_codes"].reshape(len(image), -1)], axis=1)[..., None]
    outputs, grads = run(params, tokens)
    return outputs | {f"grad.{key}": value for key, value in asked.named(grads).items()}


def gpt(folder):
    h, io = folder.h, folder.io
    slots, side = h["num_slots"], round(h["block_size"] ** 0.5)
    fixed(h, block_size=side**2, cls_token_num=1)
    backbone = Holistic(
        h["n_layer"], h["dim"], h["n_head"], hidden=h["ffn_hidden"], base=float(h["rope_base"]), eps=h["norm_eps"]
    )
    spec = TokenSpec(pyramid(((1, slots), side)), codes=(h["vocab_size"],))
    module = Causal(backbone, Label(h["dim"]), ByLevel(), TwoTables(), emphasis="levels")
    generator = module.complete(spec, Info(classes=h["num_classes"]))
    params, _ = loaded(generator, folder.weights, source)
    tokens = jnp.concatenate([jnp.asarray(io[f"{kind}_codes"]) for kind in ("holistic", "patch")], axis=1)[..., None]
    batch, order = {"label": jnp.asarray(io["labels"])}, raster(spec)

    def forced(params):
        def run(self):
            keep = jnp.zeros(len(tokens), bool)
            loss, weight, _ = self.loss(tokens, batch, order, drop=keep)
            both = self.head.readout(self.hidden(tokens, self.condition(batch, keep), order))
            return 2 * (loss * weight).sum() / weight.sum(), (both, loss)

        return generator.apply({"params": params}, method=run)

    asked = Asked(params, source.rules(generator), folder.outputs("grad."))
    (_, (both, loss)), grads = jax.jit(jax.value_and_grad(forced, has_aux=True))(params)
    coords = np.concatenate([np.full((1, 3), NOWHERE), grid(side, side)])[None]
    table = np.asarray(rotary(coords, h["dim"] // h["n_head"], float(h["rope_base"])))[:, 0, :, ::2]
    outputs = {
        "freqs_cis": np.moveaxis(table, 0, -1),
        "tf_logits": both,
        "loss.holistic": loss[:, :slots].mean(),
        "loss.patch": loss[:, slots:].mean(),
        **{f"grad.{key}": value for key, value in asked.named(asked.of(grads)).items()},
    }
    published = generator.clone(inputs=generator.inputs.clone(of_next=True))
    labels = {"label": jnp.asarray(io["gen_labels"])}
    fixed(h, cfg_scale=folder.of("generate with guidance")[0].arguments["cfg_scale"])
    for case in folder.of("generate"):
        name, scale = case.outputs[0].removeprefix("greedy_tokens_"), case.arguments["cfg_scale"]
        knobs, guided = constant_knobs(np.full(spec.n, scale), 0.0), scale != 1
        drawn = draws(published, params, labels, raster, knobs, guided=guided)
        hidden = along(published, params, labels, raster, drawn, lambda generator, h: h, guided=guided)
        raw = published.apply({"params": params}, jnp.asarray(hidden), method=lambda self, x: self.head(x))
        if guided:
            raw = fold(np.stack(np.split(np.asarray(raw), 2), 1).reshape(raw.shape), 2, scale)
        outputs |= {f"greedy_tokens_{name}": drawn, f"greedy_logits_{name}": raw}
    return outputs


CASES = {"hita_vq": vq, "hita_gpt": gpt}
