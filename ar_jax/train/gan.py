"""Training of convolutional tokenizers: reconstruction, perceptual and quantiser losses against a discriminator."""

import functools
from typing import Any

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.config import Losses, TokenizerStage
from ar_jax.files.images import to_float, to_uint8
from ar_jax.nets import patchgan
from ar_jax.nets.lpips import Lpips, find_lpips
from ar_jax.tokenizers.quantize import count_codes, usage
from ar_jax.train.optim import make_optimiser, schedule
from ar_jax.train.recipes import Recipe, counted
from ar_jax.train.state import GradFn, create, make_update

ADVERSARIAL = {
    "hinge": (patchgan.hinge_discriminator, patchgan.hinge_generator),
    "vanilla": (patchgan.vanilla_discriminator, patchgan.hinge_generator),
    "non_saturating": (patchgan.non_saturating_discriminator, patchgan.non_saturating_generator),
}
MEMORY = 0.99  # decay of the code frequencies behind the logged perplexity and the usage by level
RARE = 0.08  # less than this part of an even share is no use of a code on a level, as VAR counts it


def tokenizer_recipe(stage: TokenizerStage, tokenizer: Any) -> Recipe:
    """Trains a tokenizer that has `autoencode`, with one codebook (`VQGAN`) or continuous tokens (`KLVAE`)."""
    losses = stage.losses
    if losses.reset_after and not tokenizer.spec.codes:
        raise ValueError(f"losses.reset_after is {losses.reset_after}, but {type(tokenizer).__name__} has no codes")
    judge = (
        patchgan.PatchGan(losses.discriminator_features, losses.discriminator_layers) if losses.adversarial else None
    )
    frozen = find_lpips(losses.lpips_weights or None) if losses.lpips else {}
    tx = make_optimiser(stage.optim, stage.steps, ("model", "discriminator") if judge else ("model",))

    def update_of(tokenizer):
        return make_update(
            tokenizer_gradients(tokenizer, judge, losses),
            tx,
            ema=stage.optim.ema,
            accumulate=stage.optim.accumulate,
            after=functools.partial(revive, after=losses.reset_after)
            if losses.reset_after
            else lambda state, key: state,
        )

    def init(key):
        model_key, judge_key = jax.random.split(key)
        params = {"model": tokenizer.init_params(model_key)}
        extra = {}
        if tokenizer.spec.codes:
            extra["age"] = jnp.zeros(tokenizer.codes, jnp.int32)
            extra["frequency"] = jnp.zeros((_level(tokenizer).max() + 1, tokenizer.codes))
        if losses.reset_after:
            extra["latents"] = jnp.zeros((tokenizer.codes, tokenizer.code_features))
        if judge:
            image = jnp.zeros((1, *tokenizer.size, tokenizer.channels))
            extra["stats"] = judge.init_stats()
            params["discriminator"] = judge.init(judge_key, image, extra["stats"], True)["params"]
        return create(params, extra, tx, stage.optim.ema)

    def preview(params, frozen, batch, key):
        image = to_float(batch["image"])
        recon, _, seen = tokenizer.apply({"params": params}, image, method="autoencode")
        shown = to_uint8(recon)
        a, b = ((x.astype(jnp.float32) / 255) for x in (batch["image"], shown))
        metrics = {"psnr": dm_pix.psnr(a, b).mean(), "ssim": dm_pix.ssim(a, b).mean()}
        if tokenizer.spec.codes:
            metrics |= usage(count_codes(seen["index"], tokenizer.codes, _level(tokenizer)))
        return jnp.stack([batch["image"], shown], axis=1).reshape(-1, *shown.shape[1:]), metrics

    update, flops = counted(update_of, tokenizer)
    return Recipe(
        init=init,
        update=update,
        flops=flops,
        preview=preview,
        frozen=frozen,
        lr=schedule(stage.optim, stage.steps),
        rules=(*(judge.rules if judge else ()), *tokenizer.rules),  # the tokenizer's match some names of both
        advice=advice,
    )


def tokenizer_gradients(tokenizer: Any, judge: patchgan.PatchGan | None, losses: Losses) -> GradFn:
    """Gradients of the tokenizer and, with a discriminator, of both players.

    `frozen` are the LPIPS variables. The published switch (LlamaGen): the discriminator's verdict and its own loss are
    multiplied by 0 before `losses.adversarial_start` and by `losses.adversarial` from then on.
    """
    discriminator_loss, generator_loss = ADVERSARIAL[losses.adversarial_kind]

    def grad_fn(params, extra, frozen, batch, key, step):
        real = to_float(batch["image"])

        def autoencode(model):
            recon, vq, seen = tokenizer.apply({"params": model}, real, key=key, method="autoencode")
            return (recon, sum(vq.values())), (vq, seen)

        def fidelity(recon):
            difference = recon - real
            pixels = jnp.abs(difference).mean() if losses.reconstruction == "l1" else jnp.square(difference).mean()
            total, parts = losses.reconstruction_weight * pixels, {"reconstruction": pixels}
            if losses.lpips:
                parts["lpips"] = Lpips().apply(frozen, recon, real).mean()
                total += losses.lpips * parts["lpips"]
            return total, parts

        (recon, quantiser), pull, (vq, seen) = jax.vjp(autoencode, params["model"], has_aux=True)
        (nll, metrics), push = jax.value_and_grad(fidelity, has_aux=True)(recon)
        metrics |= vq | {"loss": nll + quantiser, "psnr": -10 * jnp.log10(jnp.square(recon - real).mean() / 4)}
        if tokenizer.spec.codes:
            extra = extra | _track(extra, seen, tokenizer)
            metrics |= usage(extra["frequency"], RARE) | {"usage": (extra["age"] < _window(tokenizer, seen)).mean()}

        grads = {}
        if judge:
            weight = jnp.where(step + 1 >= losses.adversarial_start, losses.adversarial, 0.0)
            (verdict, stats), blame = jax.value_and_grad(
                lambda recon: _fool(judge, params["discriminator"], extra["stats"], recon, generator_loss), has_aux=True
            )(recon)
            scale = 1.0
            if losses.adaptive:
                scale = jnp.clip(_at_last(pull, push, quantiser) / (_at_last(pull, blame, quantiser) + 1e-4), 0, 1e4)
            push = push + weight * scale * blame

            def judge_loss(discriminator):
                logits_real, new = judge.apply({"params": discriminator}, real, stats, True)
                logits_fake, new = judge.apply({"params": discriminator}, lax.stop_gradient(recon), new, True)
                return weight * discriminator_loss(logits_real, logits_fake), (new, logits_real, logits_fake)

            grads["discriminator"], (stats, logits_real, logits_fake) = jax.grad(judge_loss, has_aux=True)(
                params["discriminator"]
            )
            extra = extra | {"stats": stats}
            metrics |= {
                "adversarial": verdict, "adversarial_weight": weight * scale,
                "logits_real": logits_real.mean(), "logits_fake": logits_fake.mean(),
            }  # fmt: skip
        (grads["model"],) = pull((push, jnp.ones_like(quantiser)))
        return grads, extra, metrics

    return grad_fn


def _at_last(pull, push, quantiser):
    """Norm of the gradient at the decoder's last convolution; XLA drops the rest of this backward pass."""
    (grads,) = pull((push, jnp.zeros_like(quantiser)))
    return jnp.linalg.norm(grads["decoder"]["conv_out"]["kernel"])


def _fool(judge, discriminator, stats, recon, loss):
    logits, stats = judge.apply({"params": discriminator}, recon, stats, True)
    return loss(logits), stats


def _level(tokenizer):
    return tokenizer.spec.coords[:, 0]


def _track(extra, seen, tokenizer):
    count = count_codes(seen["index"], tokenizer.codes, _level(tokenizer))
    tracked = {
        "age": jnp.where(count.sum(0) > 0, 0, extra["age"] + 1),
        "frequency": MEMORY * extra["frequency"] + (1 - MEMORY) * count / seen["index"].size,
    }
    if "latents" in extra:
        latents = seen["latents"].reshape(-1, seen["latents"].shape[-1])
        tracked["latents"] = latents[_candidates(_level(tokenizer), len(seen["index"]), tokenizer.codes)]
    return tracked


def _candidates(level, images, codes):
    """Which latents of a batch may take a dead code's place, int [codes]: of all levels equally many, at random."""
    random, places = np.random.default_rng(0), np.arange(images * len(level))
    some = [random.permutation(places[np.tile(level == i, images)]) for i in range(level.max() + 1)]
    return np.stack([np.resize(one, codes) for one in some], axis=1).reshape(-1)[:codes]


def _window(tokenizer, seen):
    """Updates within which evenly used codes would all but surely occur: 65,536 ids as in LlamaGen, at least 4 a code."""
    return max(1, max(65536, 4 * tokenizer.codes) // seen["index"].size)


def revive(state, key, after):
    """Puts random latents of the current batch in the place of codes unused for `after` updates."""
    dead = state.extra["age"] >= after
    chosen = jax.random.permutation(key, state.extra["latents"])

    def renew(model):
        return model | {"codebook": jnp.where(dead[:, None], chosen, model["codebook"])}

    return state.replace(
        params=state.params | {"model": renew(state.params["model"])},
        ema=None if state.ema is None else renew(state.ema),
        extra=state.extra | {"age": jnp.where(dead, 0, state.extra["age"])},
    )


def advice(metrics):
    """What to do when the codebook collapses."""
    if metrics.get("usage", 1) >= 0.1:
        return ""
    return (
        f"only {metrics['usage']:.1%} of the codes are in use: the codebook is collapsing. Remedies, the mildest first: "
        "--tokenizer.losses.reset-after 100 (replace dead codes), --tokenizer.module.vq.entropy 0.1 (reward even use), "
        "fewer codes (--tokenizer.module.codes), narrower ones (--tokenizer.module.code-features 8)"
    )
