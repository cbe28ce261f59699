"""Instella-T2I: a line of bits, and its two generators, which read a text in every layer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import Asked, along, constant_knobs, draws, guided_rows, loaded, logits, nchw, nhwc

from ar_jax.convert import instella as source
from ar_jax.data import Info
from ar_jax.generators.base import Setting, Step
from ar_jax.generators.bit_flips import BitFlips
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import Bits
from ar_jax.heads.bitwise import Bitwise
from ar_jax.nets.head_rms import Doubling, Halving, places
from ar_jax.nets.positions import rotary_axes
from ar_jax.nets.reader import LayeredCaption, Reader, TimedReader
from ar_jax.orders import Order, raster
from ar_jax.tokenizers.binary_line import BinaryLine
from ar_jax.tokens import TokenSpec, grid


def tokenizer(h, size, scale, **fields):
    def net(kind, side, changes):
        (last,) = h[changes]
        heads = h[f"{side}_heads"]
        return kind(
            h[f"{side}_layers"], heads * h[f"{side}_head_dim"], heads, before=last + 1, axes=tuple(h["axes_dims_rope"]),
            base=h["rope_theta"], eps=h["norm_eps"],
        )  # fmt: skip

    return BinaryLine(
        size=size, cell=h["patch_size"], slots=h["num_latent_tokens"], bits=h["bits_per_token"], channels=h["in_channels"],
        encoder=net(Halving, "encoder", "downsample_after"), decoder=net(Doubling, "decoder", "upsample_after"),
        scale=scale, temperature=h["train_temp"], **fields,
    )  # fmt: skip


def bae(folder):
    h, io = folder.h, folder.io
    image, bits = nhwc(io["image"]), jnp.asarray(io["bits"], jnp.int32)
    module = tokenizer(h, image.shape[1:3], 0)
    params, _ = loaded(module, folder.weights, source)
    outputs = {}

    @functools.partial(jax.jit, static_argnums=0)
    def encoded(module, params):
        def run(self):
            states = self.states(image)
            z = self.quant(states)
            codes, index, _ = self.quantise(z)
            return states, z, index, codes

        return module.apply({"params": params}, method=run)

    for case in folder.of("encode"):
        of = module.clone(scale=case.arguments.get("scale", 0))
        outputs |= dict(zip(case.outputs, encoded(of, params)))
    for case in folder.of("decode"):
        of = module.clone(
            size=tuple(side * module.cell for side in case.arguments["grid"]),
            scale=case.arguments.get("scale", 0),
        )
        decode = jax.jit(functools.partial(of.apply, method="decode"))
        outputs[case.outputs[0]] = nchw(decode({"params": params}, bits))
    (case,) = folder.of("position tables")
    rows, columns = case.arguments["grid"]
    span = case.arguments["scale"] // module.cell
    table = rotary_axes(places(module.slots, rows, columns, span), module.encoder.axes, h["rope_theta"])
    outputs |= dict(zip(case.outputs, table[:, 0]))

    (case,) = folder.of("training forward")
    uniform, weight = jnp.asarray(io["bernoulli_uniforms"]), case.arguments["code_weight"]
    of = module.clone(scale=case.arguments["scale"], code_weight=weight)
    asked = Asked(params, source.rules(module), folder.outputs("grad."))

    def objective(params):
        def run(self):
            z = self.latents(image)
            p, chance = jax.nn.sigmoid(z), jax.nn.sigmoid(z / self.temperature)
            drawn = (uniform < chance).astype(jnp.float32)
            _, _, losses = self.quantise(z)
            recon = jnp.square(self.pixels(self.summed(drawn + p - jax.lax.stop_gradient(p))) - image).mean()
            return recon + losses["code"], (recon, losses["code"] / weight, drawn)

        return of.apply({"params": params}, method=run)

    @jax.jit
    def trained(params):
        found, grads = jax.value_and_grad(objective, has_aux=True)(params)
        return found, asked.of(grads)

    (total, (recon, code, drawn)), grads = trained(params)
    outputs |= {"train_bits": drawn, "loss.total": total, "loss.rec": recon, "loss.code": code}
    return outputs | {f"grad.{key}": value for key, value in asked.named(grads).items()}


def texts(features, mask):
    """Features [l B r c] and their mask as a batch."""
    text = jnp.moveaxis(jnp.asarray(features), 0, 2)
    return {"text": text.reshape(*text.shape[:2], -1), "text_mask": jnp.asarray(mask, bool)}


def completed(folder, module):
    """A generator, its tokens known; and its parameters."""
    h, text = folder.h, folder.io["llm_features"]
    layers, _, rows, features = text.shape
    assert (layers, features) == (h["num_layers"], h["text_cond_dim"])
    spec = TokenSpec(grid(1, h["num_image_tokens"]), codes=(2,) * h["in_channels"], placed=False)
    module = module.complete(spec, Info(captions=True, text_rows=rows, text_width=layers * features))
    return module, loaded(module, folder.weights, source)[0]


def net(h):
    width = h["num_heads"] * h["head_dim"]
    return (h["num_layers"], width, h["num_heads"]), {"hidden": h["mlp_ratio"] * width, "eps": h["norm_eps"]}


class ByUniforms(Bitwise):
    """A bit is 1 where a uniform number of a table [steps images k] is below its probability."""

    table: Any = None

    def draw(self, logits, keys, knobs, i):
        return (jnp.asarray(self.table)[i][:, None] < jax.nn.softmax(logits)[..., 1]).astype(jnp.int32)


class TwoTexts(LayeredCaption):
    """Without its caption an image has another one."""

    def __call__(self, batch, drop):
        def one(name):
            return jnp.where(drop.reshape(-1, *[1] * (batch[name].ndim - 1)), batch["other_" + name], batch[name])

        return super().__call__({name: one(name) for name in ("text", "text_mask")}, jnp.zeros(len(drop), bool))


def with_others(generator, batch, **fields):
    """A generator that draws with the first half of a batch's captions, and without them with the second; and its batch."""
    first = {name: x[: len(x) // 2] for name, x in batch.items()}
    others = {"other_" + name: x[len(x) // 2 :] for name, x in batch.items()}
    own = generator.conditioning
    names = [name for name in type(own).__dataclass_fields__ if name not in ("parent", "name")]
    own = TwoTexts(**{name: getattr(own, name) for name in names})
    return generator.clone(conditioning=own, **fields), first | others


class GivenTosses(BitFlips):
    """Takes uniform numbers of a table [steps b n k]: for the start, then for the bits after every step but the last."""

    table: Any = None

    def tosses(self, now, shape):
        table = jnp.asarray(self.table)
        return table[0], table[jnp.minimum(now.i + 1, len(table) - 1)]


def listed(x):
    return tuple(map(listed, x)) if np.ndim(x) else float(x)


def ar(folder):
    h, io = folder.h, folder.io
    sizes, more = net(h)
    generator, params = completed(
        folder, Causal(Reader(*sizes, **more), LayeredCaption(sizes[1], h["num_layers"]), Bitwise(single=True), Bits())
    )
    batch, tokens = texts(io["llm_features"], io["text_mask"]), jnp.asarray(io["latents"], jnp.int32)
    order = raster(generator.spec)
    asked = Asked(params, source.rules(generator), folder.outputs("grad."))

    @jax.jit
    def forced(params):
        def run(self):
            keep = jnp.zeros(len(tokens), bool)
            loss, weight, _ = self.loss(tokens, batch, order, drop=keep)
            h = self.hidden(tokens, self.condition(batch, keep), order)
            return (loss * weight).sum() / weight.sum(), self.head(h)[..., 1]

        found, grads = jax.value_and_grad(lambda params: generator.apply({"params": params}, method=run), has_aux=True)(
            params
        )
        return found, asked.of(grads)

    (loss, shown), grads = forced(params)
    outputs = {"tf_logits": shown, "tf_loss": loss}
    outputs |= {f"grad.{key}": value for key, value in asked.named(grads).items()}

    (case,) = folder.of("BinaryAR.sample")
    uniforms = io["sample_uniforms"]
    assert 2 * uniforms.shape[1] == len(tokens)
    spec, weight, temperature = generator.spec, 1 + case.arguments["guidance_scale"], case.arguments["temperature"]
    head = ByUniforms(spec.codes, single=True, table=listed(uniforms[:, :, 0]))
    drawing, batch = with_others(generator, batch, head=head)
    knobs = constant_knobs(np.full(spec.n, weight), temperature)
    ids = draws(drawing, params, batch, raster, knobs, guided=True)
    cond, uncond = np.split(along(drawing, params, batch, raster, ids, logits)[..., 1], 2)
    chances = jax.nn.sigmoid((uncond + weight * (cond - uncond)) / temperature)
    return outputs | dict(zip(case.outputs, (ids, chances)))


def diff(folder):
    h, io = folder.h, folder.io
    sizes, more = net(h)
    generator, params = completed(
        folder, GivenTosses(TimedReader(*sizes, **more), LayeredCaption(sizes[1], h["num_layers"], start=False))
    )
    batch, tokens = texts(io["llm_features"], io["text_mask"]), jnp.asarray(io["latents"], jnp.int32)
    t, uniform = jnp.asarray(io["timesteps"]), jnp.asarray(io["noise_uniforms"])
    asked = Asked(params, source.rules(generator), folder.outputs("grad."))

    @jax.jit
    def forced(params):
        def run(self):
            noisy = self.noised(tokens, t, uniform)
            flips = self.logits(noisy, t, self.condition(batch, jnp.zeros(len(tokens), bool)))
            return self.errors(tokens, noisy, flips).mean(), (noisy, flips)

        found, grads = jax.value_and_grad(lambda params: generator.apply({"params": params}, method=run), has_aux=True)(
            params
        )
        return found, asked.of(grads)

    (loss, (noisy, flips)), grads = forced(params)
    outputs = {"noised": noisy, "tf_logits": flips, "tf_loss": loss}
    outputs |= {f"grad.{key}": value for key, value in asked.named(grads).items()}

    table = jnp.asarray(io["sample_uniforms"])
    for rule, name in (("anew", "first"), ("kept", "second")):
        (case,) = folder.of(f"BinaryDiffusion.sample, {name} rule")
        steps, temperature = case.arguments["steps"], case.arguments["temperature"]
        assert steps == len(table)
        drawing, said = with_others(generator, batch, rule=rule, bend=case.arguments["rho"], table=table)
        order = Order(raster(generator.spec).slot, (generator.spec.n, *[0] * (steps - 1)))
        knobs = constant_knobs(np.full(steps, 1 + case.arguments["guidance_scale"]), temperature)

        @jax.jit
        def run(params, drawing=drawing, said=said, order=order, knobs=knobs, steps=steps):
            call = functools.partial(drawing.apply, {"params": params})
            images = table.shape[1]
            setting = Setting(guided_rows(drawing, params, said), order, knobs)
            keys = jax.random.split(jax.random.key(0), (images, order.n))

            def step(state, i):
                noisy = jnp.where(i == 0, (table[0] < 0.5).astype(jnp.int32), state.tokens)
                _, before = call(noisy, i, setting, method="chances")
                return call(state, Step(i, i, keys), setting, method="step"), before

            state = call(setting, images, method="begin")
            state, chances = jax.lax.scan(step, state, jnp.arange(steps))
            return state.tokens, jnp.concatenate([jnp.full_like(chances[:1], 0.5), chances[:-1]])

        outputs |= dict(zip(case.outputs, run(params)))
    return outputs


CASES = {"instella_bae": bae, "instella_ar": ar, "instella_diff": diff}
