"""TokenFlow: the tokenizer, whose semantic backbone is replaced by its output. No weights are released, so names stand here."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from parity.common import fixed, loaded, nchw, nhwc

from ar_jax.convert import llamagen
from ar_jax.convert.mar import layers, qkv_bias
from ar_jax.convert.names import CONV1, PLAIN, qkv_layout
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokenizers.quantize_shared import shared_quantise
from ar_jax.tokenizers.tokenflow import TokenFlow
from ar_jax.train.losses import Teacher


class Nothing(nn.Module):
    """The backbone, which is not asked: its output is given."""

    places: int
    width: int

    def __call__(self, image):
        return jnp.zeros((len(image), self.places, self.places, self.width))


def rules(tokenizer):
    heads, block = tokenizer.semantic_heads, "semantics/vit/blocks/"
    theirs = "decoder_vqkd.blocks.{}."
    return [
        ("codebook", "codebook", PLAIN),
        *layers("task/", "encode_task_layer.", (("task1", "0"), ("task2", "2"))),
        *layers("semantics/", "decode_task_layer.", (("task1", "0"), ("task2", "2"))),
        ("semantics/image", "decoder_vqkd.cls_token", PLAIN),
        ("semantics/positions", "decoder_vqkd.pos_embed", PLAIN),
        ("semantics/patches/kernel", "decoder_vqkd.patch_embed.proj.weight", CONV1),
        ("semantics/patches/bias", "decoder_vqkd.patch_embed.proj.bias", PLAIN),
        ("semantics/vit/norm/scale", "decoder_vqkd.fc_norm.weight", PLAIN),
        ("semantics/vit/norm/bias", "decoder_vqkd.fc_norm.bias", PLAIN),
        (block + "qkv/kernel", theirs + "attn.qkv.weight", qkv_layout(heads)),
        (block + "qkv/bias", theirs + "attn.qkv.bias", qkv_bias(heads)),
        *layers(
            block, theirs,
            (("attention_norm", "norm1"), ("mlp_norm", "norm2"), ("out", "attn.proj"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2")),
        ),
        *llamagen.vqgan_rules(tokenizer),
    ]  # fmt: skip


def ours(weights, depth):
    """One table of codes, and biases of queries, keys and values together: a key's bias, which they lack, changes nothing."""
    found = {key: weights[key] for key in weights}
    codes = [found.pop(f"quantize.embedding_{part}.weight") for part in ("vqkd", "vqgan")]
    for i in range(depth):
        name = f"decoder_vqkd.blocks.{i}.attn."
        q, v = found.pop(name + "q_bias"), found.pop(name + "v_bias")
        found[name + "qkv.bias"] = np.concatenate([q, np.zeros_like(q), v])
    return found | {"codebook": np.concatenate(codes, axis=1)}


def vq(folder):
    h, io = folder.h, folder.io
    side, first = h["scales"][-1], h["semantic_code_dim"]
    tokenizer = TokenFlow(
        size=folder.shape("image")[2:], features=h["base_channels"], mult=tuple(h["ch_mult"]),
        res_blocks=h["num_res_blocks"], latent=h["z_channels"], codes=h["codebook_size"], groups=h["norm_num_groups"],
        code_features=h["pixel_code_dim"], semantic_features=first, scales=tuple(h["scales"]),
        backbone=Nothing(side, h["semantic_width"]), semantic_layers=h["semantic_decoder_depth"],
        semantic_width=h["semantic_width"], semantic_heads=h["semantic_decoder_heads"], target=h["target_width"],
        pixel_weight=h["pixel_distance_weight"], vq=VectorLoss(commit=h["beta"]),
    )  # fmt: skip
    fixed(h, downsample=tokenizer.downsample, norm_eps=1e-6)
    family = types.SimpleNamespace(rules=rules, buffers=lambda module, shapes: {})
    params, _ = loaded(tokenizer, ours(folder.weights, h["semantic_decoder_depth"]), family)
    target = jnp.asarray(io["target_features"])
    teacher = Teacher(
        1.0, "semantics", lambda params, image: target.reshape(len(target), side, side, -1), projected=False
    )

    def rows(maps):
        return maps.reshape(len(maps), -1, maps.shape[-1])

    def whole(self, image, seen):
        """Everything of a pass, with the backbone's output given."""
        latents = self.latents(image, seen)
        total, index, _, losses = self.quantise(latents)
        return total, index, losses, self.semantics(total[..., :first]), self.pixels(total)

    def objective(params, image, seen):
        made = tokenizer.apply({"params": params}, image, seen, method=whole)
        semantic = teacher({}, {}, image, made[3])
        own = sum(made[2].values())
        return jnp.square(made[4] - image).mean() + own + semantic, (*made, semantic)

    def one(z, entropy):
        return shared_quantise(
            z, params["codebook"], first, VectorLoss(commit=h["beta"], entropy=entropy), h["pixel_distance_weight"]
        )

    @jax.jit
    def run(params, image, seen, codes, z):
        (loss, made), grads = jax.value_and_grad(objective, has_aux=True)(params, image, seen)
        total, index, losses, told, recon, semantic = made
        sums = tokenizer.apply({"params": params}, codes, method="sums")[-1]
        code, one_index, one_losses = one(z, 1.0)
        readout = nhwc(jnp.linspace(-1, 1, z.size).reshape(nchw(z).shape))
        bias = grads["semantics"]["vit"]["blocks"]["qkv"]["bias"][0]
        call = lambda *args, method: tokenizer.apply({"params": params}, *args, method=method)  # noqa: E731
        return {
            "quantized": nchw(total),
            "indices": index,
            "semantic_recon": rows(told),
            "recon": nchw(recon),
            "code_semantic": rows(call(sums[..., :first], method=lambda self, x: self.semantics(x))),
            "code_image": nchw(call(codes, method="decode")),
            "ar_inputs": call(codes, method="context")[:, 1:],
            "vq_loss": losses["codebook"],
            "commit_loss": losses["commit"],
            "semantic_loss": semantic,
            "train_loss": loss,
            "train_loss.grad.quantize.embedding_vqkd.weight": grads["codebook"][:, :first],
            "train_loss.grad.quantize.embedding_vqgan.weight": grads["codebook"][:, first:],
            "train_loss.grad.encode_task_layer.0.weight": grads["task"]["task1"]["kernel"].T,
            "train_loss.grad.decode_task_layer.2.weight": grads["semantics"]["task2"]["kernel"].T,
            "train_loss.grad.decoder_vqkd.blocks.0.attn.q_bias": bias.reshape(tokenizer.semantic_heads, 3, -1)[:, 0],
            "train_loss.grad.quant_conv.weight": grads["quant"]["kernel"].T,
            "one_quantized": nchw(code),
            "one_indices": one_index,
            "one_vq_loss": one_losses["codebook"],
            "one_commit_loss": one_losses["commit"],
            "one_entropy_loss": one_losses["entropy"],
            "one_commit.grad": nchw(jax.grad(lambda z: one(z, 0.0)[2]["commit"])(z)),
            "one_code.grad": nchw(jax.grad(lambda z: (one(z, 0.0)[0] * readout).sum())(z)),
        }

    seen = jnp.asarray(io["teacher_features"]).reshape(len(target), side, side, -1)
    return run(params, nhwc(io["image"]), seen, jnp.asarray(io["codes"])[..., None], nhwc(io["features"]))


CASES = {"tokenflow_vq": vq}
