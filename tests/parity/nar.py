"""NAR: the class-conditional transformer with its two readouts, and diagonal decoding."""

import jax.numpy as jnp
import numpy as np
from parity.common import along, constant_knobs, draws, fixed, loaded, logits

from ar_jax.convert import nar
from ar_jax.data import Info
from ar_jax.generators.nar import Branched, Neighbouring
from ar_jax.nets.attention import visible
from ar_jax.nets.conditioning import Label
from ar_jax.orders import Diagonals, to_ranks, to_slots
from ar_jax.tokens import TokenSpec, grid


def steps(spec):
    """An order whose steps all have the room of their size."""
    return Diagonals()(spec).replace(rooms=())


def mask(spec, p=1):
    """Who sees whom among p condition rows and the cells in raster order."""
    order = steps(spec)
    step = np.concatenate([np.arange(1 - p, 1), 1 + order.step[np.argsort(order.slot[0])]]).astype(np.int32)
    return visible(step, step)


def build(h, **net):
    side = round(h["block_size"] ** 0.5)
    backbone = Branched(
        layers=h["n_layer"], width=h["dim"], heads=h["n_head"], base=h["rope_base"], eps=h["norm_eps"], dropout=0.1, **net
    )  # fmt: skip
    return backbone, TokenSpec(grid(side, side), codes=(h["vocab_size"],)), Info(classes=h["num_classes"])


def teacher_forced(generator, batch, tokens):
    """Logits [b n v] in raster order, and the mean loss; of a bound generator."""
    order, drop = steps(generator.spec), jnp.zeros(len(tokens), bool)
    h = generator.hidden(to_ranks(tokens, order), generator.condition(batch, drop), order)
    loss, weight, _ = generator.loss(tokens, batch, order, drop=drop)
    return to_slots(generator.head(h), order), (loss * weight).sum() / weight.sum()


def greedy(generator, params, batch, guidance):
    """Argmax tokens [b n] in raster order from the library's own sampler, in loops as sampling has them."""
    return draws(generator, params, batch, Diagonals(), constant_knobs(guidance, 0.0), guided=True)[..., 0]


def c2i(folder):
    h, io = folder.h, folder.io
    backbone, spec, info = build(h, hidden=h["ffn_hidden"], branch=h["medusa_attention_num"])
    generator = Neighbouring(backbone, Label(h["dim"])).complete(spec, info)
    fixed(h, model_type="c2i", cls_token_num=1, block_size=spec.n)
    params, call = loaded(generator, folder.weights, nar)
    tf_logits, tf_loss = call({"label": io["labels"]}, jnp.asarray(io["tokens"])[..., None], method=teacher_forced)
    labels, sizes = {"label": jnp.asarray(io["gen_labels"])}, steps(spec).sizes
    known = np.cumsum(sizes) - sizes  # tokens before each step; the first one is always guided
    last = np.where((known > h["cfg_interval"]) & (known > 0) & (h["cfg_interval"] > -1), 1, h["cfg_scale"])
    tokens = greedy(generator, params, labels, np.full(len(sizes), h["cfg_scale"]))
    ranked = to_ranks(jnp.asarray(tokens)[..., None], steps(spec))
    return {
        "proximity_mask": mask(spec),
        "tf_logits": tf_logits,
        "tf_loss": tf_loss,
        "greedy_tokens": tokens,
        "greedy_path_logits": along(generator, params, labels, steps, ranked, logits),
        "greedy_tokens_cfg_interval": greedy(generator, params, labels, last),
        "gen_mask": mask(spec),
    }


CASES = {"nar_c2i": c2i}
