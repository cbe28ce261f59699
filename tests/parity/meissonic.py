"""Meissonic: MaskGIT from text, with the mask rate as a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import Asked, constant_knobs, fixed, loaded, step_of
from parity.maskgit import gumbel

from ar_jax.convert import meissonic
from ar_jax.generators.base import Setting
from ar_jax.generators.maskgit import mask_ratio
from ar_jax.generators.meissonic import Meissonic, Told
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import paired
from ar_jax.nets.mlp import FREQUENCIES
from ar_jax.nets.positions import rotary_axes
from ar_jax.orders import Order, raster, whole
from ar_jax.tokens import TokenSpec, grid


class GivenHead(Categorical):
    """Draws by numbers that are given."""

    def draw(self, logits, keys, knobs, i):
        below = jnp.cumsum(jax.nn.softmax(logits), axis=-1) <= GIVEN["codes"][..., None]
        return jnp.minimum(below.sum(-1), self.codes - 1).astype(jnp.int32)[..., None]


class Given(Meissonic):
    """Takes the noise of a step, and mask and time of training, as they are given."""

    def gumbel(self, keys):
        return GIVEN["scores"]

    def drawn_mask(self, progress, scores):
        return GIVEN["mask"]

    def modulate(self, vector):
        return Told(vector, GIVEN["time"])


GIVEN = {}  # while something is traced


def given(generator):
    """The generator with what is given in place of what is drawn."""

    def fields(module):
        names = [f.name for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "name")]
        return {name: getattr(module, name) for name in names}

    return Given(**(fields(generator) | {"head": GivenHead(**fields(generator.head))}))


def build(folder):
    h = folder.h
    shapes = {key: np.shape(value) for key, value in folder.weights.entries.items()}
    found = meissonic.build("generator", shapes, size=32, heads=0, groups=0, scales=())
    generator = found.clone(
        backbone=found.backbone.clone(axes=tuple(h["axes_dims_rope"])),
        conditioning=found.conditioning.clone(rows=h["text_len"], pooled=h["pooled_projection_dim"]),
        choice=float(h["temperature_start"]), choice_end=float(h["temperature_end"]),
    ).on(TokenSpec(grid(*h["grid"]), codes=(h["codebook_size"],)))  # fmt: skip
    net = generator.backbone
    fixed(
        h, num_layers=net.layers, num_single_layers=net.singles, num_attention_heads=net.heads,
        attention_head_dim=net.width // net.heads, joint_attention_dim=generator.conditioning.features,
        vocab_size=generator.vocabulary, mask_id=generator.vocabulary - 1, downsample=generator.joined,
        micro_cond_frequencies=FREQUENCIES, masking_schedule="cosine",
    )  # fmt: skip
    return generator, loaded(generator, folder.weights, meissonic)[0]


def said(io, before="", micro="micro_conds", part=slice(None)):
    """A batch of prompts."""
    text = jnp.asarray(io[f"{before}text"])
    batch = {"text": text, "text_mask": jnp.ones(text.shape[:2], bool), "pooled": jnp.asarray(io[f"{before}pooled"])}
    return batch | {"micro": jnp.asarray(io[micro])[part]}


def published_sizes(n, steps):
    """What each step reveals, counted in float32."""
    part = np.cos(np.arange(1, steps, dtype=np.float32) / np.float32(steps) * np.float32(np.pi) * np.float32(0.5))
    unknown = [n]
    for left in np.floor(np.float32(n) * part).astype(int):
        unknown.append(max(1, min(unknown[-1] - 1, int(left))))
    return tuple(-np.diff([*unknown, 0]))


def sampled(generator, params, batch, guidance, uniforms, order):
    """Codes after every step, hidden ones as the table's last, [steps b n]."""
    images, shown = len(batch["text"]), []
    knobs, ends = constant_knobs(np.full(len(order.sizes), guidance)), np.cumsum(order.sizes) - order.sizes
    keys, no = jax.random.split(jax.random.key(0), (images, 1)), jnp.zeros(images, bool)

    @jax.jit
    def run(params, state, i, first, codes, scores):
        GIVEN.update(codes=codes, scores=gumbel(scores), time=None)

        def one(self, state):
            cond = self.condition(batch, no)
            cond = paired(cond, self.condition(batch, ~no)) if guidance != 1 else cond
            return step_of(self, state, i, first, keys, Setting(cond, order, knobs))

        return given(generator).apply({"params": params}, state, method=one)

    state = generator.apply({"params": params}, None, images, method="begin")
    for i, first in enumerate(ends):
        state = run(params, state, i, first, *(x[i] for x in uniforms))
        shown.append(np.where(state.known, state.tokens[..., 0], generator.vocabulary - 1))
    return np.stack(shown)


def whole_folder(folder):
    h, io = folder.h, folder.io
    generator, params = build(folder)
    rows, ids, batch = generator.conditioning.rows, jnp.asarray(io["ids"]), said(io)
    images, n, no = len(ids), generator.spec.n, jnp.zeros(len(ids), bool)
    hidden, codes = ids.reshape(images, n) == h["mask_id"], jnp.asarray(io["codes"]).reshape(images, n, 1)
    u_rate, u_mask = jnp.asarray(io["u_rate"])[:, None], jnp.asarray(io["u_mask"])
    mask = generator.drawn_mask(u_rate, u_mask)
    asked = Asked(params, meissonic.rules(generator), folder.outputs("loss.grad."))

    @jax.jit
    def run(params):
        def logits(self):
            return self.head(self.hidden(ids.reshape(images, n, 1), hidden, self.condition(batch, no)))

        def objective(params):
            GIVEN.update(mask=mask, time=1000 * jnp.asarray(io["train_time"]))
            loss, weight, _ = given(generator).apply(
                {"params": params}, codes, batch, whole(generator.spec), drop=no, key=jax.random.key(0), method="loss"
            )
            return (loss * weight).sum() / weight.sum()

        GIVEN["time"] = 1000.0 * jnp.asarray(io["timestep"])
        found = given(generator).apply({"params": params}, method=logits)
        loss, grads = jax.value_and_grad(objective)(params)
        return found, loss, asked.of(grads)

    found, loss, grads = run(params)
    side = [size // (2 if generator.joined else 1) for size in h["grid"]]
    coords = np.concatenate([np.zeros((rows, 3), np.int32), grid(*side)])
    cos, sin = rotary_axes(coords, generator.backbone.axes)
    steps = len(io["u_code"])
    sizes = published_sizes(n, steps)
    order = Order(raster(generator.spec).slot, sizes, (max(sizes),) * steps)
    setting = Setting(None, order, constant_knobs(np.ones(steps)))
    unlike = said(io, "neg_", "sample_micro_conds", slice(None, images))
    guided = said(io, "", "sample_micro_conds", slice(images, None)) | {"unlike": unlike}
    plain = said(io, "", "sample_micro_conds", slice(None, images))
    uniforms = jnp.asarray(io["u_code"]), jnp.asarray(io["u_conf"])
    return {
        "logits": jnp.moveaxis(found, 1, 2), "rope_cos": cos, "rope_sin": sin, "train_mask": mask,
        "mask_rate": mask_ratio(u_rate[:, 0]), "loss": loss[None],
        "temperatures": np.stack([generator.noise_of(i, setting) for i in range(steps)]),
        "sample_guided": sampled(generator, params, guided, h["guidance_scale"], uniforms, order),
        "sample_plain": sampled(generator, params, plain, 1.0, uniforms, order)[-1],
    } | {f"loss.grad.{key}": value for key, value in asked.named(grads).items()}  # fmt: skip


CASES = {"meissonic": whole_folder, "meissonic_plain": whole_folder}
