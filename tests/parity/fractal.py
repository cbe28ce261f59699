"""FractalGen, of causal and of masked generators."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import begin, constant_knobs, fixed, guided_rows, loaded, numbered, step_of

from ar_jax.convert import fractal
from ar_jax.convert.names import to_weights
from ar_jax.data import Info
from ar_jax.decode.guidance import Linear, Rising
from ar_jax.generators.base import Setting
from ar_jax.generators.causal import Causal
from ar_jax.generators.fractal import MEAN, SPREAD, Infilling, Inside, PreviousPatch, standard
from ar_jax.heads.colours import Colours
from ar_jax.nets.conditioning import Label
from ar_jax.nets.fractal import Enclosed, Entered, FromAbove, Repeated
from ar_jax.nets.vit import ClipViT
from ar_jax.orders import Order, cosine_sizes, raster, rooms, scan_steps, to_slots
from ar_jax.tokenizers.pixels import Pixels

# Draws by address: a row's number in what its level draws, times WIDE, plus its rank, and so on down to the value of a pixel.


class GivenColours(Colours):
    table: Any = None
    wide: int = 0

    def loss(self, h, target, *, key=None, weight=None):
        found = super().loss(h, target)
        self.sow("intermediates", "handed", h)
        self.sow("intermediates", "loss", found)
        return found

    def own(self, keys, j):
        return numbered_within(keys, jnp.full((*keys.shape, 1), j), self.wide)[..., 0]

    def pick(self, logits, keys, temperature):
        row, value = jnp.moveaxis(jax.random.key_data(keys), -1, 0)
        uniform = jnp.asarray(self.table)[row * self.wide + value]
        return (jnp.cumsum(jax.nn.softmax(logits), -1) < uniform[..., None]).sum(-1).astype(jnp.int32)


class GivenInside(Inside):
    noise: Any = None
    wide: int = 0

    def own(self, keys, numbers):
        return numbered_within(keys, jnp.broadcast_to(numbers, (len(keys), len(numbers))), self.wide)

    def ties(self, key, shape):
        return super().ties(key, shape) if self.noise is None else jnp.asarray(self.noise)

    def ordered(self, key, rows):
        return raster(self.generator.spec)


class GivenInfilling(Infilling):
    mask_table: Any = None

    def drawn_mask(self, key, shape):
        return super().drawn_mask(key, shape) if self.mask_table is None else jnp.asarray(self.mask_table)


def numbered_within(keys, numbers, wide):
    row, rank = jnp.moveaxis(jax.random.key_data(keys), -1, 0)[..., None]
    inside = jnp.broadcast_to(row * wide + rank, numbers.shape)
    return jax.random.wrap_key_data(jnp.stack([inside, numbers.astype(jnp.uint32)], -1))


@dataclasses.dataclass(frozen=True, eq=False)
class GivenOrder:
    """Of a level, by the number of the row."""

    slots: Any
    sizes: tuple[int, ...]

    def __call__(self, spec, keys, images, step):
        return Order(jnp.asarray(self.slots)[jax.random.key_data(keys)[:, 0]], self.sizes, rooms(self.sizes, 1))


def lengths(h):
    """Patches in a patch, by level."""
    return [(a // b) ** 2 for a, b in zip(h["img_size_list"], h["img_size_list"][1:])]


def build(folder, wide=0, table=None, masks=(), noise=types.MappingProxyType({}), orders=()):
    """The generator with what is given in the places of draws, in levels from above; and its tokenizer."""
    h = folder.h
    sides, widths, layers, heads = (
        h[f"{name}_list"] for name in ("img_size", "embed_dim", "num_blocks", "num_heads")
    )  # fmt: skip
    *kinds, last = h["generator_type_list"]
    assert last == "ar"

    def head_of(net):
        return GivenColours(net, red=h["r_weight"], threshold=h["filter_threshold"], table=table, wide=wide)

    head = head_of(Enclosed(layers[-1], widths[-1], heads[-1]))
    conds, guides, colours = h["num_conds"], h["guiding_pixel"], [h[f"guide_{name}"] for name in ("depth", "width", "heads")]
    for level in reversed(range(len(kinds))):
        width, net = widths[level], (layers[level], widths[level], heads[level])
        masked = kinds[level] == "mar"
        read = conds if masked else 1
        given = FromAbove(width, read) if level else Repeated(Label(width, apart=True), read)
        if not masked:
            assert kinds[level] == "ar"
            rounded = -(-(8 * width // 3) // h["multiple_of"]) * h["multiple_of"]
            generator = Causal(Entered(*net, hidden=rounded), given, head, PreviousPatch())
        else:
            mask = masks[level] if masks else None
            generator = GivenInfilling(ClipViT(*net, eps=1e-6), given, head, mask_table=mask)
        if level:
            guide = head_of(Enclosed(*colours)) if guides and masked else None
            order = orders[level] if orders and masked else raster
            head = GivenInside(generator, sides[level + 1], order, guide, noise=noise.get(level), wide=wide)
    tokenizer = Pixels((sides[0],) * 2, sides[1])
    return generator.complete(tokenizer.spec, Info(classes=h["class_num"])), tokenizer


def whole(folder):
    h, io = folder.h, folder.io
    fixed(h, pixel_mean=MEAN.astype(float).round(3).tolist(), pixel_std=SPREAD.astype(float).round(3).tolist())
    ids = jnp.asarray(io["pixel_ids"], jnp.int32)
    images = len(ids)
    generator, tokenizer = build(folder)
    params, _ = loaded(generator, folder.weights, fractal)
    tokens = tokenizer.apply({}, jnp.moveaxis(ids, 1, -1) / 127.5 - 1, method="encode")
    outputs = {"image": standard(ids.reshape(images, -1), 3).reshape(ids.shape)}
    outputs |= trained(folder, params, tokens) | predicted(folder, generator, params)
    return outputs | sampled(folder, generator, params)


def trained(folder, params, tokens):
    """Loss, gradients, what the last level is handed, what its guides lose."""
    h, io, images = folder.h, folder.io, len(tokens)
    (case,) = folder.of("fractal.training_loss")
    assert case.arguments["mode"] == "train, dropout 0"
    assert "stored for the mean colours only" in case.arguments["note"]
    # masks hold the rows of patches that are masked above; here all rows are
    n, kinds, masks, noise, rows = lengths(h), h["generator_type_list"], [], {}, np.ones(images, bool)
    for level, count in enumerate(n):
        if h["guiding_pixel"] and level and kinds[level] == "mar":
            full = np.zeros((len(rows), 3), np.float32)
            full[rows] = io[f"train.guiding_noise{level - 1}"]
            noise[level] = full
        mask = np.zeros((len(rows), count), bool)
        mask[rows] = io[f"train.mask_level{level}"] > 0 if kinds[level] == "mar" else True
        masks.append(mask)
        rows = mask.reshape(-1)
    generator, _ = build(folder, masks=masks, noise=noise)
    batch = {"label": jnp.asarray(io["labels"], jnp.int32)}
    drop = jnp.asarray(io["train.label_drop_uniform"] < h["label_drop_prob"])

    @jax.jit
    def run(params):
        def objective(params):
            (loss, weight, _), noted = generator.apply(
                {"params": params}, tokens, batch, raster(generator.spec), drop=drop, key=jax.random.key(0),
                method="loss", mutable="intermediates",
            )  # fmt: skip
            return (loss * weight).sum() / weight.sum(), noted["intermediates"]

        return jax.value_and_grad(objective, has_aux=True)(params)

    (loss, noted), grads = run(params)
    outputs, level = {"train.loss": loss}, 0
    while "head" in noted and "handed" not in (noted := noted["head"]):
        if "guide" in noted:
            mask = masks[level].reshape(-1)
            outputs[f"train.guiding_pixel_loss{level}"] = np.asarray(noted["guide"]["loss"][0]).reshape(-1)[mask].mean()
        noted, level = noted["generator"], level + 1
    handed = np.asarray(noted["handed"][0])
    handed = handed if handed.ndim == 3 else handed[:, :, 0]
    first = folder.shape("train.pixel_condition")[0]
    outputs["train.pixel_condition"] = handed.reshape(-1, handed.shape[-1])[masks[-1].reshape(-1)][:first]
    theirs = to_weights(grads, fractal.rules(generator))
    return outputs | {f"train.grad.{key}": value for key, value in theirs.items()}


def predicted(folder, generator, params):
    io = folder.io
    while "generator" in params["head"]:
        generator, params = generator.head.generator, params["head"]["generator"]
    run = jax.jit(lambda params, h, rgb: generator.head.apply({"params": params}, h, rgb))
    logits = run(params["head"], io["pixel.cond"][:, None], io["pixel.rgb"][:, None])
    return {"pixel.logits": jnp.concatenate(logits, axis=1)}


def sampled(folder, generator, params):
    h, io, n = folder.h, folder.io, lengths(folder.h)
    (case,) = folder.of("fractal.sample")
    given, kinds, images = case.arguments, h["generator_type_list"], len(io["labels"])
    fixed(given, cfg_schedule="linear", filter_threshold=h["filter_threshold"], cfg=h["cfg"], temperature=h["temperature"],
          num_iter_list=h["num_iter_list"])  # fmt: skip
    sizes = [
        cosine_sizes(count, min(count, steps)) if kind == "mar" else (1,) * count
        for count, steps, kind in zip(n, given["num_iter_list"], kinds)
    ]
    wide = max(*n, 3) + 2
    table = np.zeros(images * wide ** (len(n) + 1), np.float32)
    orders = [np.zeros((images * wide**level, count), np.int32) for level, count in enumerate(n)]
    calls = iter(np.split(io["sample.uniform"], np.cumsum(io["sample.uniform_rows"])[:-1]))
    given_orders = iter(())
    if "sample.orders" in io:
        shapes = np.asarray(io["sample.orders_shape"])
        parts = np.split(io["sample.orders"], np.cumsum(shapes.prod(1))[:-1])
        given_orders = iter([part.reshape(shape) for part, shape in zip(parts, shapes)])

    def colour(rows):
        for j in range(3):
            table[rows * wide + j] = next(calls)

    def draws(level, rows):
        """As the reference draws for these rows of a level, depth first."""
        if level == len(n):
            return colour(rows)
        if level and h["guiding_pixel"] and kinds[level] == "mar":
            colour(rows * wide + n[level] + 1)
        slot = np.arange(n[level])[None].repeat(len(rows), 0)
        if kinds[level] == "mar":
            slot = next(given_orders)[:, ::-1]
            orders[level][rows] = slot
        first = 0
        for size in sizes[level]:
            ranks = first + np.argsort(slot[:, first : first + size], axis=1)  # by place
            draws(level + 1, (rows[:, None] * wide + ranks).reshape(-1))
            first += size

    draws(0, np.arange(images))
    assert next(calls, None) is None, "uniform numbers are left"
    fill = [GivenOrder(slots, steps) for slots, steps in zip(orders, sizes)]
    generator, tokenizer = build(folder, wide, table, orders=fill)
    masked = kinds[0] == "mar"
    order = Order(orders[0][:images], sizes[0], rooms(sizes[0], 1)) if masked else raster(generator.spec)
    weight = (Linear if masked else Rising)(given["cfg"])(order, generator.spec)
    knobs = constant_knobs(weight, 1 / given["temperature"])

    @jax.jit
    def run(params):
        cond = guided_rows(generator, params, {"label": jnp.asarray(io["labels"], jnp.int32)})
        setting = Setting(cond, order, knobs)

        def step(state, i, first, size):
            keys = numbered(images, first + jnp.arange(size))
            return generator.apply({"params": params}, state, i, first, keys, setting, method=step_of)

        state = generator.apply({"params": params}, setting, images, method=begin)
        state = scan_steps(order.sizes, step, state, rooms=order.rooms)
        return to_slots(state.tokens, order)

    image = tokenizer.apply({}, run(params), method="decode")
    return {"sample.ids": jnp.moveaxis(jnp.round((image + 1) * 127.5), -1, 1)}


CASES = {"fractalar": whole, "fractalmar": whole}
