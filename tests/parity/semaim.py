"""SemAIM: the order that an image's own features give, the two streams, and their losses."""

import types

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import Asked, fixed, loaded, nhwc

from ar_jax.convert.mar import layer_rules, layers
from ar_jax.convert.names import LINEAR, Layout
from ar_jax.generators.semaim import Readout, SemAIM, TwoStreams, blur_matrix, feature_errors, sights, similarity
from ar_jax.nets.conditioning import Nothing
from ar_jax.orders import whole
from ar_jax.tokenizers.continuous import patchify
from ar_jax.tokenizers.patches import Patches


def theirs(x, side, axis=0):
    """Numbers of a patch, ours by channel, row and column, as row, column and channel."""
    x = jnp.moveaxis(jnp.asarray(x), axis, 0)
    x = jnp.moveaxis(x.reshape(-1, side, side, *x.shape[1:]), 0, 2).reshape(x.shape)
    return jnp.moveaxis(x, 0, axis)


def ours(x, side):
    """The inverse, of a first axis."""
    return np.moveaxis(x.reshape(side, side, -1, *x.shape[1:]), 2, 0).reshape(x.shape)


def family(heads, side):
    first, rows = Layout(lambda x: x[None], lambda x: x[0]), "backbone/asking/"
    conv = Layout(lambda x: x.T.reshape(x.shape[1], -1, side, side), lambda x: x.reshape(len(x), -1).T)
    rules = [
        ("first", "cls_token", first),
        ("input/kernel", "patch_embed.proj.weight", conv),
        ("head/fc2/kernel", "prediction_head.fc2.weight", Layout(lambda x: theirs(x.T, side), lambda x: ours(x, side).T)),
        ("head/fc2/bias", "prediction_head.fc2.bias", Layout(lambda x: theirs(x, side), lambda x: ours(x, side))),
        *layer_rules("backbone/blocks", "blocks", heads),
        *layers(rows, "query_blocks.{}.", (
            ("attention_norm", "norm1"), ("mlp_norm", "norm2"), ("query", "attn.q"), ("key", "attn.k"), ("value", "attn.v"),
            ("out", "attn.proj"), ("fc1", "mlp.fc1"), ("fc2", "mlp.fc2"),
        )),
        *layers("", "", (("input", "patch_embed.proj"), ("backbone/norm", "norm"), ("head/fc1", "prediction_head.fc1"))),
    ]  # fmt: skip
    fills = dict.fromkeys(("pos_embed", "gaussian_blur.weight"), ())
    return types.SimpleNamespace(rules=lambda module: rules, buffers=lambda *_: fills)


def build(folder):
    h = folder.h
    fixed(h, attention_type="cls")
    size, side = h["img_size"], h["patch_size"]
    net = TwoStreams(
        h["depth"], h["embed_dim"], h["num_heads"], hidden=int(h["mlp_ratio"] * h["embed_dim"]), eps=h["norm_eps"],
        queries=h["query_depth"],
    )  # fmt: skip
    module = SemAIM(net, Nothing(net.width), blur=h["gaussian_kernel_size"], sigma=float(h["gaussian_sigma"]))
    module, known = module.on(Patches((size, size), side).spec), family(net.heads, side)
    params, _ = loaded(module, folder.weights, known)
    np.testing.assert_allclose(module.places[None], folder.weights["pos_embed"], atol=1e-6)
    line = blur_matrix(2 * module.blur, module.blur, module.sigma)[module.blur][module.blur // 2 + 1 :][: module.blur]
    kernel = folder.weights["gaussian_blur.weight"]
    np.testing.assert_allclose(np.broadcast_to(np.outer(line, line), kernel.shape), kernel, atol=1e-7)
    return module, params, known.rules(module)


def whole_folder(folder):
    h, io = folder.h, folder.io
    module, params, rules = build(folder)
    side, tokens = module.patch, patchify(nhwc(io["images"]), module.patch)
    ties, teacher = jnp.asarray(io["tie_uniform"]), jnp.asarray(io["teacher"])
    readout = Readout(4 * module.backbone.width, h["feature_dim"])
    arguments = {name: value for case in folder.cases for name, value in case.arguments.items()}
    fixed(arguments, masks="none")
    weights = folder.files[arguments["head"]]
    head = {
        layer: {
            "kernel": LINEAR.from_torch(weights[f"prediction_head.{layer}.weight"]),
            "bias": weights[f"prediction_head.{layer}.bias"],
        }
        for layer in ("fc1", "fc2")
    }
    asked = Asked(params, rules, list(h["grads"]))

    @jax.jit
    def run(params):
        call = lambda *arguments, method: module.apply({"params": params}, *arguments, method=method)  # noqa: E731
        rows, looks = call(tokens, method="features")
        keys = module.keys(rows, looks, ties, whole(module.spec))

        def objective(params):
            def run(self):
                found = self.predicted(tokens, keys)
                loss = jnp.square(found[:, 1:] - self.wanted(tokens)).mean(-1)
                return loss.mean(), (loss, found)

            return module.apply({"params": params}, method=run)

        def asks(self):
            keys = jnp.pad(jnp.asarray(io["order_uniform"]), ((0, 0), (1, 0)))
            return self.backbone(self.embed(tokens), jnp.asarray(self.places), keys)

        (loss, (each, found)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        features = readout.apply({"params": head}, call(method=asks)[:, 1:])
        return rows, looks, keys, loss, each, found, features, asked.of(grads)

    rows, looks, keys, loss, each, found, features, grads = run(params)
    content, query = sights(jnp.pad(keys[:1], ((0, 0), (1, 0))))
    errors = feature_errors(features, teacher[:, 1:])
    alike = similarity(teacher)
    least, most = alike.min(1, keepdims=True), alike.max(1, keepdims=True)
    return {
        "encoder_tokens": rows, "feature_attention": jax.nn.softmax(similarity(rows)), "self_attention": looks,
        "permutation": keys, "order": jnp.argsort(keys, axis=1), "content_mask": content, "query_mask": query,
        "prediction": theirs(found, side, -1), "target": theirs(module.wanted(tokens), side, -1), "loss": loss,
        "loss_map": each, "feature_loss": errors.mean(), "feature_loss_map": errors,
        "teacher_similarity": (alike - least) / (most - least + 1e-6),
    } | {f"grad.{key}": value for key, value in asked.named(grads).items()}  # fmt: skip


CASES = {"semaim": whole_folder}
