"""DetailFlow: the tokenizer with its resolutions and its second pass, and the generator of groups."""

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import Asked, along, constant_knobs, draws, fixed, loaded, logits, nchw, nhwc

from ar_jax.convert import detailflow as source
from ar_jax.convert.names import to_params
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval
from ar_jax.generators.causal import Causal
from ar_jax.generators.detailflow import Gradual, Grouped, Groups
from ar_jax.nets.attention import visible
from ar_jax.nets.conditioning import Label, fold
from ar_jax.nets.positions import NOWHERE, rotary
from ar_jax.nets.transformer import Transformer
from ar_jax.nets.vit import Siglip
from ar_jax.tokenizers.detailflow import DetailFlow, Features
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokens import TokenSpec, grid
from ar_jax.train.losses import Teacher
from ar_jax.train.recipes import with_mistakes


def table(module):
    """Rows: number of codes, resolution, side of what the decoder makes."""
    return np.stack([module.ends, module.resolutions, module.cell * np.array(module.drawn)], axis=1)


def told_of(function):
    """The module of words such as "... for 128 tokens, group 8, 256 px, patch 16, power 1.5"."""
    words = function.replace(",", "").split()
    after = lambda word: words[words.index(word) + 1]  # noqa: E731
    side, group = int(words[words.index("px") - 1]), int(after("group"))
    return DetailFlow((side, side), int(after("patch")), int(after("for")), group, group, power=float(after("power")))


def tokenizer(folder):
    h, io = folder.h, folder.io
    image = nhwc(io["image"])

    def net(side):
        sizes = (h[f"{side}_layers"], h[f"{side}_width"], h[f"{side}_heads"])
        return Siglip(*sizes, hidden=h[f"{side}_mlp"], eps=h["layer_norm_eps"])

    fixed(h, causal_encoder=True, causal_decoder=False)
    module = DetailFlow(
        (h["image_size"],) * 2, h["patch_size"], h["num_latent_tokens"], h["group_size"], h["causal_num"], net("encoder"),
        net("decoder"), h["codebook_size"], h["codebook_embed_dim"], h["degradation_power"], h["position_table_side"],
        nearest=h["noise_top_k"], vq=VectorLoss(commit=h["commit_loss_beta"]),
        aligned=(h["global_mlp_hidden"], h["teacher_width"]), channels=image.shape[-1],
    )  # fmt: skip
    own, beside = ({k: folder.weights[k] for k in folder.weights if k.startswith(source.BESIDE) == b} for b in (0, 1))
    params, call = loaded(module, own, source)
    network = Features(net("teacher"), module.cell, module.table)
    shapes = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
    theirs = {"params": to_params(beside, shapes, source.teacher_rules(network, module.channels))}
    teacher = Teacher(h["global_token_loss_weight"], "features", lambda _, x: network.apply(theirs, x), projected=False)
    ends = list(module.ends)

    def corner(pixels, side):
        return nchw(pixels[:, :side, :side])

    @jax.jit
    def plain(image, codes):
        states = call(call(image, method="seen"), params["queries"], method="registered")
        latents = call(image, method="latents")
        quant, index, _ = call(latents, method="quantise")
        outputs = {"latent_states": states, "latents": latents, "quant": quant, "indices": index}
        (case,) = folder.of("encoder with fewer query tokens")
        outputs["latents_truncated"] = latents[:, : case.arguments["num_tokens"]]
        for case in folder.of("decode_code"):
            number = case.arguments.get("num_tokens", module.registers)
            at = jnp.full(len(codes), ends.index(number))
            outputs[case.outputs[0]] = corner(call(codes, at, method="painted"), case.arguments["image_size"])
        (case,) = folder.of("degraded target")
        sides = list(zip(module.resolutions, (module.cell * i for i in module.drawn)))
        at = sides.index((case.arguments["resolution"], case.arguments["decoder_resolution"]))
        lowered = call(image, jnp.full(len(image), at), method="lowered")
        return outputs | {"target_low": corner(lowered, sides[at][1]), "teacher_features": network.apply(theirs, image)}

    def ranks(case):
        (name,) = (name for name in case.inputs if name.startswith("noise_ranks"))
        return jnp.asarray(io[name])

    def mistaken(case):
        fixed(case.arguments, nearest=module.nearest)
        begin = jnp.full(len(image), case.arguments["noise_index"])
        _, _, again, triple, _ = call(image, begin, ranks(case), method="mistake")
        return dict(zip(case.outputs, (again, triple)))

    (train,) = folder.of("training forward")
    word = train.function.split("(")[1].rstrip(")")
    (same,) = (case for case in folder.of("self-correction encode") if word in case.function)
    begin = jnp.full(len(image), same.arguments["noise_index"])

    def training(params):
        recon, losses, seen = module.apply(
            {"params": params}, image, jnp.full(len(image), module.registers), begin, ranks(train), method="trained"
        )
        parts = {
            "rec": jnp.square(recon - seen["target"]).mean(), "vq": losses["codebook"], "commit": losses["commit"],
            "global": teacher.weight * (teacher({}, {}, image, seen["features"]) - 1),
        }  # fmt: skip
        total = sum(parts.values())
        return total, {"train.decoded": nchw(recon), **{f"loss.{k}": v for k, v in (parts | {"total": total}).items()}}

    asked = Asked(params, source.rules(module), folder.outputs("grad."))

    @jax.jit
    def trained(params):
        grads, outputs = jax.grad(training, has_aux=True)(params)
        return outputs, asked.of(grads)

    outputs, grads = trained(params)
    outputs |= plain(image, call(jnp.asarray(io["codes"])[..., None], method="embed"))
    for case in folder.of("self-correction encode"):
        outputs |= mistaken(case)
    (case,) = folder.of("encoder mask")
    patches = int(case.function.split()[-2])
    steps = np.concatenate([np.zeros(patches, np.int32), module.steps_of_rows[module.places**2 :]])
    (case,) = folder.of("resolution tables")
    other = table(told_of(case.function))
    best = {int(drawn): int(count) for count, _, drawn in other}
    return outputs | {
        **{f"grad.{key}": value for key, value in asked.named(grads).items()},
        "encoder_mask": visible(steps, steps),
        "table_own": table(module),
        **dict(zip(case.outputs, (*other.T, np.array(list(best.items()))))),
    }


def gpt(folder):
    h, io = folder.h, folder.io
    fixed(h, cls_token_num=1)
    group = h["group_size"]
    spec = TokenSpec(grid(h["block_size"] // group, group), codes=(h["vocab_size"],), placed=False)
    net = Transformer(
        h["n_layer"], h["dim"], h["n_head"], hidden=h["ffn_hidden"], base=float(h["rope_base"]), eps=h["norm_eps"]
    )
    generator = Causal(net, Label(h["dim"]), inputs=Grouped(group=group)).complete(spec, Info(classes=h["num_classes"]))
    params, _ = loaded(generator, folder.weights, source)
    groups = Groups(h["causal_num"], group)
    order = groups(spec)
    (pairs,) = folder.of("generate_z_input_target")
    clean, given, corrected = (jnp.asarray(io["triples"])[..., i : i + 1] for i in range(3))
    fed, target = with_mistakes(
        jnp.asarray(io["correction_uniform"]), pairs.arguments["correction_prob"], clean, given, corrected
    )
    batch = {"label": jnp.asarray(io["labels"])}

    def forced(params):
        def run(self):
            keep = jnp.zeros(len(fed), bool)
            loss, weight, _ = self.loss(target, batch, order, drop=keep, given=fed)
            return (loss * weight).sum() / weight.sum(), self.head(self.hidden(fed, self.condition(batch, keep), order))

        return generator.apply({"params": params}, method=run)

    asked = Asked(params, source.rules(generator), folder.outputs("grad."))

    @jax.jit
    def trained(params):
        (loss, shown), grads = jax.value_and_grad(forced, has_aux=True)(params)
        return loss, shown, asked.of(grads)

    loss, shown, grads = trained(params)
    nowhere = np.full((1, 3), NOWHERE)
    angles = rotary(np.concatenate([nowhere, spec.coords])[None], h["dim"] // h["n_head"], float(h["rope_base"]))
    outputs = {
        "freqs_cis": jnp.moveaxis(angles[:, 0, :, ::2], 0, -1),
        "mask": visible(order.step, order.step),
        "train_input": fed[:, : spec.n - group],
        "train_target": target,
        "tf_loss": loss,
        "tf_logits": shown,
        **{f"grad.{key}": value for key, value in asked.named(grads).items()},
    }
    labels = {"label": jnp.asarray(io["gen_labels"])}
    for case in folder.of("generate_group_par"):
        scale = case.arguments["cfg_scale"]
        gradual = "gradual_cfg" in case.arguments and case.arguments["gradual_cfg"]
        weight = (Gradual if gradual else Interval)(scale)(order, spec)
        drawn = draws(generator, params, labels, groups, constant_knobs(weight, 0.0), guided=True)
        raw = along(generator, params, labels, groups, drawn, logits)
        raw = np.stack(np.split(raw, 2), 1).reshape(raw.shape)
        outputs |= dict(zip(case.outputs, (drawn, fold(raw, 2, weight[order.step][:, None]))))
        fixed(h, cfg_scale=scale)
    return outputs


CASES = {"detailflow_tokenizer": tokenizer, "detailflow_gpt": gpt}
