"""GigaTok: the tokenizer on a line, and the transformer with learned positions."""

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import Asked, along, constant_knobs, draws, fixed, loaded, logits, nchw, nhwc

from ar_jax.convert import gigatok as source
from ar_jax.data import Info
from ar_jax.decode.guidance import Interval, Staged
from ar_jax.generators.causal import Causal
from ar_jax.nets.conditioning import Label, fold
from ar_jax.nets.queries import QFormer
from ar_jax.nets.transformer import Positioned
from ar_jax.orders import raster
from ar_jax.tokenizers.gigatok import GigaTok, pooled
from ar_jax.tokenizers.quantize import VectorLoss, normalise
from ar_jax.tokens import TokenSpec, grid
from ar_jax.train.losses import Teacher
from ar_jax.train.optim import Optim, schedule


def line(x):
    """[b n c] as the published [b c 1 n]."""
    return jnp.swapaxes(x, 1, 2)[:, :, None]


def square(image):
    """The side of images, or their height and width."""
    height, width = image.shape[1:3]
    return height if height == width else [height, width]


def vq(folder):
    h, io = folder.h, folder.io
    image = nhwc(io["image"])

    def net(side, tap=0):
        return QFormer(h[f"{side}_layers"], h[f"{side}_width"], h[f"{side}_heads"], tap=tap, eps=h["layer_norm_eps"])

    tokenizer = GigaTok(
        size=image.shape[1:3], tokens=h["num_latent_tokens"], features=h["base_channels"],
        mult=tuple(h["encoder_ch_mult"]), decoder_mult=tuple(h["decoder_ch_mult"]), res_blocks=h["num_res_blocks"],
        latent=h["z_channels"], encoder_net=net("encoder"), decoder_net=net("decoder", h["distill_depth"]),
        target=h["out_inner_dim"], codes=h["codebook_size"], code_features=h["codebook_embed_dim"],
        groups=h["norm_num_groups"], l2_norm=h["codebook_l2_norm"], rotation=True, shortcut=1,
        vq=VectorLoss(commit=h["commit_loss_beta"], entropy=h["entropy_loss_ratio"], temperature=h["entropy_temperature"]),
        channels=image.shape[-1],
    )  # fmt: skip
    fixed(h, group_norm_eps=1e-6, image_size=square(image))
    params, _ = loaded(tokenizer, folder.weights, source)
    wanted = jnp.asarray(io["teacher_features"]).reshape(len(image), *tokenizer.map, -1)
    teacher = Teacher(h["semantic_weight"], "to_map/told", lambda params, image: wanted, projected=False)

    def told(params, *arguments, tokenizer=tokenizer, **options):
        made, inside = tokenizer.apply(
            {"params": params}, *arguments, **options, mutable=["intermediates"],
            capture_intermediates=lambda module, _: "/".join(module.path) == teacher.on,
        )  # fmt: skip
        return made, inside["intermediates"]["to_map"]["told"]["__call__"][0]

    def whole(self, image, free, codes):
        """All stages; those of training with the shortcut."""
        seen = self.encoder(image)
        latents = self.quant(self.to_line(seen))
        quant, index, _ = self.quantise(latents)
        given = self.to_map(self.post_quant(free))
        return {
            "spatial": nchw(seen),
            "latents_256": line(self.to_line(seen)),
            "latents": line(latents),
            "quant": line(quant),
            "indices": index,
            "decoded_free": nchw(self.decoder(given)),
            "rec_spatial_free": nchw(given),
            "decoded_codes": nchw(self.decode(codes)),
        }

    def training(params, rotation):
        own = tokenizer.clone(rotation=rotation)
        (recon, losses, _), features = told(params, image, step=0, tokenizer=own, method="autoencode")
        semantic = teacher({}, {}, image, features)
        parts = {
            "vq": losses["codebook"], "commit": losses["commit"], "feature_rec": losses["map"], "semantic": semantic - 1,
            "rec": jnp.square(recon - image).mean(), "direct_rec": losses["shortcut"],
            "entropy": losses.get("entropy", jnp.zeros(())),
        }  # fmt: skip
        total = sum(parts.values()) + (teacher.weight - 1) * parts["semantic"]
        return total, {f"loss.{name}": part for name, part in (parts | {"total": total}).items()}

    asked = {kind: Asked(params, source.rules(tokenizer), folder.outputs(f"{kind}.grad.")) for kind in ("rot", "ste")}

    @jax.jit
    def run(params):
        call = lambda *args, method: tokenizer.apply({"params": params}, *args, method=method)  # noqa: E731
        free = normalise(jnp.swapaxes(jnp.asarray(io["free_latents"])[:, :, 0], 1, 2))
        outputs = call(image, free, jnp.asarray(io["codes"])[..., None], method=whole)
        outputs["inner_features_free"] = told(params, free, method=lambda self, x: self.to_map(self.post_quant(x)))[1]
        outputs["direct_decoded"] = nchw(call(image, method=lambda self, x: self.decoder(self.encoder(x))))
        (_, parts), turned = jax.value_and_grad(training, has_aux=True)(params, True)
        straight = jax.grad(lambda params: training(params, False)[0])(params)
        return outputs | parts, {"rot": asked["rot"].of(turned), "ste": asked["ste"].of(straight)}

    (pooling,) = folder.of("multi-level pooling")
    (rates,) = folder.of("learning-rate schedules")
    outputs, grads = run(params)
    for kind, found in grads.items():
        outputs |= {f"{kind}.grad.{key}": value for key, value in asked[kind].named(found).items()}
    return outputs | {
        "pooled_queries": pooled(nhwc(io["pool_map"]), pooling.arguments["num_tokens"]),
        **learning_rates(rates.arguments, jnp.asarray(io["lr_steps"])),
    }


def learning_rates(said, steps):
    common = {"lr": said["base_lr"], "warmup": said["warmup"], "warmup_start": 1 / said["warmup_start_divisor"]}
    total, fall = said["total"], said["wsd_decay_fraction"] * said["total"]
    settings = {
        "lr_cosine": {"schedule": "cosine", "end_lr": said["cosine_end_lr"]},
        "lr_wsd": {"schedule": "root", "hold": 1 - fall / (total - said["warmup"])},
    }
    return {name: jax.vmap(schedule(Optim(**common, **more), total))(steps) for name, more in settings.items()}


def gpt(folder):
    h, io = folder.h, folder.io
    fixed(h, positions="learned absolute", cls_token_num=1)
    backbone = Positioned(h["n_layer"], h["dim"], h["n_head"], hidden=h["ffn_hidden"], eps=h["norm_eps"])
    generator = Causal(backbone, Label(h["dim"])).complete(
        TokenSpec(grid(1, h["block_size"]), codes=(h["vocab_size"],)), Info(classes=h["num_classes"])
    )
    params, _ = loaded(generator, folder.weights, source)
    tokens, batch = jnp.asarray(io["tokens"])[..., None], {"label": jnp.asarray(io["labels"])}
    order = raster(generator.spec)

    def forced(params):
        def run(self):
            keep = jnp.zeros(len(tokens), bool)
            loss, weight, _ = self.loss(tokens, batch, order, drop=keep)
            logits = self.head(self.hidden(tokens, self.condition(batch, keep), order))
            return (loss * weight).sum() / weight.sum(), logits

        return generator.apply({"params": params}, method=run)

    asked = Asked(params, source.rules(generator), folder.outputs("grad."))
    (loss, shown), grads = jax.jit(jax.value_and_grad(forced, has_aux=True))(params)
    found = asked.named(asked.of(grads))
    outputs = {"tf_logits": shown, "tf_loss": loss, **{f"grad.{key}": value for key, value in found.items()}}
    labels = {"label": jnp.asarray(io["gen_labels"])}
    for case in folder.of("generate"):
        name = case.outputs[0].removeprefix("greedy_tokens_")
        scale = case.arguments["cfg_scale"]
        rule = Staged(scale, "step", case.arguments["window_start"]) if name == "step" else Interval(scale)
        weight = rule(order, generator.spec)
        drawn = draws(generator, params, labels, raster, constant_knobs(weight, 0.0), guided=scale != 1)
        raw = along(generator, params, labels, raster, drawn, logits, guided=scale != 1)
        if scale != 1:
            raw = fold(np.stack(np.split(raw, 2), 1).reshape(raw.shape), 2, weight[:, None])
        outputs |= {f"greedy_tokens_{name}": drawn, f"greedy_logits_{name}": raw}
    (plans,) = folder.of("guidance schedules")
    said, ratios = plans.arguments, np.asarray(io["schedule_ratios"])
    fixed(h, cfg_scale=said["cfg_scale"], step_start_ratio=said["window_start"])
    for plan in ("step", "linear", "triangle", "window"):
        start, end = said["window"] if plan == "window" else (said["window_start"], 1.0)
        outputs[f"schedule_{plan}"] = Staged(said["cfg_scale"], plan, start, end, said["peak"]).at(ratios)
    return outputs


CASES = {"gigatok_vq": vq, "gigatok_gpt": gpt}
