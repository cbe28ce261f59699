"""Hi-MAR: both tasks, both heads, sampling."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import (
    Asked,
    Given,
    constant_knobs,
    fixed,
    guided_rows,
    loaded,
    nchw,
    nhwc,
    numbered,
    step_of,
)
from parity.mar import GivenDiffusion

from ar_jax.convert import himar
from ar_jax.data import Info
from ar_jax.generators.base import Setting
from ar_jax.generators.himar import SHARES, ByResolution, HiMar, TaskViT
from ar_jax.heads.diffusion import kept_steps
from ar_jax.heads.joint_diffusion import JointDiffusion
from ar_jax.nets.conditioning import Label
from ar_jax.orders import Order, cosine_sizes, rooms, scan_steps, to_ranks, to_slots
from ar_jax.tokens import TokenSpec, pyramid


class GivenJoint(Given, JointDiffusion):
    table: Any = None


class GivenHiMar(HiMar):
    early: int = 0  # steps of the pivots

    def keys(self, now, count):
        return numbered(now.keys.shape[0], (now.i - self.early) * count + jnp.arange(count))


def build(folder, early=0, pivots=None, others=None):
    """The generator, with tables of noise of the two heads, and its parameters."""
    h, (*_, height, width) = folder.h, folder.shape("latents")

    def net(name):
        wide = h[f"{name}_embed_dim"]
        return TaskViT(h[f"{name}_depth"], wide, h[f"{name}_num_heads"], hidden=int(h["mlp_ratio"] * wide))

    fixed(h, patch_size=1, img_size=height * h["vae_stride"], norm_eps=1e-6, gdm_mlp_ratio=4,
          gdm_num_sampling_steps_released=JointDiffusion().steps)  # fmt: skip
    many = h["diffusion_batch_mul"]
    head = GivenDiffusion(h["diffloss_w"], h["diffloss_d"], multiplier=many, steps=h["num_sampling_steps"], table=pivots)
    joint = GivenJoint(h["gdm_w"], h["gdm_d"], h["gdm_heads"], many, h["gdm_sampling_steps"], table=others)
    module = GivenHiMar(
        net("encoder"), net("decoder"), Label(h["encoder_embed_dim"], apart=True), head, joint, h["buffer_size"],
        told=h["step_stage2_rate"], early=early,
    )  # fmt: skip
    spec = TokenSpec(pyramid((h["cond_scale"], (height, width))), channels=h["vae_embed_dim"])
    module = module.complete(spec, Info(classes=h["class_num"]))
    return module, loaded(plain(module), folder.weights, himar)[0]


def flat(x):
    """Tokens of maps [b c h w]."""
    x = nhwc(x)
    return x.reshape(len(x), -1, x.shape[-1])


def maps(x, like):
    """Tokens as maps of the last axes of a shape."""
    return nchw(x.reshape(len(x), *like[-2:], -1))


def trained(folder):
    h, io = folder.h, folder.io
    (case,) = folder.of("himar.training_loss")
    generator, params = build(folder)
    p, shape = generator.pivots, folder.shape("latents")
    masks = [np.asarray(io[f"train.mask_{name}"], bool) for name in ("small", "big")]
    hidden = [int(mask[0].sum()) for mask in masks]
    assert hidden[0] == math.ceil(p * h["example_small_mask_ratio"])
    assert hidden[1] == math.ceil(masks[1].shape[1] * np.cos(io["train.big_ratio_uniform"][0] * np.pi / 2))
    slot = [np.argsort(mask, axis=1, kind="stable").astype(np.int32) for mask in masks]
    order = Order(np.concatenate([slot[0], p + slot[1]], axis=1), (1,) * generator.spec.n)
    each = [Order(part, (1,) * part.shape[1]) for part in slot]
    drops = [jnp.asarray(io[f"train.label_drop_uniform_{i}"] < h["label_drop_prob"]) for i in (1, 2)]
    share = generator.told * min(1, case.arguments["epoch"] / h["step_warmup"])
    fixed(h, epoch=case.arguments["epoch"])
    told = jnp.asarray(io["train.pivot_drop_uniform"] > 1 - share)
    images, batch = len(told), {"label": jnp.asarray(io["labels"], jnp.int32)}

    def copies(x, *shape):
        return jnp.asarray(x).reshape(-1, images, *shape).swapaxes(0, 1)

    t1, noise1 = copies(io["train.t1"].astype(np.int32), p), copies(io["train.noise1"], p, shape[1])
    t2, noise2 = copies(io["train.t2"].astype(np.int32)), copies(flat(io["train.noise2"]), masks[1].shape[1], shape[1])

    def stages(self, pivots, others):
        known = [to_ranks(x, part)[:, : x.shape[1] - many] for x, part, many in zip((pivots, others), each, hidden)]
        h1 = self.hidden_pivots(known[0], known[0].shape[1], self.condition(batch, drops[0]), order)
        visible = jnp.arange(p) < known[0].shape[1]
        rows = self.pivot_rows(jax.lax.stop_gradient(h1), told[:, None] & ~visible, order)
        h2 = self.hidden_others(rows, known[1], known[1].shape[1], self.condition(batch, drops[1]), order)
        z1, z2 = to_slots(h1, each[0]), to_slots(h2, each[1])
        square, bound = self.head.errors(z1, pivots, t1, noise1)
        raster = np.arange(masks[1].shape[1], dtype=np.int32)[None]
        return z1, z2, square + bound, self.joint_head.errors(z2, others, raster, masks[1], t2, noise2)

    asked = Asked(params, himar.rules(plain(generator)), folder.outputs("train.grad."))

    @jax.jit
    def run(params, pivots, others):
        def objective(params):
            z1, z2, first, second = generator.apply({"params": params}, pivots, others, method=stages)
            loss1 = (first.mean(1) * masks[0]).sum() / masks[0].sum()
            loss = SHARES[0] * loss1 + SHARES[1] * second.mean()
            return loss, (z1, z2, loss1, second, loss)

        grads, found = jax.grad(objective, has_aux=True)(params)
        return asked.of(grads), found

    grads, (z1, z2, loss1, second, loss) = run(params, flat(io["small_latents"]), flat(io["latents"]))
    return {
        "train.z1": z1,
        "train.z2": z2,
        "train.mse2": second.mean((2,)).swapaxes(0, 1),
        "train.loss1_times_2": 2 * loss1,
        "train.loss2_times_0.75": 0.75 * second.mean(),
        "train.loss": loss,
        **{f"train.grad.{key}": value for key, value in asked.named(grads).items()},
    }


def plain(generator):
    """The same without the numbers of the noise."""
    fields = [field for field in HiMar.__dataclass_fields__ if field not in ("parent", "name")]
    heads = {name: getattr(generator, name).clone(table=None) for name in ("head", "joint_head")}
    return HiMar(**{field: getattr(generator, field) for field in fields} | heads)


def sampled(folder, case):
    io, arguments, p = folder.io, case.arguments, folder.h["cond_scale"] ** 2
    name = next(name for name in case.outputs if name.endswith(".small_latents")).removesuffix(".small_latents")
    early, late, shape = arguments["pivot_iterations"], arguments["num_iter"], folder.shape(f"{name}.latents")
    given = np.asarray(io[f"{name}.orders"], np.int32)
    slot = np.concatenate([given[:, :p][:, ::-1], given[:, p:][:, ::-1]], axis=1)
    images, n = slot.shape
    parts = cosine_sizes(p, early), cosine_sizes(n - p, late)
    order = Order(slot, sum(parts, ()), rooms(parts[0], 2) + rooms(parts[1], 1))
    firsts = np.cumsum(order.sizes) - order.sizes

    def noise(kind, i):
        return np.concatenate([io[f"{name}.{kind}{i}.init_noise"][None], io[f"{name}.{kind}{i}.step_noise"][:, :count]])

    places, tables = [], ([], [])
    for i, (first, size) in enumerate(zip(firsts[:early], parts[0])):  # by place in the image, one after the other
        count = images * size
        places.append(np.argsort(slot[:, first : first + size], axis=1))
        rows = noise("small", i).reshape(-1, images, size, shape[1])
        ranked = np.argsort(places[-1], axis=1)
        tables[0].append(np.stack([rows[:, b, ranked[b]] for b in range(images)]).swapaxes(1, 2))
    for i in range(late):
        count = images
        rows = noise("big", i).reshape(-1, images, shape[1], n - p)
        tables[1].append(np.stack([rows[:, b][:, :, slot[b, p:] - p] for b in range(images)]).transpose(0, 3, 1, 2))
    generator, params = build(folder, early, *(np.concatenate(table, axis=1) for table in tables))
    weight = ByResolution(arguments["cfg"], arguments["re_cfg"])(order, generator.spec)
    fixed(arguments, cfg_schedule="linear")
    knobs, batch = constant_knobs(weight, arguments["temperature"]), {"label": jnp.asarray(io["labels"], jnp.int32)}
    guided = (weight != 1).any()

    @jax.jit
    def run(params):
        cond = guided_rows(generator, params, batch, guided)
        setting = Setting(cond, order, knobs)

        def loop(self):
            module, variables = self.unbind()
            call = lambda *args, method: module.apply(variables, *args, method=method)  # noqa: E731

            def step(state, i, first, size):
                keys = numbered(images, jnp.minimum(first + jnp.arange(size), p - 1))
                return call(state, i, first, keys, setting, method=step_of)

            state = scan_steps(
                order.sizes, step, self.begin(setting, images), rooms=order.rooms,
                grow=lambda state, ranks: self.grow(state, ranks, setting),
            )  # fmt: skip
            small = self.hidden_pivots(state.tokens[:, :0], 0, cond, order)[:, : order.sizes[0]]
            rows = self.pivot_rows(state.said, jnp.ones((1, p), bool), order)
            return state.tokens, small, self.hidden_others(rows, state.tokens[:, :0], 0, cond, order)

        return generator.apply({"params": params}, method=loop)

    tokens, small, big = run(params)
    ways, of_others = len(small) // images, Order(slot[:, p:] - p, (1,) * (n - p))
    taken = [np.take_along_axis(np.asarray(small)[way::ways], places[0][..., None], 1) for way in range(ways)]
    tokens, place = to_slots(tokens, order), np.argsort(slot[:, p:], axis=1)
    return {
        f"{name}.small0.z": np.concatenate([x.reshape(-1, x.shape[-1]) for x in taken]),
        f"{name}.big0.z": maps(to_slots(big[::ways], of_others), shape),
        f"{name}.cfg_small": weight[:early],
        f"{name}.cfg_big": weight[early:],
        f"{name}.small_latents": maps(tokens[:, :p], folder.shape(f"{name}.small_latents")),
        f"{name}.latents": maps(tokens[:, p:], shape),
        **{f"{name}.big{i}.unknown": place >= first - p for i, first in enumerate(firsts[early:])},
    }


def head(folder):
    """The global head's network, and its schedule."""
    io, (case,) = folder.io, folder.of("himar.global_schedule")
    generator, params = build(folder)
    joint, shape = generator.joint_head.clone(steps=case.arguments["respacing"]), folder.shape("global_head.x")
    slot = np.arange(math.prod(shape[2:]), dtype=np.int32)[None]
    x, h, t = flat(io["global_head.x"]), flat(io["global_head.z"]), jnp.asarray(io["global_head.t"], jnp.float32)
    net = lambda self: self.net(x, t, h, self.places(slot))  # noqa: E731
    return {
        "global_head.eps": maps(joint.apply({"params": params["joint_head"]}, method=net), shape),
        "global_head.log_variance": joint.chain()[1][::-1],
        "global_head.timesteps": kept_steps(joint.steps),
    }


def compute(folder):
    outputs = trained(folder) | head(folder)
    for case in folder.of("himar.sample_tokens"):
        outputs |= sampled(folder, case)
    return outputs


CASES = {"himar": compute}
