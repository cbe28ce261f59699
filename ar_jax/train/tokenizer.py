"""Training of tokenizers: an objective made of parts, against a discriminator if there is one."""

import functools
import re
from typing import Any

import dm_pix
import jax
import jax.numpy as jnp
from jax import lax

from ar_jax.config import TokenizerStage
from ar_jax.files.images import to_float, to_uint8
from ar_jax.generators.base import image_weight
from ar_jax.tokenizers.conditioned import said_of
from ar_jax.tokenizers.quantize import count_codes, usage
from ar_jax.train import codes
from ar_jax.train.losses import ADVERSARIAL, LECAM, Losses
from ar_jax.train.optim import decayed, make_optimiser, schedule
from ar_jax.train.recipes import Recipe, counted, update_settings
from ar_jax.train.state import GradFn, create, make_update
from ar_jax.typing import Array, Batch, Index, Metrics, Params, PRNGKey

USAGE = re.compile(r"usage(/code\d+)?")


def tokenizer_recipe(stage: TokenizerStage, tokenizer: Any) -> Recipe:
    """Trains a tokenizer for `stage.losses`; what a tokenizer has to say of itself stands in `tokenizers/__init__.py`.

    Raises:
      ValueError: losses that the tokenizer cannot be trained for, or without their weights.
    """
    losses, name = stage.losses, type(tokenizer).__name__
    codes.check_reset(tokenizer, losses.reset_after)
    judge = losses.judge if losses.adversarial else None
    if judge and losses.adaptive and not getattr(tokenizer, "last_layer", ""):
        raise ValueError(f"losses.adaptive is True, but {name} has no last_layer to measure gradients at; give False")
    parts = losses.parts()
    frozen = {name: found for name, part in parts.items() if (found := part.open())}
    image, names = jnp.zeros((1, *tokenizer.size, tokenizer.channels)), _looked_at(losses)
    made = jax.eval_shape(
        lambda key: training_pass(tokenizer, tokenizer.init_params(key), image, key, names)[0], jax.random.key(0)
    )

    def begun(key, i, name, part):
        ready = jnp.zeros(made[part.on].shape, made[part.on].dtype)
        return part.init(jax.random.fold_in(key, i), frozen.get(name, {}), image, ready)

    # those that are trained beside the tokenizer: how their parameters begin, and which of them may be shrunk
    others = {name: functools.partial(begun, i=i, name=name, part=part) for i, (name, part) in enumerate(parts.items())}
    if judge:
        others["discriminator"] = lambda key: judge.init(key, image, judge.init_stats(), True)["params"]
    shrinks = {name: may for name, make in others.items() if (may := decayed(make))}
    tx = make_optimiser(stage.optim, stage.steps, {"model": decayed(tokenizer.init_params)} | shrinks)

    def update_of(tokenizer):
        return make_update(
            tokenizer_gradients(tokenizer, losses),
            tx,
            **update_settings(stage.optim),
            after=functools.partial(codes.renew, tokenizer=tokenizer, after=losses.reset_after)
            if losses.reset_after or codes.averaged(tokenizer)
            else lambda state, key: state,
        )

    def init(key):
        model_key, others_key = jax.random.split(key)
        params = {"model": tokenizer.init_params(model_key)}
        extra = codes.begin(tokenizer, params["model"], bool(losses.reset_after))
        if judge:
            extra["stats"] = judge.init_stats()
            extra |= {"lecam": jnp.zeros(2)} if losses.lecam else {}
        params |= {name: others[name](others_key) for name in shrinks}
        return create(params, extra, tx, stage.optim.ema)

    def preview(params, frozen, batch, key):
        image = to_float(batch["image"])
        recon, tokens = reconstruct(tokenizer, params, image, key, batch)
        shown = to_uint8(recon)
        a, b = ((x.astype(jnp.float32) / 255) for x in (batch["image"], shown))
        weight = image_weight(batch, len(image))
        mean = lambda x: (x * weight).sum() / weight.sum()  # noqa: E731
        metrics = {"psnr": mean(dm_pix.psnr(a, b)), "ssim": mean(dm_pix.ssim(a, b))}
        if tokenizer.spec.codes:
            metrics |= usage(count_codes(tokens, tokenizer.spec, weight), tokenizer.spec.codes)
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
        advice=functools.partial(advice, learned=any(book.path for book in codes.codebooks(tokenizer))),
    )


def reconstruct(
    tokenizer: Any, params: Params, image: Array, key: PRNGKey, batch: Batch | None = None
) -> tuple[Array, Array | None]:
    """Images as the tokenizer shows them, and their tokens, if they are codes; a generative decoder draws by `key`.

    Args:
      batch: what is said of the images, for tokenizers that look at it (`conditioned.said_of`).
    """
    call, said = functools.partial(tokenizer.apply, {"params": params}), said_of(tokenizer, batch)
    if getattr(tokenizer, "generative", False):
        tokens = call(image, method="encode")
        return call(tokens, key=key, method="decode", **said), tokens
    recon, _, seen = call(image, method="autoencode", **said)
    return recon, seen.get("tokens")


def tokenizer_gradients(tokenizer: Any, losses: Losses) -> GradFn:
    """Gradients of the tokenizer, of what parts of the objective train beside it, and of the discriminator, if there is one.

    `frozen` are the parts' frozen parameters by name. The published switch (LlamaGen): the discriminator's verdict and its
    own loss are multiplied by 0 before `losses.adversarial_start` and by `losses.adversarial` from then on.
    """
    parts, judge = losses.parts(), losses.judge if losses.adversarial else None
    names = _looked_at(losses)
    discriminator_loss, generator_loss = ADVERSARIAL[losses.adversarial_kind]

    def grad_fn(params, extra, frozen, batch, key, step):
        real = to_float(batch["image"])

        def make(model):
            made, own, seen = training_pass(tokenizer, model, real, key, names, step, batch)
            return (made, sum(own.values(), jnp.zeros(()))), (own, seen)

        def compare(made, trained):
            found = {
                name: part(
                    trained.get(name, {}), frozen.get(name, {}), target if part.on == "image" else real, made[part.on]
                )
                for name, part in parts.items()
            }
            return sum((parts[name].weight * value for name, value in found.items()), jnp.zeros(())), found

        trained = {name: params[name] for name in parts if name in params}
        (made, own_loss), pull, (own, seen) = jax.vjp(make, params["model"], has_aux=True)
        target = seen.get("target", real)
        (compared, metrics), (push, grads) = jax.value_and_grad(compare, argnums=(0, 1), has_aux=True)(made, trained)
        metrics |= own | {"loss": compared + own_loss}
        if "image" in made:
            metrics["psnr"] = -10 * jnp.log10(jnp.square(made["image"] - target).mean() / 4)
        if tokenizer.spec.codes:
            extra, figures = codes.track(extra, seen, tokenizer)
            metrics |= figures

        if judge:
            weight = jnp.where(step + 1 >= losses.adversarial_start, losses.adversarial, 0.0)
            (verdict, stats), blame = jax.value_and_grad(
                lambda recon: _fool(judge, params["discriminator"], extra["stats"], recon, generator_loss), has_aux=True
            )(made["image"])
            scale = 1.0
            if losses.adaptive:
                at_last = functools.partial(_at_last, tokenizer, pull, push, own_loss)
                scale = jnp.clip(at_last(push["image"]) / (at_last(blame) + 1e-4), 0, 1e4)
            push["image"] += weight * scale * blame

            def judge_loss(discriminator):
                logits_real, new = judge.apply({"params": discriminator}, target, stats, True)
                recon = lax.stop_gradient(made["image"])
                logits_fake, new = judge.apply({"params": discriminator}, recon, new, True)
                loss, kept = discriminator_loss(logits_real, logits_fake), {"stats": new}
                if losses.lecam:
                    apart, kept["lecam"] = LECAM[losses.lecam_kind](logits_real, logits_fake, extra["lecam"])
                    loss += losses.lecam * apart
                return weight * loss, (kept, logits_real, logits_fake)

            grads["discriminator"], (kept, logits_real, logits_fake) = jax.grad(judge_loss, has_aux=True)(
                params["discriminator"]
            )
            extra = extra | kept
            metrics |= {
                "adversarial": verdict, "adversarial_weight": weight * scale,
                "logits_real": logits_real.mean(), "logits_fake": logits_fake.mean(),
            }  # fmt: skip
        (grads["model"],) = pull((push, jnp.ones_like(own_loss)))
        return grads, extra, metrics

    return grad_fn


def training_pass(
    tokenizer: Any, params: Params, image: Array, key: PRNGKey | None, names: frozenset[str], step: Index = 0,
    batch: Batch | None = None,
) -> tuple[dict[str, Array], Metrics, Metrics]:
    """What `autoencode` makes of images under those names (see `Part.on`), what it reports as losses, and what it shows.

    Raises:
      ValueError: it makes nothing of that name.
    """

    def kept(module, method):
        return method == "__call__" and "/".join(module.path) in names

    plan = said_of(tokenizer, batch) | ({"step": step} if getattr(tokenizer, "stepped", False) else {})
    (recon, own, seen), inside = tokenizer.apply(
        {"params": params},
        image,
        key=key,
        **plan,
        method="autoencode",
        capture_intermediates=kept,
        mutable=["intermediates"],
    )
    shown = {name: x for name, x in seen.items() if not isinstance(x, tuple)}  # not latents of several codebooks
    made = {}
    for name in sorted(names):
        found = recon if name == "image" else shown.get(name)
        if found is None and name != "image":
            found = inside.get("intermediates", {})
            for part in name.split("/"):
                found = found.get(part, {})
            found = found["__call__"][-1] if "__call__" in found else None
        if found is None:
            raise ValueError(_missing(type(tokenizer).__name__, name, shown))
        made[name] = found
    return made, own, seen


def _missing(tokenizer, name, shown):
    if name == "image":
        return (
            f"{tokenizer} reconstructs no image in training, so its losses can look at none: set "
            "losses.reconstruction_weight, losses.lpips and losses.adversarial to 0"
        )
    return (
        f"a loss looks at {name!r}, but {tokenizer} shows {', '.join(shown) or 'nothing'} and has no module of that path; "
        'give one of these, or a path such as "decoder/mid_1"'
    )


def _looked_at(losses):
    names = {part.on for part in losses.parts().values()}
    return frozenset(names | ({"image"} if losses.adversarial else set()))


def _at_last(tokenizer, pull, push, own_loss, of_image):
    """Norm of a gradient of the image at the tokenizer's last layer; XLA drops the rest of this backward pass."""
    (grads,) = pull((jax.tree.map(jnp.zeros_like, push) | {"image": of_image}, jnp.zeros_like(own_loss)))
    for name in tokenizer.last_layer.split("/"):
        grads = grads[name]
    return jnp.linalg.norm(grads)


def _fool(judge, discriminator, stats, recon, loss):
    logits, stats = judge.apply({"params": discriminator}, recon, stats, True)
    return loss(logits), stats


def advice(metrics: dict[str, float], learned: bool = True) -> str:
    """What to do when a codebook collapses."""
    share, name = min([(value, name) for name, value in metrics.items() if USAGE.fullmatch(name)], default=(1.0, ""))
    if share >= 0.1:
        return ""
    of = f" of sub-code {name.removeprefix('usage/code')}" if "/" in name else ""
    collapsing = (
        f"only {share:.1%} of the codes{of} are in use: the codebook is collapsing. Remedies, the mildest first: "
    )
    if not learned:
        return f"{collapsing}a larger weight of the tokenizer's entropy loss, fewer codes"
    return (
        f"{collapsing}--tokenizer.losses.reset-after 100 (replace dead codes), --tokenizer.module.vq.entropy 0.1 (reward "
        "even use), fewer codes (--tokenizer.module.codes), narrower ones (--tokenizer.module.code-features 8)"
    )
