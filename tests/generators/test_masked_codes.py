"""Masked generators of codes: what holds beside the laws, which run on continuous tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ar_jax.data import Info
from ar_jax.decode.edit import Source
from ar_jax.decode.guidance import Interval, Rising
from ar_jax.decode.logits import Filter
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.sequential import Sequential
from ar_jax.decode.temperature import Constant, Fading
from ar_jax.generators.binary_diffusion import Denoised
from ar_jax.generators.code_diffusion import CodeDiffusion
from ar_jax.generators.corruption import MaskAndReplace, Uniform
from ar_jax.generators.fractal import Infilling, Inside
from ar_jax.generators.halton_maskgit import HaltonMaskGIT, Registered
from ar_jax.generators.masked import Masked
from ar_jax.generators.masked_diffusion import FirstHitting, MaskedDiffusion
from ar_jax.generators.maskgit import MaskGIT
from ar_jax.generators.meissonic import Meissonic, Prompt
from ar_jax.heads.categorical import Categorical
from ar_jax.heads.colours import Colours
from ar_jax.heads.factorised import Factorised
from ar_jax.heads.gaussian_mixture import GaussianMixture
from ar_jax.nets.bert import Bert, UViT
from ar_jax.nets.code_transformer import CodeTransformer
from ar_jax.nets.code_unet import CodeUNet
from ar_jax.nets.conditioning import Classes, Label
from ar_jax.nets.fractal import Enclosed, FromAbove, Repeated
from ar_jax.nets.multimodal import MultiModal
from ar_jax.nets.transformer import Transformer
from ar_jax.nets.vit import GPT, ClipViT, ViT
from ar_jax.orders import Confident, Halton, Shuffled, known_first
from ar_jax.tokens import TokenSpec, grid, pyramid

SPEC, IMAGES, CODES = TokenSpec(grid(3, 4), codes=(7,)), 4, 7
INFO = Info(classes=3, captions=True, text_rows=4, text_width=6)
TITOK = {"most": 1.0, "curve": "arccos", "noise": "temperature", "known_weight": 0.1}
METHODS = {
    "masked": (
        Masked(ViT(1, 16, 2), ViT(1, 16, 2), Label(16, apart=True), Categorical(std=0.5), buffer=2),
        Shuffled(4, 2),
    ),
    "maskgit": (MaskGIT(GPT(1, 16, 2, rows=0), Label(16), Categorical(std=0.5), choice=2.0), Confident(4)),
    "fractal": (
        Infilling(
            ClipViT(1, 16, 2), Repeated(Label(16, apart=True), 5),
            Inside(
                Infilling(ClipViT(1, 8, 2), FromAbove(8, 5), Colours(Enclosed(1, 8, 2))), 1, Shuffled(3, 1),
                Colours(Enclosed(1, 8, 2)),
            ),
        ),
        Shuffled(4, 2),
    ),
    **{
        name: (MaskGIT(net, Label(16), Categorical(std=0.5, sure="logit"), **TITOK), Confident(4, "arccos"))
        for name, net in (("bert", Bert(1, 16, 2)), ("uvit", UViT(2, 16, 2)))
    },
    "meissonic": (
        Meissonic(MultiModal(1, 16, 2, singles=1, axes=(0, 4, 4)), Prompt(16), Categorical(std=0.5), joined=True), Confident(4),
    ),
}
METHODS |= {
    name: (CodeDiffusion(net, conditioning, process, aux=0.1), Denoised(4))
    for name, net, conditioning, process in (
        ("vq_diffusion", CodeTransformer(1, 16, 2, mlp="grid"), Classes(), MaskAndReplace(4)),
        ("vq_ddm", CodeUNet(16, (1,), features=8), Label(16), Uniform(4)),
    )
}
METHODS["mdm"] = MaskedDiffusion(GPT(1, 16, 2, rows=0), Label(16), Categorical(std=0.5), look_back=True), FirstHitting(4)
METHODS["halton"] = HaltonMaskGIT(Registered(1, 16, 2, hidden=24), Label(16)), Halton(4, scans=2)
BATCH = {
    "label": np.arange(IMAGES, dtype=np.int32) % 3,
    "text": np.random.default_rng(4).normal(size=(IMAGES, 4, 6)).astype(np.float32),
    "text_mask": np.array([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]], bool),
}
TOKENS = np.random.default_rng(0).integers(CODES, size=(IMAGES, SPEC.n, 1)).astype(np.int32)
SPECS = {
    "fractal": TokenSpec(grid(3, 4), codes=(256,) * 4),  # grey patches of 2x2 pixels
    "meissonic": TokenSpec(grid(2, 6), codes=(7,)),
}
every = pytest.mark.parametrize("name", METHODS)


def spec_of(name):
    return SPECS.get(name, SPEC)


def tokens_of(name):
    """Some of its kind; of patches those whose values differ little."""
    return np.tile(TOKENS, len(spec_of(name).codes))


@functools.cache
def ready(name):
    generator = METHODS[name][0].complete(spec_of(name), INFO)
    params = jax.jit(generator.init_params)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return generator, tree.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


def drawn(name, images=slice(None), known=None, **parts):
    generator, params = ready(name)
    keys = jax.random.split(jax.random.key(3), IMAGES)[images]
    sampling, order_fn, source = Sampling(**({"guidance": Interval(1.5)} | parts)), METHODS[name][1], None
    order = order_fn(spec_of(name), keys, len(keys), 0)
    if known is not None:
        ranks = int(known.sum()) if generator.any_order else 0
        order = known_first(order_fn, spec_of(name), known, keys) if generator.any_order else order
        source = Source(jnp.asarray(tokens_of(name)[images]), jnp.broadcast_to(known, (len(keys), SPEC.n)), ranks)
    batch = jax.tree.map(lambda x: x[images], BATCH)
    run = jax.jit(lambda params: sampling.tokens(generator, params, batch, order, keys=keys, source=source))
    return jax.tree.map(np.asarray, run(params))


@every
def test_codes_are_drawn_in_the_orders_steps_and_an_image_does_not_depend_on_its_neighbours(name):
    tokens, account = drawn(name)
    codes = spec_of(name).codes
    assert (tokens.shape, tokens.dtype) == ((IMAGES, SPEC.n, len(codes)), np.int32)
    assert tokens.min() >= 0
    assert tokens.max() < codes[0]
    assert len(np.unique(tokens)) > 2
    np.testing.assert_array_equal(account.calls["generator"], 4)
    np.testing.assert_array_equal(drawn(name, slice(2, 3))[0], tokens[2:3])


@every
def test_filters_and_temperature_reach_the_draw(name):
    even = tuple(range(0, spec_of(name).codes[0], 2))
    banned = drawn(name, filter=Filter(banned=even))[0]
    assert (banned % 2).all()
    greedy = drawn(name, temperature=Constant(0.0))[0]
    assert (greedy != drawn(name)[0]).any()


@every
def test_known_codes_stay(name):
    known = np.zeros(SPEC.n, bool)
    known[[0, 5, 11]] = True
    tokens, account = drawn(name, known=known)
    np.testing.assert_array_equal(tokens[:, known], tokens_of(name)[:, known])
    assert (tokens[:, ~known] != tokens_of(name)[:, ~known]).any()
    drawn_ranks = SPEC.n - 3 if METHODS[name][0].any_order else SPEC.n
    np.testing.assert_array_equal(account.accepted.sum(1), drawn_ranks)


@pytest.mark.parametrize("name", ["maskgit", "meissonic"])
def test_a_maskgit_does_not_see_hidden_codes(name):
    generator, params = ready(name)
    hidden = np.random.default_rng(1).random((IMAGES, SPEC.n)) < 0.5

    @jax.jit
    def rows(tokens):
        run = lambda self: self.hidden(tokens, hidden, self.condition(BATCH, jnp.zeros(IMAGES, bool)))  # noqa: E731
        return generator.apply({"params": params}, method=run)

    other = np.where(hidden[..., None], (TOKENS + 1) % CODES, TOKENS)
    np.testing.assert_array_equal(rows(TOKENS), rows(other))
    assert np.abs(rows(TOKENS) - rows((TOKENS + 1) % CODES)).max() > 1e-3


@every
def test_loss_falls_and_every_parameter_moves(name):
    generator, (_, order_fn), tx = ready(name)[0], METHODS[name], optax.adam(1e-2)
    order = order_fn(spec_of(name), jax.random.split(jax.random.key(4), IMAGES), IMAGES, 0)
    drop = jnp.array([False, True] * (IMAGES // 2))

    def loss_fn(params, key):
        loss, weight, _ = generator.apply({"params": params}, tokens_of(name), BATCH, order, drop=drop, key=key, method="loss")
        return (loss * weight).sum() / weight.sum()

    @jax.jit
    def train(params):
        def update(carry, key):
            params, opt = carry
            loss, grads = jax.value_and_grad(loss_fn)(params, key)
            updates, opt = tx.update(grads, opt, params)
            params = optax.apply_updates(params, updates)
            return (params, opt), loss

        (params, _), losses = jax.lax.scan(update, (params, tx.init(params)), jax.random.split(jax.random.key(5), 60))
        return params, losses

    first = jax.jit(generator.init_params)(jax.random.key(0))
    last, losses = train(first)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), first, last)))
    assert losses[-10:].mean() < 0.9 * losses[:3].mean()


def test_maskgit_refuses_tokens_of_several_codes():
    net = MaskGIT(GPT(1, 16, 2, rows=0), Label(16), Factorised(Transformer(1, 16, 2, hidden=24)))
    with pytest.raises(ValueError, match=r"MaskGIT embeds tokens of one code, but the tokenizer gives codes \(3, 4\)"):
        net.complete(TokenSpec(grid(3, 4), codes=(3, 4)), Info(classes=3))


def test_meissonics_time_is_the_part_that_is_hidden_and_micro_conditions_are_those_of_the_prompt_unless_an_image_says_others():
    generator, params = ready("meissonic")
    hidden, no = np.arange(SPEC.n) < np.array([[1], [3], [7], [12]]), jnp.zeros(IMAGES, bool)
    micro = jnp.array(generator.conditioning.micro)

    @jax.jit
    def rows(params):
        def of(self, batch, time):
            cond = self.condition(BATCH | batch, no)
            return self.hidden(TOKENS, hidden, cond.replace(mod=cond.mod.replace(time=time)))

        said = (({}, None), ({"micro": micro}, 1000 * hidden.mean(1)), ({"micro": micro * 2}, None), ({}, jnp.float32(500)))
        return [generator.apply({"params": params}, *one, method=of) for one in said]

    plain, same, *others = rows(params)
    np.testing.assert_allclose(same, plain, atol=1e-6)
    for other in others:
        assert (np.abs(other - plain).max((1, 2)) > 1e-4).all()


@pytest.mark.parametrize(
    ("spec", "fields", "message"),
    [
        (TokenSpec(grid(3, 4), codes=(7,)), {}, r"joined makes one row of four places, but the grid is \(3, 4\); give even sides"),
        (TokenSpec(pyramid((2, 4)), codes=(7,)), {}, r"Meissonic needs one full grid of codes, but .* in \(\(2, 2\), \(4, 4\)\)"),
        (TokenSpec(grid(2, 6), channels=3), {"head": GaussianMixture(2)}, r"needs one full grid of codes, but .* codes \(\)"),
        (SPECS["meissonic"], {"vocabulary": 7}, r"vocabulary is 7; it must be 0 or more than the 7 codes"),
        (SPECS["meissonic"], {"backbone": MultiModal(1, 16, 2, axes=(2, 3, 3))}, r"axes is \(2, 3, 3\); they must be even .*, 16 / 2"),
    ],
)
def test_meissonic_refuses_what_it_cannot_serve(spec, fields, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(METHODS["meissonic"][0].clone(**fields).complete(spec, INFO).init_params, jax.random.key(0))


def test_a_prompt_asks_for_the_vector_that_it_is_to_have():
    with pytest.raises(ValueError, match=r"conditioning\.pooled is 3, but the batch has no `pooled`; give float \[b 3\]"):
        Prompt(16, pooled=3).init(jax.random.key(0), BATCH, jnp.zeros(IMAGES, bool))


def test_titoks_steps_temperatures_and_masks_by_hand():
    order = Confident(4, "arccos")(SPEC)
    assert order.sizes == (2, 2, 3, 5)  # of 24/pi arccos(i/4), rounded down, stay 10, 8, 5
    eased = Fading(2.0, eased=True)(order, SPEC)
    np.testing.assert_allclose(eased, [1.5 * 1.1, 0.9, 0.5 * 0.7, 0], rtol=1e-6)
    np.testing.assert_allclose(Rising(5.0, "lagging")(order, SPEC), [1, 2, 3, 4], rtol=1e-6)
    generator, _ = ready("bert")
    scores = np.random.default_rng(0).random((3, SPEC.n))
    hidden = generator.drawn_mask(jnp.array([[1.0], [0.5], [0.0]]), scores)
    np.testing.assert_array_equal(hidden.sum(1), [1, 8, 12])


def test_a_maskgit_keeps_the_slots_of_its_order_if_told_so():
    generator, params = ready("maskgit")
    generator, keys = generator.clone(kept="ordered"), jax.random.split(jax.random.key(3), IMAGES)
    order = Halton(4)(SPEC, keys, IMAGES)
    assert len({tuple(row) for row in np.asarray(order.slot).tolist()}) > 1, "begun at a place of its own for every image"

    @jax.jit
    def run(params):
        task = Sampling().task(generator, params, BATCH, order, keys=keys)
        return Sequential().watched(task, (0, 1, 2, 3))[0]

    tokens, known = run(params)
    for j, count in enumerate(np.cumsum(order.sizes)):
        want = np.zeros((IMAGES, SPEC.n), bool)
        np.put_along_axis(want, np.asarray(order.slot)[:, :count], True, axis=1)
        np.testing.assert_array_equal(known[j], want)
        np.testing.assert_array_equal(tokens[j][want], tokens[-1][want])
