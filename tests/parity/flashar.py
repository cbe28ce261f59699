"""FlashAR: the branch from an inner layer, the gate or the one number, losses, decoding by diagonals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import Asked, along, fixed, loaded, logits
from parity.nar import build, greedy, mask, steps

from ar_jax.convert import flashar
from ar_jax.generators.flashar import Fused
from ar_jax.generators.nar import Neighbouring
from ar_jax.nets.conditioning import Label, fold
from ar_jax.orders import to_ranks, to_slots


def model(folder, prefix, **head):
    h, multiple = folder.h, folder.h["multiple_of"]
    hidden = math.ceil(8 * h["dim"] // 3 / multiple) * multiple
    ahead = h["n_layer"] - h["vertical_start_layer"]
    backbone, spec, info = build(h, hidden=hidden, branch=h["vertical_layers"], ahead=ahead)
    fixed(h, cls_token_num=1, grid=spec.scales[0][0])
    generator = Neighbouring(backbone, Label(h["dim"]), Fused(**head)).complete(spec, info)
    weights = {key.removeprefix(prefix): folder.weights[key] for key in folder.weights if key.startswith(prefix)}
    return generator, loaded(generator, weights, flashar)[0]


def targets(folder, order):
    """Tokens to learn in rank order, and which of them count."""
    found = to_ranks(jnp.asarray(folder.io["targets"])[..., None], order)
    return jnp.maximum(found, 0), (found[..., 0] >= 0).astype(jnp.float32)


def said(generator, folder, order):
    """What the neighbours say of every token; of a bound generator."""
    tokens, labels = jnp.asarray(folder.io["tokens"])[..., None], {"label": jnp.asarray(folder.io["labels"])}
    cond = generator.condition(labels, jnp.zeros(len(tokens), bool))
    return generator.hidden(to_ranks(tokens, order), cond, order)


def drawn(folder, generator, params, prefix):
    order, labels = steps(generator.spec), {"label": jnp.asarray(folder.io["labels"])}
    scale = folder.h["guidance_scale"]
    tokens = greedy(generator, params, labels, np.full(len(order.sizes), scale))
    halves = np.split(
        along(generator, params, labels, steps, to_ranks(jnp.asarray(tokens)[..., None], order), logits), 2
    )
    guided = fold(np.stack(halves, 1).reshape(-1, *halves[0].shape[1:]), 2, scale)
    return {f"{prefix}gen": tokens, f"{prefix}gen_logits": guided}


def gated(folder):
    generator, params = model(folder, "gate.", hidden=folder.h["gate_hidden"])
    order, asked = (
        steps(generator.spec),
        Asked(params, flashar.rules(generator), folder.outputs("gate_grad.")),
    )
    target, valid = targets(folder, order)

    @jax.jit
    def run(params):
        def objective(params):
            def parts(self):
                h = said(self, folder, order)
                by_axis, there = self.head.by_axis(h)
                loss = (self.head.loss(h, target) * valid).sum() / valid.sum()
                collapsed = self.head.collapsed(by_axis, there)
                return loss + 0.1 * collapsed, (self.head(h), loss, collapsed, self.head.beside(by_axis))

            return generator.apply({"params": params}, method=parts)

        grads, found = jax.grad(objective, has_aux=True)(params)
        return asked.of(grads), found

    grads, (out, loss, collapsed, part) = run(params)
    part, side = np.asarray(to_slots(part[..., None], order)), folder.h["grid"]
    part = part.reshape(-1, side, side)
    return {
        "mask": mask(generator.spec),
        "gate_logits": to_slots(out, order),
        "gate_loss": loss,
        "gate_gate_interior": part[:, 1:, 1:],
        "gate_gate_corner": part[:, 0, 0],
        "gate_gate_collapse": collapsed,
        **{f"gate_grad.{key}": value for key, value in asked.named(grads).items()},
        **drawn(folder, generator, params, "gate_"),
    }


def mixed(folder):
    h, outputs = folder.h, {}
    generator, params = model(folder, "mix.", mix="scalar", apart=h["split_lambda"])
    order = steps(generator.spec)
    target, valid = targets(folder, order)

    def run(self):
        rows = said(self, folder, order)
        by_axis, there = self.head.by_axis(rows)
        each = self.head.cross_entropy(by_axis, target[..., None, :])
        together = self.head.cross_entropy(self.head(rows), target)
        return self.head(rows), (together * valid).sum() / valid.sum(), self.head.separate(each, there, valid).sum()

    for name, column in (("mix_split_loss", 0.0), ("mix_split_loss_boost", h["column0_boost"])):
        module = generator.clone(head=generator.head.clone(column=column))
        out, loss, split = jax.jit(lambda params, module=module: module.apply({"params": params}, method=run))(params)
        outputs[name] = split / valid.sum()
    outputs |= {"mix_logits": to_slots(out, order), "mix_loss": loss}
    return outputs | drawn(folder, generator, params, "mix_")


def compute(folder):
    return gated(folder) | mixed(folder)


CASES = {"flashar": compute}
