"""VQ-Diffusion, VQ-DDM and the first-hitting sampler of masked diffusion: rules, networks, sampling with noise that is given."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cut_gumbel import cut
from parity.common import Asked, constant_knobs, fixed, guided_rows, loaded

from ar_jax.convert import vq_diffusion as source
from ar_jax.convert.names import CONV, CONV1, LINEAR, PLAIN, Layout, to_params
from ar_jax.convert.sources import param_shapes
from ar_jax.data import Info
from ar_jax.decode.logits import Filter, Inside
from ar_jax.generators.base import Knobs, Setting, Step
from ar_jax.generators.binary_diffusion import Denoised
from ar_jax.generators.code_diffusion import CodeDiffusion, Plan, importance, remembered
from ar_jax.generators.corruption import FLOOR, Hide, Jump, MaskAndReplace, Uniform, one_hot, rates, spread
from ar_jax.generators.masked_diffusion import MaskedDiffusion, hitting_chances, hitting_times, picked
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.code_transformer import CodeTransformer
from ar_jax.nets.code_unet import CodeUNet
from ar_jax.nets.conditioning import Classes, Cond, Features, Nothing
from ar_jax.nets.vit import ViT
from ar_jax.orders import Order, to_ranks, to_slots
from ar_jax.tokens import TokenSpec, grid


class GivenNoise(CodeDiffusion):
    """Takes Gumbel noise of tables [calls b n s] and [calls b n], noise for the start, and a plan of the steps."""

    tables: Any = None
    steps: Any = None

    def noise(self, now):
        states, places = self.tables
        return states[now.i], places[now.i]

    def start_noise(self, now):
        return self.steps

    def plan(self, steps):
        return self.steps if isinstance(self.steps, Plan) else super().plan(steps)


def gumbel(uniform):
    """The reference's noise."""
    return -jnp.log(-jnp.log(jnp.asarray(uniform) + 1e-30) + 1e-30)


def last(x):
    """Their [... states places] as ours."""
    return jnp.moveaxis(jnp.asarray(x), -1, -2)


def given(generator, noise, places=None, steps=None):
    names = [name for name in generator.__dataclass_fields__ if name not in ("parent", "name")]
    noise = last(gumbel(noise))
    places = jnp.zeros(noise.shape[:-1]) if places is None else jnp.asarray(places)
    return GivenNoise(**{name: getattr(generator, name) for name in names}, tables=(noise, places), steps=steps)


def in_order(h, generator, params, batch, noise, weight=1.0, kept=1.0, places=None, steps=None, count=0):
    """Tokens after all steps with given noise."""
    count = count or len(noise)
    drawer, images = given(generator, noise, places, steps), noise.shape[1]
    order = Denoised(count)(generator.spec)
    knobs = constant_knobs(np.full(count, weight)).replace(filter=Filter(top_p=kept))

    @jax.jit
    def run(params):
        cond = guided_rows(drawer, params, batch, weight != 1) if batch else Cond(jnp.zeros((images, 0, 1)))
        setting, call = Setting(cond, order, knobs), functools.partial(drawer.apply, {"params": params})
        keys = jax.random.split(jax.random.key(0), (images, 1))
        state = call(setting, images, method="begin")
        step = lambda state, i: (call(state, Step(i, i, keys), setting, method="step"), None)  # noqa: E731
        return jax.lax.scan(step, state, jnp.arange(count))[0].tokens[..., 0]

    return run(params)


def rules(folder):
    h, io = folder.h, folder.io
    codes, n, times = h["num_codes"], h["seq_len"], h["num_steps"]
    process = MaskAndReplace(times, (h["att_1"], h["att_T"]), (h["ctt_1"], h["ctt_T"]))
    weights = h["mask_weight"]
    fixed(h, adaptive_auxiliary_loss=True)
    generator = CodeDiffusion(
        CodeTransformer(1, 8, 1), Nothing(8), process, aux=h["auxiliary_loss_weight"], hidden_weight=weights[0],
        shown_weight=weights[1],
    ).complete(TokenSpec(grid(1, n), codes=(codes,)), Info())  # fmt: skip
    bound = generator.bind({})
    every = np.arange(times)
    one, whole = process.rates(codes, every, every - 1), process.rates(codes, np.append(every, -1))
    outputs = {
        "log_at": one.keep, "log_bt": one.replace, "log_ct": one.hide, "log_1_min_ct": one.show,
        "log_cumprod_at": whole.keep, "log_cumprod_bt": whole.replace, "log_cumprod_ct": whole.hide,
        "log_1_min_cumprod_ct": whole.show,
    }  # fmt: skip
    x0, x_t, t = (jnp.asarray(io[name], jnp.int32) for name in ("x0", "x_t", "t"))
    logits, uncond = last(io["logits"]), last(io["uncond_logits"])
    jump = process.jump(codes, every, every - 1).take(t)
    clean, noisy = one_hot(x0, codes + 1), one_hot(x_t, codes + 1)
    found = bound.predicted(logits)
    jumps = process.jump(
        codes, *(np.clip(np.asarray(t), h["exact_stride"], times - 1) - back for back in (0, h["exact_stride"]))
    )
    exact = process.posterior(found, x_t, jumps.take(np.arange(len(t))))

    def knobs(weight, kept):
        return Knobs(jnp.full(1, weight), jnp.ones(1), Filter(top_p=kept))

    pairs = jnp.stack([logits, uncond], 1).reshape(-1, *logits.shape[1:])
    shortened = bound.guided(logits, 1, knobs(1.0, h["truncation_rate"]), 0)
    model = process.posterior(found, x_t, jump)

    def drawn(log_p, name):
        return (log_p + last(gumbel(io[name]))).argmax(-1)

    outputs |= {
        "log_x0": last(clean), "q_t": last(bound.spoilt(x0, t)), "q_prev": last(spread(clean, jump.early)),
        "q_one": last(spread(noisy, jump.between)), "log_x0_pred": last(found),
        "posterior_true": last(process.posterior(clean, x_t, jump)), "posterior_model": last(model),
        "posterior_exact_stride": last(jnp.maximum(exact, -40)), "q_sample": drawn(bound.spoilt(x0, t), "u_forward"),
        "p_sample": drawn(model, "u_reverse"), "log_x0_truncated": last(shortened),
        "posterior_truncated": last(process.posterior(shortened, x_t, jump)),
        "log_x0_guided": last(bound.guided(pairs, 2, knobs(h["guidance_scale"], 1.0), 0)),
    }  # fmt: skip
    memory = {"squares": jnp.asarray(io["Lt_history"]), "seen": jnp.full(times, 11.0)}
    odds = importance(memory)
    spoilt = outputs["q_sample"]

    def loss(logits):
        bound_, aux = bound.errors(x0, spoilt, t, last(logits))
        each = (bound_ + generator.aux * aux) / odds[t][:, None]
        return each.mean(), bound_.sum(1)

    (value, sums), grad = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(io["logits"]))
    outputs |= {"pt": odds[t], "loss": value, "loss.grad.logits": grad}
    outputs["Lt_history_new"] = remembered(memory, t, sums)["squares"]
    for name, reveal in (("purity", "purity"), ("uniform_prior", "evenly")):
        drawer = generator.clone(reveal=reveal, sharpen=h["prior_weight"]).bind({})
        outputs[f"{name}_sample"] = drawer.revealed(
            found, x_t, last(gumbel(io["u_prior"])), jnp.asarray(io["position_gumbel"]), h["prior_n"]
        )
    assert 0 < h["prior_step"] < times
    outputs["purity_count"] = (outputs["purity_sample"] != x_t).sum(1)
    return outputs


def network(folder, conditioning, info, batch, empty=None, **fields):
    """The outputs that both of VQ-Diffusion's models have: network, loss and sampling."""
    h, io = folder.h, folder.io
    hidden, shown = h["mask_weight"]
    process = MaskAndReplace(h["num_steps"])
    generator = CodeDiffusion(
        CodeTransformer(h["layers"], h["width"], h["heads"], places=tuple(h["spatial_size"]), **fields), conditioning, process,
        aux=h["auxiliary_loss_weight"], hidden_weight=float(hidden), shown_weight=float(shown),
    ).complete(TokenSpec(grid(*h["grid"]), codes=(h["num_codes"],)), info)  # fmt: skip
    fixed(h, seq_len=generator.spec.n, num_classes=info.classes)
    weights = {key: np.asarray(folder.weights[key]) for key in folder.weights}
    if empty is not None:
        weights["empty_text_embed"] = np.asarray(io[empty])
    params, _ = loaded(generator, weights, source)
    x0, x_t, t = (jnp.asarray(io[name], jnp.int32) for name in ("x0", "x_t", "t"))
    (case,) = folder.of("training loss")
    asked = Asked(params, source.rules(generator), [name.removeprefix("loss.grad.") for name in case.outputs[1:]])

    @jax.jit
    def run(params):
        def logits(self, noisy):
            return self.backbone.predict(noisy, t, self.condition(batch, jnp.zeros(len(noisy), bool)))

        def objective(params):
            def run(self):
                noisy = (self.spoilt(x0, t) + last(gumbel(io["u_forward"]))).argmax(-1)
                bound, aux = self.errors(x0, noisy, t, logits(self, noisy))
                return (process.times * (bound + self.aux * aux)).mean()

            return generator.apply({"params": params}, method=run)

        loss, grads = jax.value_and_grad(objective)(params)
        return generator.apply({"params": params}, x_t, method=logits), loss, asked.of(grads)

    shown, loss, grads = run(params)
    outputs = {"network_logits": last(shown), "loss": loss}
    outputs |= {f"loss.grad.{key}": value for key, value in asked.named(grads).items()}
    draw = functools.partial(in_order, h, generator, params, batch)
    outputs["sample_full"] = draw(io["u_full"], kept=h["truncation_rate"])
    outputs["sample_guided"] = draw(io["u_full"], h["guidance_scale"], h["truncation_rate_guided"])
    return outputs, generator, params


def text(folder):
    h, io = folder.h, folder.io
    fixed(h, timestep_type="adalayernorm", batch=len(io["x0"]))
    info = Info(captions=True, text_rows=h["text_len"], text_width=h["text_dim"])
    batch = {"text": jnp.asarray(io["text"]), "text_mask": jnp.ones(io["text"].shape[:2], bool)}
    outputs, generator, params = network(folder, Features(unit=False), info, batch, "empty_text", cross=True)
    times, stride = h["num_steps"], 1 + h["skip_step"]
    time = np.array(sorted({*range(times - 1, -1, -stride), 0}, reverse=True))
    late = np.where(time > stride - 1, time - stride + 1, time)
    plan = Plan(time, late, late - 1, np.zeros(len(time), int))
    outputs["sample_fast"] = in_order(
        h, generator, params, batch, io["u_fast"], kept=h["truncation_rate"], steps=plan
    )  # fmt: skip
    calls = []
    for t, left in reversed(list(enumerate(h["n_sample"]))):
        while t and left:  # as many as a call may reveal; one more, if it would be alone
            some = left if left <= h["prior_ps"] + 1 else h["prior_ps"]
            calls, left = [*calls, (t, some)], left - some
    time, count = np.array([*calls, (0, 0)]).T
    outputs["sample_purity"] = in_order(
        h, generator.clone(reveal="purity", sharpen=h["prior_weight"]), params, batch, io["u_purity"],
        kept=h["truncation_rate"], places=io["position_gumbel"], steps=Plan(time, time, time - 1, count), count=len(time),
    )  # fmt: skip
    return outputs


def classes(folder):
    h, io = folder.h, folder.io
    fixed(h, batch=len(io["x0"]), skip_step=h["skip_step"], prior_weight=h["prior_weight"])
    batch = {"label": jnp.asarray(io["labels"], jnp.int32)}
    return network(folder, Classes(), Info(classes=h["num_classes"]), batch, mlp="grid")[0]


def turned(x):
    """A kernel of a transposed convolution: theirs [in out h w] runs the other way."""
    return x.transpose(2, 3, 0, 1)[::-1, ::-1]


def unet_rules(net):
    """Names of a U-Net's parameters; no weights are released that a converter could read."""
    deep = len(net.mult) - 1

    def place(m):
        """Where the block of a level lies, from our names of side, level and part."""
        side, level, part = m[1], m[2], m[3]
        if side == "middle":
            return {"res1": "mid_block1", "res2": "mid_block2", "attention": "mid_attn.fn"}[part]
        number = int(level) if side == "down" else deep - int(level)
        inner = {"res1": "0", "res2": "1", "attention": "2.fn", "half": "3.conv", "double": "3.conv"}[part]
        return f"{side}s.{number}.{inner}"

    where, rules = r"backbone/(down|up|middle)(\d*)_", []
    lift = Layout(lambda x: x[::-1, ::-1].transpose(2, 3, 0, 1), turned)
    for leaf, key in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
        conv, point, dense, back = (CONV, CONV1, LINEAR, lift) if leaf == "kernel" else (PLAIN,) * 4
        rules += [
            (rf"{where}(res\d)/part(\d)/conv/{leaf}", lambda m, key=key: f"{place(m)}.block{m[4]}.block.0.{key}", conv),
            (
                rf"{where}(res\d)/part(\d)/norm/{leaf}",
                lambda m, key=key: f"{place(m)}.block{m[4]}.block.1.{key}",
                PLAIN,
            ),
            (rf"{where}(res\d)/time/{leaf}", lambda m, key=key: f"{place(m)}.mlp.1.{key}", dense),
            (rf"{where}(res\d)/project/{leaf}", lambda m, key=key: f"{place(m)}.res_conv.{key}", point),
            (rf"{where}(attention)/(qkv|out)/{leaf}", lambda m, key=key: f"{place(m)}.fn.to_{m[4]}.{key}", point),
            (rf"{where}(half)/{leaf}", lambda m, key=key: f"{place(m)}.{key}", conv),
            (rf"{where}(double)/{leaf}", lambda m, key=key: f"{place(m)}.{key}", back),
            (f"backbone/last/conv/{leaf}", f"final_conv.0.block.0.{key}", conv),
            (f"backbone/last/norm/{leaf}", f"final_conv.0.block.1.{key}", PLAIN),
            (f"backbone/readout/{leaf}", f"final_conv.1.{key}", point),
            (f"backbone/time1/{leaf}", f"mlp.0.{key}", dense),
            (f"backbone/time2/{leaf}", f"mlp.2.{key}", dense),
        ]
    gain = (rf"{where}(attention)/gain", lambda m: f"{place(m)}.g", PLAIN)
    return [*rules, gain, ("backbone/embedding", "embedding.weight", PLAIN)]


def vq_ddm(folder):
    h, io = folder.h, folder.io
    codes, times, (rows, columns) = h["num_codes"], h["num_steps"], h["grid"]
    process = Uniform(times)
    net = CodeUNet(
        h["dim"], tuple(h["dim_mults"]), groups=h["groups"], heads=h["linear_heads"], features=h["linear_dim_head"]
    )
    generator = CodeDiffusion(net, Nothing(net.width), process).complete(TokenSpec(grid(rows, columns), codes=(codes,)), Info())
    rules = unet_rules(net)
    weights = {key: np.asarray(folder.weights[key]) for key in folder.weights}
    params = jax.tree.map(jnp.asarray, to_params(weights, param_shapes(generator), rules))
    every = np.arange(times)
    step, whole = process.rates(codes, every, every - 1), process.rates(codes, every)
    shift = np.float32(np.log(codes))
    outputs = {
        "log_alpha": step.keep, "log_cumprod_alpha": whole.keep, "log_1_min_alpha": step.replace + shift,
        "log_1_min_cumprod_alpha": whole.replace + shift,
    }  # fmt: skip

    def flat(x):
        return jnp.asarray(x, jnp.int32).reshape(len(x), -1)

    def noise(x):  # theirs [... codes rows columns]
        return gumbel(x).reshape(*x.shape[:-2], rows * columns)

    x0, x_t, t = flat(io["x0"]), flat(io["x_t"]), jnp.asarray(io["t"], jnp.int32)
    assert len(t) == h["batch"]
    cond, jump, clean = (
        Cond(jnp.zeros((len(t), 0, 1))),
        process.jump(codes, every, every - 1).take(t),
        one_hot(x0, codes),
    )
    asked = Asked(params, rules, [name.removeprefix("loss_bits.grad.") for name in folder.want if ".grad." in name])

    @jax.jit
    def run(params):
        def objective(params):
            def run(self):
                noisy = (self.spoilt(x0, t) + last(noise(io["u_forward"]))).argmax(-1)
                bound, _ = self.errors(x0, noisy, t, self.backbone.predict(noisy, t, cond))
                return (times * bound + process.prior(clean)).mean() / np.log(2)

            return generator.apply({"params": params}, method=run)

        loss, grads = jax.value_and_grad(objective)(params)
        logits = generator.apply({"params": params}, x_t, method=lambda self, x: self.backbone.predict(x, t, cond))
        found = generator.apply({"params": params}, logits, method="predicted")
        return logits, process.posterior(found, x_t, jump), loss, asked.of(grads)

    logits, model, loss, grads = run(params)
    bound = generator.bind({})
    outputs |= {
        "network_logits": last(logits), "q_t": last(bound.spoilt(x0, t)), "posterior_model": last(model),
        "posterior_true": last(process.posterior(clean, x_t, jump)), "kl_prior": process.prior(clean).sum(1), "loss_bits": loss,
    }  # fmt: skip
    outputs |= {f"loss_bits.grad.{key}": value for key, value in asked.named(grads).items()}
    start = last(noise(io["u_start"]))
    uniform = io["u_steps"].reshape(*io["u_steps"].shape[:-2], -1)
    return outputs | {"sample": in_order(h, generator, params, {}, uniform, steps=start)}


class Toy(MaskedDiffusion):
    """Logits of a place are a sum over all places, by their codes or the mask."""

    table: Any = None

    def setup(self):
        pass

    def hidden(self, tokens, hidden, cond):
        codes, slots = self.spec.codes[0], np.arange(self.spec.n)
        shown = jnp.where(hidden, codes, tokens[..., 0])
        rows = jnp.asarray(self.table)[:, slots, shown[0]]  # one image
        return rows.sum(1)[None, :, :codes]


class GivenHead(Categorical):
    """Has logits, and draws with noise that is given for every step and place."""

    noise: Any = None

    def setup(self):
        pass

    def __call__(self, h):
        return h

    def draw(self, logits, keys, knobs, i):
        return (logits + jnp.asarray(self.noise)[i]).argmax(-1)[..., None]


def race(uniform):
    """Noise whose sum with logarithms of p is largest where p / (1e-10 - log(u + 1e-10)) is."""
    return -np.log(1e-10 - np.log(np.asarray(uniform, np.float64) + 1e-10))


def hit(folder, shown):
    """Tokens, times and places of first hitting around known tokens (-1 where there are none)."""
    h, io = folder.h, folder.io
    codes, known = h["num_codes"], np.flatnonzero(shown >= 0)
    n, left = len(shown), len(shown) - len(known)
    noise = race(io["u_code"])[..., :codes].astype(np.float32)
    toy = Toy(
        ViT(1, 8, 1), Nothing(8), GivenHead(codes, noise=noise), spec=TokenSpec(grid(1, n), (codes,)), table=io["table"]
    )
    places = picked(jnp.asarray(io["u_position"])[None, :left], jnp.asarray(shown < 0)[None])
    order = Order(np.concatenate([known[None], places], axis=1).astype(np.int32), (1,) * n)
    setting, keys = (
        Setting(Cond(jnp.zeros((1, 0, 1))), order, constant_knobs(np.ones(n))),
        jax.random.split(jax.random.key(0), (1, 1)),
    )
    state = toy.apply({}, setting, 1, method="begin")
    state = state.replace(tokens=to_ranks(jnp.asarray(np.maximum(shown, 0), jnp.int32)[None, :, None], order))
    step = jax.jit(lambda state, i: toy.apply({}, state, Step(i, len(known) + i, keys), setting, method="step"))
    for i in range(left):
        state = step(state, i)
    times = hitting_times(hitting_chances(jnp.asarray(io["u_time"])[None, :left], left))
    return to_slots(state.tokens, order)[0, :, 0], times[0], places[0]


def fhs(folder):
    h, io = folder.h, folder.io
    codes, mask, n = h["num_codes"], h["mask_id"], h["seq_len"]
    assert mask == codes
    partial, names = np.asarray(io["x_partial"]), ("ids", "times", "positions")
    outputs = dict(zip((f"fhs_{name}" for name in names), hit(folder, np.full(n, -1))))
    outputs |= dict(zip((f"fhs_{name}_partial" for name in names), hit(folder, np.where(partial == mask, -1, partial))))
    process = Hide()

    def log_odds(shown):
        rows = np.asarray(io["table"])[:, np.arange(n), shown].sum(1)[:, :codes]
        logits = jnp.asarray(rows, jnp.float32)
        return jnp.pad(jax.nn.log_softmax(logits), ((0, 0), (0, 1)), constant_values=FLOOR)

    def back(shown, late, early, uniform):
        """One step of ancestral sampling."""
        parts = late, 1 - (1 - late) / (1 - early), early
        jump = Jump(*(rates(1 - part, part, codes) for part in parts))
        states = jnp.asarray(shown, jnp.int32)[None]
        log_p = np.asarray(process.posterior(log_odds(shown)[None], states, jump)[0])
        return np.where(shown == mask, (log_p + race(uniform)).argmax(-1), shown)

    outputs["ancestral_step"] = back(partial, h["ancestral_t"], h["ancestral_t"] - h["ancestral_dt"], io["u_ancestral"])
    shown, steps = np.full(n, mask), h["ancestral_steps"]
    for i in range(steps):
        shown = back(shown, 1 - i / steps, 1 - (i + 1) / steps, io["u_ancestral_full"][i])
    outputs["ancestral_ids"] = shown
    kept = jax.nn.softmax(Inside(h["nucleus_p"])(log_odds(partial)))
    outputs["nucleus_probs"] = np.where(partial[:, None] == mask, kept, np.eye(codes + 1)[partial])
    chances = hitting_chances(jnp.asarray(io["u_time"])[None], n)[0]
    outputs |= {
        "mask_chance": chances,
        "times_cosine": hitting_times(chances, "cos"),
        "times_square": hitting_times(chances, "square"),
    }
    p = np.asarray(io["probs"], np.float64)
    for name, bits in (("torch32", 24), ("jax32", 23), ("f64", 53)):
        outputs[f"gumbel_max_{name}"] = largest = -np.log(-np.log1p(-(2.0**-bits)))
        for steps in (int(key) for key in folder.outputs(f"cond_{name}_")):
            found = cut(np.append(p / steps, 1 - 1 / steps), largest)[:-1]
            outputs[f"cond_{name}_{steps}"] = found / found.sum()
    outputs["trunc_small_max"] = cut(p, h["truncation_small"])
    return outputs


CASES = {
    "vq_diffusion_rules": rules, "vq_diffusion": text, "vq_diffusion_class": classes, "vq_ddm": vq_ddm, "fhs_rules": fhs,
}  # fmt: skip
