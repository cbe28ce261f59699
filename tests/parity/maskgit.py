"""TiTok's generators: MaskGIT with BERT's network and with a U-ViT."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import fixed, loaded

from ar_jax.convert import maskgit as source
from ar_jax.decode.guidance import Interval, Rising
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.temperature import Fading
from ar_jax.generators.base import Setting, Step
from ar_jax.generators.maskgit import MaskGIT, State
from ar_jax.generators.rar import PowerCosine
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.bert import Bert
from ar_jax.nets.conditioning import paired
from ar_jax.orders import Confident, halton_sizes, halton_slots, whole


def gumbel(uniform):
    """The reference's noise from its uniform numbers."""
    floor = lambda x: jnp.maximum(x, 1e-20)  # noqa: E731
    return -jnp.log(floor(-jnp.log(floor(uniform))))


class GivenHead(Categorical):
    """Draws with noise that is given."""

    def draw(self, logits, keys, knobs, i):
        cold = jnp.asarray(knobs.temperature)[i] == 0
        return (logits + jnp.where(cold, 0, GIVEN["logits"])).argmax(-1).astype(jnp.int32)[..., None]


class Given(MaskGIT):
    """Takes the noise of a step and the mask of training as they are given."""

    def gumbel(self, keys):
        return GIVEN["scores"]

    def drawn_mask(self, progress, scores):
        return GIVEN["mask"]


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
    generator = source.build("generator", shapes, size=0, heads=h["num_attention_heads"], groups=0, scales=())
    net = generator.backbone
    fixed(
        h, hidden_size=net.width, num_hidden_layers=net.layers, intermediate_size=net.hidden, norm_eps=net.eps,
        image_seq_len=generator.spec.n, codebook_size=generator.spec.codes[0],
        condition_num_classes=generator.conditioning.classes,
    )  # fmt: skip
    assert isinstance(net, Bert) == (folder.path.name == "maskgit_vit")
    return generator, loaded(generator, folder.weights, source)[0]


def sampling(h):
    """Our settings of the reference's."""
    g, decay = h["guidance_scale"], h["guidance_decay"]
    rules = {"constant": lambda: Interval(1 + g), "linear": lambda: Rising(1 + g, "lagging")}
    guidance = PowerCosine(g, h["guidance_scale_pow"]) if decay == "power-cosine" else rules[decay]()
    return Sampling(guidance, Fading(h["randomize_temperature"], h["softmax_temperature_annealing"]))


def drawn(generator, params, labels, settings, uniforms):
    """Tokens, and the ids and conditional logits of every step, by the generator's own step."""
    images, spec = len(labels), generator.spec
    order = Confident(settings["num_sample_steps"], "arccos")(spec)
    knobs = sampling(settings).knobs(order, spec)
    batch, ends = {"label": labels}, np.cumsum(order.sizes) - order.sizes
    logits_of, scores_of = (np.asarray(x) for x in uniforms)

    def one(noise, scores, state, i, first):
        GIVEN.update(logits=gumbel(noise), scores=gumbel(scores))

        def step(self, state):
            drop = jnp.zeros(images, bool)
            cond = self.condition(batch, drop)
            logits = self.head(self.hidden(state.tokens, ~state.known, cond))
            setting = Setting(paired(cond, self.condition(batch, ~drop)), order, knobs)
            keys = jax.random.split(jax.random.key(0), (images, 1))
            return logits, self.step(state, Step(i, first, keys), setting)

        return given(generator).apply({"params": params}, state, method=step)

    run = jax.jit(one)
    state, inputs, shown = State(spec.zeros(images), jnp.zeros((images, spec.n), bool)), [], []
    for i, first in enumerate(ends):
        inputs.append(np.where(state.known, state.tokens[..., 0], spec.codes[0]))
        logits, state = run(logits_of[i], scores_of[i], state, i, first)
        shown.append(logits)
    assert state.known.all()
    return state.tokens[..., 0], np.stack(inputs, 1), np.stack(shown, 1)


def generator(folder):
    h, io = folder.h, folder.io
    module, params = build(folder)
    codes, tokens = module.spec.codes[0], jnp.asarray(io["tokens"])[..., None]
    shown, hidden, labels = io["masked_tokens"], jnp.asarray(io["mask"], bool), {"label": jnp.asarray(io["labels"])}

    @jax.jit
    def forward(params):
        def logits(self, drop):
            return self.head(
                self.hidden(jnp.asarray(shown)[..., None], jnp.asarray(shown) == codes, self.condition(labels, drop))
            )

        drop = jnp.zeros(len(tokens), bool)
        return [module.apply({"params": params}, drop, method=logits) for drop in (drop, ~drop)]

    @jax.jit
    def loss(params):
        GIVEN["mask"] = hidden
        loss, weight, _ = given(module).apply(
            {"params": params}, tokens, labels, whole(module.spec), drop=jnp.zeros(len(tokens), bool), key=jax.random.key(0),
            method="loss",
        )  # fmt: skip
        return (loss * weight).sum() / (weight.sum() + 1e-8)

    cond, uncond = forward(params)
    drawn_mask = module.drawn_mask(jnp.asarray(io["mask_uniform"])[:, None], jnp.asarray(io["mask_scores"]))
    outputs = {
        "cond_logits": cond, "uncond_logits": uncond, "mlm_loss": loss(params), "train_mask": drawn_mask,
        "train_masked_tokens": np.where(drawn_mask, codes, tokens[..., 0]),
    }  # fmt: skip
    uniforms = io["gumbel_u_logits"], io["gumbel_u_conf"]
    for name, settings in h["generation_settings"].items():
        found = drawn(module, params, jnp.asarray(io["gen_labels"]), settings, uniforms)
        outputs |= {f"gen_{name}_{end}": value for end, value in zip(("tokens", "step_inputs", "cond_logits"), found)}
    return outputs


def halton(folder):
    h, outputs = folder.h, {}
    fixed(h, bases=[2, 3], num_points=10000)
    for side in h["grids"]:
        slots = halton_slots(side, side)
        outputs[f"order_{side}"] = np.stack(np.divmod(slots, side), 1)
        outputs |= {f"revealed_{side}_{steps}": np.cumsum(halton_sizes(side**2, steps)) for steps in h["steps"]}
    side = round((folder.want["rolled"].size / len(folder.io["shifts"]) / 2) ** 0.5)
    return outputs | {"rolled": np.stack([np.roll(outputs[f"order_{side}"], shift, 0) for shift in folder.io["shifts"]])}


CASES = {"halton_order": halton, "maskgit_vit": generator, "maskgit_uvit": generator}
