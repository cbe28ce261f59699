"""ViTok's autoencoder."""

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import fixed, nchw, nhwc

from ar_jax.convert.names import LINEAR, PLAIN, Layout, qkv_layout, to_params, to_weights
from ar_jax.convert.sources import param_shapes
from ar_jax.nets.vit import TurnedViT
from ar_jax.tokenizers.continuous import draw
from ar_jax.tokenizers.vitok import ViTok


def rules(tokenizer):
    """Names of the public reimplementation, whose patch kernels are three-dimensional."""
    kernel = (tokenizer.channels, 1, tokenizer.cell, tokenizer.cell)
    into = Layout(lambda x: x.T.reshape(-1, *kernel), lambda x: x.reshape(len(x), -1).T)
    out = Layout(lambda x: x.reshape(-1, *kernel), lambda x: x.reshape(len(x), -1))
    tower, names = r"(encoder|decoder)", {"attention_norm": "norm1", "mlp_norm": "norm2"}
    layers = {"out": "attn.proj", "gate": "mlp.fc1", "up": "mlp.fc2", "down": "mlp.fc3"}
    return [
        ("patches/kernel", "tubelet_embed.proj.weight", into),
        ("patches/bias", "tubelet_embed.proj.bias", PLAIN),
        ("to_pixels/kernel", "tubelet_decode.proj.weight", out),
        ("pixel_bias", "tubelet_decode.proj.bias", PLAIN),
        *((f"{ours}/kernel", f"{theirs}.weight", LINEAR) for ours, theirs in CODES.items()),
        *((f"{ours}/bias", f"{theirs}.bias", PLAIN) for ours, theirs in CODES.items()),
        (f"{tower}/norm/scale", r"\1.norm.weight", PLAIN),
        (f"{tower}/norm/bias", r"\1.norm.bias", PLAIN),
        (f"{tower}/blocks/qkv/kernel", r"\1.blocks.{}.attn.qkv.weight", qkv_layout(tokenizer.encoder.heads)),
        *(
            (f"{tower}/blocks/{ours}/kernel", rf"\1.blocks.{{}}.{theirs}.weight", LINEAR)
            for ours, theirs in layers.items()
        ),
        *((f"{tower}/blocks/{ours}/bias", rf"\1.blocks.{{}}.{theirs}.bias", PLAIN) for ours, theirs in layers.items()),
        *(
            (f"{tower}/blocks/{ours}/scale", rf"\1.blocks.{{}}.{theirs}.weight", PLAIN)
            for ours, theirs in names.items()
        ),
        *((f"{tower}/blocks/{ours}/bias", rf"\1.blocks.{{}}.{theirs}.bias", PLAIN) for ours, theirs in names.items()),
    ]


CODES = {"to_code": "encoder_to_code", "from_code": "code_to_decoder"}


def vitok_ae(folder):
    h, io = folder.h, folder.io
    fixed(h, tubelet_size=1, mlp_hidden=int(h["mlp_ratio"] * h["width"]))

    def tower(layers, places):
        return TurnedViT(
            layers, h["width"], h["num_heads"], hidden=h["mlp_hidden"], places=places, base=float(h["rope_theta"]),
            eps=h["layer_norm_eps"],
        )  # fmt: skip

    def model(places, size=(h["image_size"],) * 2):
        nets = {"encoder": tower(h["encoder_depth"], places), "decoder": tower(h["decoder_depth"], places)}
        return ViTok(size, h["patch_size"], h["code_width"], **nets)

    names = rules(model("line"))
    weights = {key: np.asarray(folder.weights[key]) for key in folder.weights}
    params = jax.tree.map(jnp.asarray, to_params(weights, param_shapes(model("line")), names))
    image, wide, code, noise = (
        nhwc(io["image"]),
        nhwc(io["wide_image"]),
        jnp.asarray(io["code"]),
        jnp.asarray(io["noise"]),
    )
    (training,) = folder.of("training forward")
    weight = {name: training.arguments[f"{name}_weight"] for name in ("l2", "l1", "kl")}

    @jax.jit
    def run(params):
        outputs = {}
        for name, places in (("1d", "line"), ("2d", "grid")):
            found = model(places).apply({"params": params}, image, method="moments")
            outputs[f"mean_{name}"], outputs[f"logvar_{name}"] = jnp.split(found, 2, axis=-1)
            outputs[f"decoded_{name}"] = nchw(model(places).apply({"params": params}, code, method="decode"))
        other = model("line", wide.shape[1:3])
        mean = other.apply({"params": params}, wide, method="encode")
        outputs["wide_mean"] = mean
        outputs["wide_decoded"] = nchw(other.apply({"params": params}, mean, method="decode"))

        def objective(params):
            def passed(self):
                mean, logvar = jnp.split(self.moments(image), 2, axis=-1)
                return self.shown(draw(mean, logvar, noise)), self.autoencode(image)[1]["kl"]

            recon, kl = model("grid").clone(kl=1.0).apply({"params": params}, method=passed)
            parts = {"l2": jnp.square(recon - image).mean(), "l1": jnp.abs(recon - image).mean(), "kl": kl}
            return sum(weight[name] * part for name, part in parts.items()), (recon, parts)

        (total, (recon, parts)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        losses = {f"loss.{name}": part for name, part in (parts | {"total": total}).items()}
        return outputs | {"recon": nchw(recon)} | losses, grads

    outputs, grads = run(params)
    return outputs | {f"grad.{key}": value for key, value in to_weights(grads, names).items()}


CASES = {"vitok_ae": vitok_ae}
