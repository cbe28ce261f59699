"""ELM's generator: sub-codes of bits, all drawn at once, and its plans of guidance."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import along, draws, fixed, loaded, logits

from ar_jax.convert import elm as source
from ar_jax.convert.names import to_weights
from ar_jax.data import Info
from ar_jax.decode.edit import Source
from ar_jax.decode.guidance import Interval, Rising
from ar_jax.decode.logits import Filter
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.sequential import Sequential, Task
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.heads.bitwise import Bitwise
from ar_jax.nets.conditioning import Label
from ar_jax.nets.positions import NOWHERE, rotary
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokenizers.binary_autoencoder import bits_of, codes_of
from ar_jax.tokens import TokenSpec, grid


class GivenUniforms(Bitwise):
    """Draws how many cumulative probabilities are no larger than a uniform number of a table [steps k images]."""

    table: Any = None

    def draw(self, logits, keys, knobs, i):
        total = jnp.cumsum(jax.nn.softmax(logits), axis=-1)
        return (total <= jnp.asarray(self.table)[i].T[:, None, :, None]).sum(-1).astype(jnp.int32)


def listed(x):
    """Nested tuples of an array, which a module that programs are kept for can hold."""
    return tuple(map(listed, x)) if np.ndim(x) else float(x)


def gpt(folder):
    h, io = folder.h, folder.io
    k, width, side = h["token_each"], h["dim"], h["grid"]
    parts, hidden = (h["code_dim"],) * k, -(-int(8 * width / 3) // h["multiple_of"]) * h["multiple_of"]
    net = Transformer(h["n_layer"], width, h["n_head"], hidden=hidden, base=h["rope_base"], eps=h["norm_eps"])
    spec = TokenSpec(grid(side, side), codes=(2 ** h["code_dim"],) * k)
    generator = Causal(net, Label(width), Bitwise(bias=False, std=0.0), source.inputs(k)).complete(
        spec, Info(classes=h["num_classes"])
    )
    params, _ = loaded(generator, folder.weights, source)
    fixed(h, gen_labels=io["gen_labels"].tolist())
    fixed(folder.of("teacher forcing")[0].arguments, dropout=0)
    order, batch = raster(spec), {"label": jnp.asarray(io["labels"])}
    flat = lambda maps: jnp.moveaxis(jnp.asarray(maps, jnp.int32), 1, -1).reshape(len(maps), spec.n, -1)  # noqa: E731
    tokens = codes_of(flat(io["bits"]), parts)

    @jax.jit
    def forced(params):
        def run(self):
            keep = jnp.zeros(len(tokens), bool)
            loss, weight, _ = self.loss(tokens, batch, order, drop=keep)
            return (loss * weight).sum() / weight.sum(), self.head(
                self.hidden(tokens, self.condition(batch, keep), order)
            )

        return jax.value_and_grad(lambda params: generator.apply({"params": params}, method=run), has_aux=True)(params)

    (loss, shown), grads = forced(params)
    named = to_weights(jax.tree.map(np.asarray, grads), source.rules(generator))
    coords = np.concatenate([np.full((1, 3), NOWHERE), spec.coords])[None]
    outputs = {
        "token_ids": tokens,
        "tf_logits": shown,
        "tf_loss": loss,
        "rope_table": jnp.moveaxis(rotary(coords, width // h["n_head"], h["rope_base"])[:, 0, :, ::2], 0, -1),
        **{f"tf.grad.{name}": named[name] for name in h["grads"]},
    }

    labels, scale, keep = {"label": jnp.asarray(io["gen_labels"])}, h["cfg_scale"], Filter(h["top_k"])
    ways = {"linear": Rising(scale), "constant": Interval(scale)}

    def drawn(case, module, temperature):
        sampling = Sampling(ways[case.arguments["cfg_schedule"]], Constant(temperature), keep)
        knobs = sampling.knobs(order, spec)
        ids = draws(module, params, labels, raster, knobs, guided=True)
        cond, uncond = np.split(along(generator, params, labels, raster, ids, logits), 2)
        guided = uncond + knobs.guidance[:, None, None] * (cond - uncond)
        chances = jax.nn.softmax(keep(jnp.asarray(guided / h["temperature"])))
        return ids, chances.transpose(1, 2, 0, 3)

    (greedy,), (given,), (after,) = (folder.of(name) for name in ("guided greedy", "guided sampling", "continuation"))
    outputs["gen_greedy_ids"], outputs["gen_greedy_probs"] = drawn(greedy, generator, 0.0)
    drawing = generator.clone(head=GivenUniforms(spec.codes, bias=False, std=0.0, table=listed(io["uniforms"])))
    outputs["gen_drawn_ids"], outputs["gen_drawn_probs"] = drawn(given, drawing, h["temperature"])
    bits = bits_of(jnp.asarray(outputs["gen_greedy_ids"]), parts)
    outputs["gen_codes"] = jnp.moveaxis(bits, -1, 1)

    # known tokens first: a plan counts the steps that draw
    first, rule = h["prefix_len"], ways[after.arguments["cfg_schedule"]]
    rest = raster(TokenSpec(spec.coords[first:], codes=spec.codes))
    knobs = Sampling(rule, Constant(0.0), keep).knobs(order, spec)
    knobs = knobs.replace(guidance=np.concatenate([np.ones(first, np.float32), rule(rest, spec)]))
    known = jnp.broadcast_to(jnp.arange(spec.n) < first, (len(io["prefix"]), spec.n))
    held = Source(jnp.pad(jnp.asarray(io["prefix"]), ((0, 0), (0, spec.n - first), (0, 0))), known)

    @jax.jit
    def continued(params):
        keys = jax.random.split(jax.random.key(0), len(known))
        return Sequential()(Task(generator, params, labels, order, knobs, keys, True, source=held))[0]

    outputs["gen_prefix_ids"] = continued(params)
    steps = raster(TokenSpec(grid(1, h["schedule_steps"]), codes=(2,)))
    return outputs | {f"cfg_{plan}": Rising(scale, plan)(steps, spec) for plan in folder.outputs("cfg_")}


CASES = {"elm_gpt": gpt}
