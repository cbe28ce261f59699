"""Halton-MaskGIT: the transformer, its training, and sampling with uniform numbers that are given."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import Asked, constant_knobs, fixed, guided_rows, loaded

from ar_jax.convert import halton as source
from ar_jax.decode.logits import Filter
from ar_jax.decode.temperature import Sharper
from ar_jax.generators.base import Setting, Step
from ar_jax.generators.halton_maskgit import HaltonMaskGIT, Ready
from ar_jax.orders import Halton, to_slots, whole


class GivenHead(Ready):
    """Draws the entry at a given part of the probability, of the largest ones in falling order if there are few."""

    uniform: Any = None
    largest: int = 0

    def draw(self, logits, keys, knobs, i):
        p = jax.nn.softmax(logits)
        entry = (
            jnp.argsort(-p, axis=-1)[..., : self.largest]
            if self.largest
            else jnp.broadcast_to(np.arange(p.shape[-1]), p.shape)
        )
        mass = jnp.cumsum(jnp.take_along_axis(p, entry, axis=-1), axis=-1)
        place = (mass <= jnp.asarray(self.uniform)[i][..., None]).sum(-1, keepdims=True)
        return jnp.take_along_axis(entry, jnp.minimum(place, entry.shape[-1] - 1), axis=-1).astype(jnp.int32)


class GivenMask(HaltonMaskGIT):
    """Takes the numbers that training hides slots by as they are given."""

    numbers: Any = None

    def drawn_mask(self, progress, scores):
        return super().drawn_mask(*self.numbers)


def drawn(module, params, labels, uniform, weight, temperature, largest=0, shifts=None):
    """Tokens, and what is revealed in every step."""
    images, steps = len(labels), len(uniform)
    head = GivenHead(module.head.codes, all=True, uniform=uniform, largest=largest)
    drawer, order = module.clone(head=head), Halton(steps, rolled=False)(module.spec)
    if shifts is not None:
        order = order.replace(slot=np.stack([np.roll(order.slot[0], shift) for shift in shifts]))
    knobs = constant_knobs(np.full(steps, weight)).replace(
        temperature=temperature(order, module.spec), filter=Filter(top_k=largest)
    )
    keys, firsts = jax.random.split(jax.random.key(0), (images, 1)), np.cumsum(order.sizes) - order.sizes

    @jax.jit
    def run(params):
        cond = guided_rows(drawer, params, {"label": labels}, weight != 1)
        setting, call = Setting(cond, order, knobs), functools.partial(drawer.apply, {"params": params})
        state, known = call(setting, images, method="begin"), []
        for i, first in enumerate(firsts):
            before, state = state.known, call(state, Step(i, int(first), keys), setting, method="step")
            known.append(state.known & ~before)
        return to_slots(state.tokens, order)[..., 0], jnp.stack(known)

    return run(params)


def halton_maskgit(folder):
    h, io = folder.h, folder.io
    shapes = {key: np.shape(folder.weights[key]) for key in folder.weights}
    module = source.build("generator", shapes, size=0, heads=h["heads"], groups=0, scales=())
    module, net = module.clone(backbone=module.backbone.clone(dropout=0.0)), module.backbone
    side = module.spec.scales[0][0]
    fixed(
        h, input_size=side, hidden_dim=net.width, codebook_size=module.spec.codes[0], depth=net.layers, register=net.registers,
        nclass=module.conditioning.classes, proj=1, ff_multiple_of=256, batch=len(io["labels"]),
    )  # fmt: skip
    params, _ = loaded(module, folder.weights, source)
    labels, drop = jnp.asarray(io["labels"], jnp.int32), jnp.asarray(io["drop"]) > 0
    ids, codes = (jnp.asarray(io[name], jnp.int32).reshape(len(labels), -1, 1) for name in ("ids", "codes"))
    numbers = jnp.asarray(io["u_rate"])[:, None], jnp.asarray(io["u_mask"]).reshape(len(labels), -1)
    names = [name.removeprefix("loss.grad.") for name in folder.want if name.startswith("loss.grad.")]
    asked = Asked(params, source.rules(module), names)
    fields = {name: getattr(module, name) for name in module.__dataclass_fields__ if name not in ("parent", "name")}
    trained = GivenMask(**fields, numbers=numbers)

    @jax.jit
    def run(params):
        def logits(self):
            return self.hidden(ids, ids[..., 0] == module.spec.codes[0], self.condition({"label": labels}, drop))

        def objective(params):
            loss, weight, _ = trained.apply(
                {"params": params},
                codes,
                {"label": labels},
                whole(module.spec),
                drop=drop,
                key=jax.random.key(0),
                method="loss",
            )
            return (loss * weight).sum() / weight.sum()

        loss, grads = jax.value_and_grad(objective)(params)
        return module.apply({"params": params}, method=logits), loss, asked.of(grads)

    shown, loss, grads = run(params)
    outputs = {"logits": shown, "loss": loss, "train_mask": module.drawn_mask(*numbers)}
    outputs |= {f"loss.grad.{key}": value for key, value in asked.named(grads).items()}
    draw = functools.partial(drawn, module, params, labels, jnp.asarray(io["u_code"]))
    assert len(io["u_code"]) == h["step"]
    rising = Sharper(1 / h["sm_temp_min"], 1 / h["sm_temp_max"], h["temp_warmup"])
    outputs["sample"], outputs["step_masks"] = draw(1 + h["w"], rising)
    outputs["sample_topk"], _ = draw(1.0, Sharper(), largest=h["top_k"])
    outputs["sample_random"], _ = draw(1 + h["w"], Sharper(), shifts=io["shifts"])
    return outputs


CASES = {"halton_maskgit": halton_maskgit}
