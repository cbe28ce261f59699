"""What a training loop has to know of a method: how to begin, how to update, what to show."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ar_jax.config import GeneratorStage
from ar_jax.files.images import to_float, to_uint8
from ar_jax.machine import shares
from ar_jax.machine.flops import model_flops, without_remat
from ar_jax.machine.sharding import Rules, gathered
from ar_jax.train.optim import Optim, decayed, make_optimiser, only_trained, schedule
from ar_jax.train.state import GradFn, TrainState, create, make_update
from ar_jax.typing import Array, Batch, Float, Metrics, Params, PRNGKey, Tokens, UInt8


class Recipe(NamedTuple):
    """A method, closed over everything it is made of; all functions may be jitted.

    Attributes:
      init: key -> state.
      update: state, frozen, batch, key -> state, metrics.
      flops: of one update, from the same arguments (see `flops.model_flops`); recomputation does not count.
      preview: model parameters, frozen, batch, key -> uint8 images to look at, as many for every row, and metrics of a
        held-out batch, in which rows count by "valid", if the batch has it.
      frozen: parameters that are read but not trained.
      lr: learning rate by update, for the log.
      rules: what tensor parallelism divides (see `sharding.shard`).
      advice: metrics -> a warning in words, or "".
    """

    init: Callable[[PRNGKey], TrainState]
    update: Callable[[TrainState, Params, Batch, PRNGKey], tuple[TrainState, Metrics]]
    flops: Callable[[TrainState, Params, Batch, PRNGKey], float]
    preview: Callable[[Params, Params, Batch, PRNGKey], tuple[UInt8[Array, "m h w c"], Metrics]]
    frozen: Params
    lr: Callable[[int], float]
    rules: Rules = ()
    advice: Callable[[dict[str, float]], str] = lambda metrics: ""


def counted(update_of: Callable[[Any], Callable], module: Any) -> tuple[Callable, Callable]:
    """`update` and `flops` of a recipe; traced once for both, unless something is computed again in the backward pass."""
    update, plain = jax.jit(update_of(module)), without_remat(module)
    return update, functools.partial(model_flops, update if plain == module else update_of(plain))


# (model params, frozen, batch, key, step) -> (loss, metrics)
LossFn = Callable[[Params, Params, Batch, PRNGKey, Array], tuple[Float[Array, ""], Metrics]]


def generator_loss(
    generator: Any, tokenizer: Any, order_fn: Callable, drop_rate: float, train: bool = True, mistaken: float = 0.0
) -> LossFn:
    """Mean loss of a generator over the tokens of a batch; with dropout if `train`.

    `frozen` are the tokenizer's parameters. A batch holds "image" (uint8), "moments" that tokens are drawn from, or ready
    "tokens"; and the condition. A part of the images is `mistaken` (see `GeneratorStage`). The generator's memory, if it has one,
    comes last (see `Generator.memory`).
    """

    def loss_fn(params, frozen, batch, key, step, memory=None):
        order_key, drop_key, loss_key, encode_key, dropout_key = jax.random.split(key, 5)
        call = functools.partial(tokenizer.apply, {"params": frozen})
        if "tokens" in batch:
            tokens = batch["tokens"]
        elif "moments" in batch:
            tokens = call(batch["moments"], key=encode_key, method="drawn")
        else:
            tokens = call(to_float(batch["image"]), key=encode_key, method="encode")
        images, more = len(tokens), {"step": step} if getattr(generator, "stepped", False) else {}
        if mistaken:
            choice, which = jax.random.split(jax.random.fold_in(encode_key, 1))
            pair = call(to_float(batch["image"]), key=which, method="corrected")
            uniform = shares.draw(jax.random.uniform, choice, (images,))
            more["given"], tokens = with_mistakes(uniform, mistaken, tokens, *pair)
        loss, weight, metrics = generator.apply(
            {"params": params}, tokens, batch,
            order_fn(generator.spec, shares.draw(jax.random.split, order_key, (images,)), images, step), method="loss", tokenizer=call,
            drop=shares.draw(jax.random.uniform, drop_key, (images,)) < drop_rate, key=loss_key,
            rngs={"dropout": dropout_key} if train else {}, **more, **({} if memory is None else {"memory": memory}),
        )  # fmt: skip
        mean = (loss * weight).sum() / jnp.maximum(weight.sum(), 1e-9)
        return mean, {"loss": mean, "weight": weight.sum(), **metrics}

    return loss_fn


def with_mistakes(
    uniform: Float[Array, "b"], share: float, tokens: Tokens, given: Tokens, corrected: Tokens
) -> tuple[Tokens, Tokens]:
    """Tokens that are given and that are to be predicted: those with a mistake, for a share of the images, or plain ones.

    Args:
      uniform: numbers in [0, 1); images below the share have a mistake.
      tokens: plain ones.
      given, corrected: as of a tokenizer's `corrected`.
    Source: DetailFlow (arXiv:2505.21473).
    """
    some = (uniform < share)[:, None, None]
    return jnp.where(some, given, tokens), jnp.where(some, corrected, tokens)


def gradients(loss_fn: LossFn, optim: Optim = Optim()) -> GradFn:
    """The gradient of a plain loss of `params["model"]`, zero for what `optim` does not train; `extra` may have a memory."""

    def trained(params, *rest):
        return loss_fn(only_trained(optim, params), *rest)

    def grad_fn(params, extra, frozen, batch, key, step):
        memory = [extra["memory"]] if "memory" in extra else []
        grads, metrics = jax.grad(trained, has_aux=True)(params["model"], frozen, batch, key, step, *memory)
        return {"model": grads}, {name: metrics.pop(name) for name in extra}, metrics

    return grad_fn


def update_settings(optim: Optim) -> dict[str, Any]:
    """What `make_update` is told of an optimiser's settings."""
    return {"ema": optim.ema, "accumulate": optim.accumulate, "float32": optim.gradients == "float32"}


def generator_recipe(stage: GeneratorStage, generator: Any, tokenizer: Any, frozen: Params) -> Recipe:
    """Trains a generator on a frozen tokenizer's tokens."""
    tx = make_optimiser(stage.optim, stage.steps, {"model": decayed(generator.init_params)})
    train_order = stage.train_order or stage.order
    _check_mistaken(stage, generator, tokenizer)
    held_out_loss = generator_loss(generator, tokenizer, train_order, 0.0, train=False)

    # Methods from elsewhere may draw for rows without `shares.draw`: these sum gradients once a part, which is right for all
    parts = generator, generator.conditioning, train_order, tokenizer, *generator.parts().values()
    memory = generator.memory()  # which shares of a batch would have to exchange
    by_rows = all(getattr(part, "func", part).__module__.startswith("ar_jax.") for part in parts)

    def rounded(params):
        def one(path, own, multiplied):
            return own.astype(multiplied.dtype) if path[-1].key == "kernel" else own

        return {"model": jax.tree.map_with_path(one, params["model"], generator.multiplied(params["model"]))}

    def update_of(generator):
        loss = generator_loss(generator, tokenizer, train_order, stage.drop, mistaken=stage.mistaken)
        grad_fn = gradients(loss, stage.optim)
        return make_update(grad_fn, tx, rounded=rounded if by_rows and not memory else None, **update_settings(stage.optim))

    def init(key):
        extra = {"memory": memory} if memory else {}
        return create({"model": generator.init_params(key)}, extra, tx, stage.optim.ema)

    def preview(params, frozen, batch, key):
        count = len(next(iter(batch.values())))
        drawer, decoder, order_fn = stage.sampling.adapted(generator, tokenizer, stage.order)
        keys = jax.random.split(key, count)
        order = order_fn(drawer.spec, keys, count, stage.steps)
        # once for all steps, as sampling has them
        held = gathered(drawer.multiplied(params), drawer.rules)
        images, _ = stage.sampling.images(drawer, decoder, held, frozen, batch, order, keys=keys)
        # the same order at every preview, or losses could not be compared
        loss, _ = held_out_loss(params, frozen, batch, jax.random.key(0), stage.steps)
        return to_uint8(images), {"loss": loss}

    update, flops = counted(update_of, generator)
    return Recipe(
        init=init,
        update=update,
        flops=flops,
        preview=preview,
        frozen=frozen,
        lr=schedule(stage.optim, stage.steps),
        rules=generator.rules,
    )


def _check_mistaken(stage, generator, tokenizer):
    if not stage.mistaken:
        return
    wrong = f"generator.mistaken is {stage.mistaken}, but "
    if not hasattr(tokenizer, "corrected"):
        raise ValueError(f"{wrong}{type(tokenizer).__name__} does not say what would make up for a mistake; give 0")
    if not getattr(generator, "corrects", False):
        raise ValueError(f"{wrong}{type(generator).__name__} cannot be given tokens with mistakes; give 0")
    if stage.tokens:
        raise ValueError(f'{wrong}a cache holds no mistakes; give 0, or --generator.tokens "" to encode images')
