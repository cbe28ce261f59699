"""What next-scale models do beside the laws: drawn lists of scales, redrawing, soft codes, settings."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import test_laws as laws
from cases import CASES, INDEPENDENT, INFO, RESIDUAL, Case

from ar_jax.decode.guidance import Ramp
from ar_jax.decode.logits import Filter
from ar_jax.decode.sampling import Sampling, read_sampling
from ar_jax.decode.temperature import KnownScales
from ar_jax.generators.causal import Causal
from ar_jax.generators.hmar import draw_masked
from ar_jax.generators.inputs import NextScale, upsampling
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.attention import attend, splash, visible
from ar_jax.nets.conditioning import Caption
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import NEVER, DrawnScales, raster, scales
from ar_jax.tokens import TokenSpec, pyramid
from ar_jax.train.optim import Optim, only_trained

ALL = TokenSpec(pyramid(tuple(range(1, 17))), codes=(8,))


def test_drawn_lists_of_scales_follow_the_recipe():
    draw, sides = DrawnScales(), np.arange(1, 17)
    chosen = np.asarray(
        jax.jit(jax.vmap(functools.partial(draw.draw, sides)))(jax.random.split(jax.random.key(0), 2000))
    )
    lengths = (chosen * sides**2).sum(1)
    assert lengths.max() <= 680
    assert chosen[:, :2].all()
    usual = (chosen == np.isin(sides, draw.usual)).all(1)
    assert 0.03 < usual.mean() < 0.08
    counts = chosen.sum(1)
    assert counts.max() == 10
    assert (counts < 10).mean() > 0.5, "most lists are too long at first"
    assert len(np.unique(chosen, axis=0)) > 300
    assert 0.5 < chosen[:, -1].mean() < 1, "the length rule may take the last scale"


def test_a_drawn_order_lists_the_chosen_scales_and_pads_the_rest():
    order = jax.jit(lambda keys: DrawnScales()(ALL, keys))(jax.random.split(jax.random.key(3), 1))
    step, slot = np.asarray(order.step), np.asarray(order.slot[0])
    real = step != NEVER
    assert order.n == 680
    level = ALL.coords[slot[real], 0]
    assert (np.diff(level) >= 0).all()
    np.testing.assert_array_equal(step[real], np.unique(level, return_inverse=True)[1])
    np.testing.assert_array_equal(np.unique(level, return_counts=True)[1], (np.unique(level) + 1) ** 2)
    with pytest.raises(ValueError, match="but the tokenizer has"):
        DrawnScales()(TokenSpec(pyramid((1, 2)), codes=(8,)), jax.random.split(jax.random.key(0), 1))


@pytest.mark.parametrize("backbone", [Transformer(2, 16, 2, hidden=24), AdaLN(2, 16, 2, hidden=24, gate=0.5)])
def test_rows_of_a_caption_come_before_the_scales(backbone):
    net = Causal(backbone, Caption(16), inputs=NextScale(channels=4))
    case = Case(net.complete(RESIDUAL.spec, INFO), scales, images=2, pyramid=RESIDUAL)
    laws.test_rows_do_not_see_their_own_or_later_tokens(case)
    laws.test_cached_sampling_equals_a_redraw_from_the_teacher_forced_pass(case)

    @jax.jit
    def loss(text):
        return case.generator.apply(
            {"params": case.params}, case.tokens, case.batch | {"text": text}, scales(RESIDUAL.spec),
            drop=jnp.zeros(2, bool), tokenizer=case.tokenizer, method="loss",
        )[0]  # fmt: skip

    text = case.batch["text"]
    changed = np.abs(loss(text) - loss(text + (np.arange(4) == 1)[:, None])).max(1)
    np.testing.assert_array_equal(changed > 1e-4, case.batch["text_mask"][:, 1])


def test_what_a_row_knows_of_the_scale_before_is_the_tokenizers_context():
    case = CASES["flexvar"]
    weight = upsampling(case.generator.spec, scales(case.generator.spec), 0, case.generator.spec.n)
    codes = case.tokenizer(case.tokens, method="embed")
    want = case.tokenizer(case.tokens, method="context")
    np.testing.assert_allclose(jnp.einsum("mn,bnc->bmc", weight, codes), want, atol=1e-5)


def test_training_on_a_part_of_the_scales_equals_training_on_that_list():
    case = CASES["flexvar"]
    small = INDEPENDENT.clone(scales=(1, 2, 3))
    keep = np.isin(case.generator.spec.coords[:, 0], (0, 1, 3))
    part = DrawnScales(usual=(1, 2, 3), often=1.0, keep=(1,), some=(), last=3)
    everything = INDEPENDENT.clone(scales=(1, 2, 3))
    order = part(everything.spec, jax.random.split(jax.random.key(0), 1))
    net = case.generator.on(small.spec)

    def loss(order):
        tokens = case.tokens[:, keep]
        call = functools.partial(small.apply, case.tokenizer.args[0])
        found = net.apply(
            {"params": case.params}, tokens, case.batch, order, drop=jnp.zeros(4, bool), tokenizer=call, method="loss"
        )
        return (found[0] * found[1]).sum() / found[1].sum()

    np.testing.assert_allclose(loss(order), loss(scales(small.spec)), rtol=1e-5)


def draw(case, generator, sampling, seed=0):
    keys = jax.random.split(jax.random.key(seed), case.images)
    order = scales(generator.spec)
    return jax.jit(
        lambda params: sampling.tokens(generator, params, case.batch, order, tokenizer=case.tokenizer, keys=keys)[0]
    )(case.params)


def test_refining_redraws_so_many_tokens_of_a_scale_and_no_others():
    case, settings = CASES["hmar"], Sampling(Ramp(1.5))
    plain = np.asarray(draw(case, case.generator, settings))
    refined = np.asarray(draw(case, case.generator.clone(refine=((1,), (1, 3), (7, 1, 1))), settings))
    changed = (plain != refined)[..., 0]
    assert not changed[:, 0].any()
    assert changed[:, 1:5].any()
    assert (changed[:, 1:5].sum(1) <= 3).all()
    with pytest.raises(ValueError, match=r"refine has \(1, 2\) for scale 1, which must sum to its 4 tokens"):
        draw(case, case.generator.clone(refine=((1,), (1, 2))), settings)
    again = Sampling(fields=(("generator.refine", ((1,),)),))
    assert again.adapted(case.generator, RESIDUAL, scales)[0].refine == ((1,),)
    assert case.generator.clone(refine=((1,), (1, 3))).calls(scales(RESIDUAL.spec))["generator"].tolist() == [1, 2, 1]
    with pytest.raises(ValueError, match=r"generator.refine cannot be changed in sampling; of this model these can: none"):
        again.adapted(CASES["var"].generator, RESIDUAL, scales)


def test_every_scale_but_the_first_is_masked_by_the_same_part():
    spec = RESIDUAL.spec
    masked = np.asarray(jax.vmap(functools.partial(draw_masked, spec))(jax.random.split(jax.random.key(0), 50)))
    assert not masked[:, 0].any()
    four, nine = masked[:, 1:5].sum(1), masked[:, 5:].sum(1)
    assert four.min() >= 1
    assert (np.abs(four / 4 - nine / 9) < 0.3).all()
    assert len(np.unique(masked[:, 5:], axis=0)) > 20


def test_soft_codes_are_vectors_that_end_near_codes_and_decode():
    case = CASES["var"]
    vectors = np.asarray(draw(case, case.generator, Sampling(Ramp(1.5), soft=True)))
    assert vectors.shape == (case.images, case.generator.spec.n, 4)
    everything = case.tokenizer(jnp.arange(12)[None, :, None], method="embed")[0]
    distance = np.sqrt(np.square(vectors[:, :, None] - np.asarray(everything)).sum(-1)).min(-1)
    assert distance[:, 5:].mean() < 0.1 * distance[:, :1].mean() + 1e-2
    assert case.tokenizer(jnp.asarray(vectors), method="decode").shape == (case.images, 6, 6, 3)


def test_parts_of_sampling_speak_of_scales():
    spec = TokenSpec(pyramid((1, 2, 3, 5, 8)), codes=(8,))
    sampling = Sampling(
        Ramp(2.0, reach=2, largest=5), KnownScales(largest=5, known=(1, 2, 5, 8)), Filter(banned=(3,))
    )
    knobs = sampling.knobs(scales(spec), spec)
    np.testing.assert_allclose(knobs.guidance, [1, 2, 3, 4, 3])
    np.testing.assert_array_equal(knobs.temperature, [1, 1, 0, 1, 0])
    assert np.isneginf(knobs.filter(jnp.zeros(8))[3])
    assert (Sampling().knobs(scales(spec), spec).guidance == 1).all()
    with pytest.raises(ValueError, match="speak of scales"):
        sampling.knobs(raster(spec), spec)
    flat = {
        "guidance": 2.0, "guidance_rule": "ramp", "guidance_reach": 2, "largest": 5, "known": [1, 2, 5, 8], "banned": [3],
        "scales": [1, [2, 4]],
    }  # fmt: skip
    old = read_sampling(flat)
    assert old == dataclasses.replace(sampling, fields=(("tokenizer.scales", (1, (2, 4))),))
    decoder = INDEPENDENT.clone(scales=(1, 2, 3))
    generator, tokenizer, _ = old.adapted(CASES["flexvar"].generator, decoder, scales)
    assert tokenizer.spec.scales == generator.spec.scales == ((1, 1), (2, 4))
    with pytest.raises(ValueError, match=r"tokenizer\.scales cannot be changed in sampling"):
        old.adapted(CASES["var"].generator, RESIDUAL, scales)
    with pytest.raises(ValueError, match=r"\['guidnce'\], which this version does not know"):
        read_sampling({"guidnce": 1.0})


def test_an_order_of_another_kind_is_refused():
    case = CASES["var"]
    with pytest.raises(ValueError, match="reveals one scale per step"):
        case.generator.inputs.check(raster(case.generator.spec))
    with pytest.raises(ValueError, match="one of 14 slots"):
        CASES["llamagen_label"].generator.inputs.complete(case.generator.spec).check(scales(case.generator.spec))


@pytest.mark.parametrize("own", [False, True])
def test_the_kernel_serves_a_step_with_a_cache_and_rows_of_one_step(own):
    keys = np.repeat(np.arange(3, dtype=np.int32), (1, 40, 150))
    step = keys if own else keys[41:]
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 2, n, 8)) for i, n in enumerate((len(step), 191, 191)))
    out = splash(q, k, v, step, interpret=True, keys=keys, own=own, scale=1.0)
    np.testing.assert_allclose(out, attend(q, k, v, visible(step, keys, own=own), 1.0), rtol=0, atol=2e-5)


def test_parameters_that_are_not_trained_get_no_gradient():
    params = {"masks": {"w": jnp.ones(2)}, "tail": {"w": jnp.ones(2)}}
    loss = lambda params: sum(x.sum() for x in jax.tree.leaves(only_trained(Optim(trained=("^/mask",)), params)))  # noqa: E731
    grads = jax.grad(loss)(params)
    np.testing.assert_array_equal(grads["masks"]["w"], [1, 1])
    np.testing.assert_array_equal(grads["tail"]["w"], [0, 0])
    with pytest.raises(ValueError, match="matches no parameter"):
        only_trained(Optim(trained=("nothing",)), params)
