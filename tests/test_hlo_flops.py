"""Accounting: operations of traced functions (flops.py), and of compiled programs (hlo.py)."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES

from ar_jax.machine.flops import model_flops, with_fields, without_remat
from ar_jax.machine.hlo import Program, Shape
from ar_jax.machine.sharding import MeshShape, make_mesh
from ar_jax.tokenizers.conv import Encoder


def loop(x, w):
    """Five products of [8 16] and [16 16], one after the other."""
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]


LOOP = (jnp.ones((8, 16)), jnp.ones((16, 16)))


def program(function, *arguments):
    return Program(jax.jit(function).lower(*arguments).compile().as_text())


def total(parts, name):
    return sum(getattr(work, name) for work in parts.values())


def test_loops_count_as_often_as_they_run():
    products = 5 * 2 * 8 * 16 * 16
    assert model_flops(loop, *LOOP) == products
    assert total(program(loop, *LOOP).work(), "flops") == products


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    """As the one by which FlexVAR shortens a list of scales that it drew."""

    def halve(x, w):
        return jax.lax.while_loop(lambda x: x.sum() > w.sum(), lambda x: 0.5 * (x @ w), x)

    found = program(halve, *LOOP)
    assert total(found.work(), "flops") == 2 * 8 * 16 * 16
    assert len(found.unknown) == 1


def test_gradients_count_both_of_their_products():
    grad = jax.grad(lambda w, x: loop(x, w).sum())
    assert model_flops(grad, LOOP[1], LOOP[0]) == 3 * model_flops(loop, *LOOP)
    assert total(program(grad, LOOP[1], LOOP[0]).work(), "flops") == 3 * model_flops(loop, *LOOP)


@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions_count_their_window(groups):
    x, w = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4 // groups, 12))

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), ((0, 1), (0, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    assert model_flops(conv, x, w) == 2 * 2 * 4 * 4 * 12 * 9 * 4 / groups


def test_the_gradient_of_a_strided_convolution_does_not_count_zeros():
    encoder, x = Encoder(4, (1, 2), 1, 4, groups=2), jnp.ones((1, 16, 16, 3))
    params = encoder.init(jax.random.key(0), x)
    forward = model_flops(encoder.apply, params, x)
    backward = model_flops(jax.grad(lambda p: encoder.apply(p, x).sum()), params)
    assert 2.8 < backward / forward < 3.1, "all but the gradient of the image"


def test_without_remat_counts_no_recomputation():
    case = CASES["llamagen_label"]
    again = with_fields(case.generator, remat="full")
    order = case.order(case.generator.spec)

    def flops(generator):
        def loss(params):
            drop = jnp.zeros(case.images, bool)
            return generator.apply({"params": params}, case.tokens, case.batch, order, drop=drop, method="loss")[
                0
            ].sum()

        return model_flops(jax.grad(loss), case.params)

    assert without_remat(again).backbone.remat == "none"
    assert without_remat(CASES["llamagen_chunk"].generator).head.chunk == 0
    assert flops(without_remat(again)) < 0.85 * flops(again)


def test_tiles_pad_arrays_in_memory():
    assert Shape("f32", (3, 5)).bytes == 60
    assert Shape("bf16", (4, 8, 64), "2,1,0:T(8,128)(2,1)").bytes == 4 * 8 * 128 * 2
    assert Shape("f32", (20, 256, 1), "1,2,0:T(8,128)").bytes == 20 * 256 * 8 * 4
    assert Shape("pred", (7,), "0:T(512)").bytes == 7
    assert Shape("bf16", (8, 128), "1,0:T(8,128)(2,1)S(1)").on_chip
    assert not Shape("bf16", (8, 128), "1,0:T(8,128)(2,1)").on_chip


TPU = textwrap.dedent("""\
    HloModule jit_f

    %fused (p.0: f32[36,8,128], p.1: s32[], p.2: f32[8,128]) -> f32[36,8,128] {
      %p.0 = f32[36,8,128]{2,1,0:T(8,128)} parameter(0)
      %p.1 = s32[]{:T(128)} parameter(1)
      %p.2 = f32[8,128]{1,0:T(8,128)} parameter(2)
      %c = s32[]{:T(128)} constant(0)
      %s = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p.0, %p.1, %c, %c), dynamic_slice_sizes={1,8,128}
      %b = f32[1,8,128]{2,1,0:T(8,128)} bitcast(%p.2)
      %a = f32[1,8,128]{2,1,0:T(8,128)} add(%s, %b)
      ROOT %u = f32[36,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%p.0, %a, %p.1, %c, %c)
    }

    %all-reduce-scatter (input: bf16[64,128]) -> bf16[16,128] {
      %input = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
      %r = bf16[64,128]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
      %i = s32[]{:T(128)} constant(0)
      ROOT %d = bf16[16,128]{1,0:T(8,128)(2,1)} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={16,128}
    }

    %body (arg: (s32[], f32[36,8,128], f32[8,128])) -> (s32[], f32[36,8,128], f32[8,128]) {
      %arg = (s32[]{:T(128)}, f32[36,8,128]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) parameter(0)
      %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
      %stack = f32[36,8,128]{2,1,0:T(8,128)} get-tuple-element(%arg), index=1
      %x = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%arg), index=2
      %one = s32[]{:T(128)} constant(1)
      %next = s32[]{:T(128)S(6)} add(%i, %one)
      %f = f32[36,8,128]{2,1,0:T(8,128)} fusion(%stack, %i, %x), kind=kLoop, calls=%fused, metadata={op_name="stack"}
      ROOT %t = (s32[]{:T(128)}, f32[36,8,128]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) tuple(%next, %f, %x)
    }

    %condition (arg: (s32[], f32[36,8,128], f32[8,128])) -> pred[] {
      %arg = (s32[]{:T(128)}, f32[36,8,128]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) parameter(0)
      %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
      %n = s32[]{:T(128)} constant(36)
      ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
    }

    ENTRY %main (a: f32[36,8,128], g: bf16[64,128]) -> f32[36,8,128] {
      %a = f32[36,8,128]{2,1,0:T(8,128)} parameter(0)
      %g = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
      %zero = s32[]{:T(128)} constant(0)
      %x = f32[8,128]{1,0:T(8,128)S(1)} broadcast(%zero), dimensions={}
      %rs = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter, metadata={op_name="gradient"}
      %init = (s32[]{:T(128)}, f32[36,8,128]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) tuple(%zero, %a, %x)
      %w = (s32[]{:T(128)}, f32[36,8,128]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) while(%init), condition=%condition, body=%body
      ROOT %out = f32[36,8,128]{2,1,0:T(8,128)} get-tuple-element(%w), index=1
    }
    """)


def test_slices_and_updates_move_only_themselves_and_chip_memory_is_free():
    """A layer of a stack read and written 36 times; the summand lies on the chip."""
    assert Program(TPU).work()["stack"].bytes == 36 * (2 * 8 * 128 * 4 + 4), "and the index"


def test_a_counter_may_be_unsigned_and_rise_by_more_than_one():
    unrolled = TPU.replace("s32[]", "u32[]").replace(
        "%one = u32[]{:T(128)} constant(1)", "%one = u32[]{:T(128)} constant(2)"
    )
    assert Program(unrolled).work()["stack"].bytes == 18 * (2 * 8 * 128 * 4 + 4)


def test_a_tpus_scattered_all_reduce_is_a_reduce_scatter():
    groups = []
    work = Program(TPU).work(network=lambda group: groups.append(group) or 1e3)["gradient"]
    assert dict(work.collectives) == {"reduce-scatter": 64 * 128 * 2}
    assert groups == [[0, 1, 2, 3]]
    assert work.network == 64 * 128 * 2 / 1e3


def test_what_a_slice_sends_to_the_others_is_counted():
    """Gradients of a slice, as the compiler for several slices sends them through the hosts."""
    text = textwrap.dedent("""
    HloModule slices

    ENTRY %main (g: bf16[64,128]) -> bf16[64,128] {
      %g = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
      %after = token[] after-all()
      %s = (bf16[64,128]{1,0:T(8,128)(2,1)}, u32[], token[]) send(%g, %after), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}, metadata={op_name="gradient"}
      ROOT %out = bf16[64,128]{1,0:T(8,128)(2,1)} copy(%g)
    }
    """)
    groups = []
    work = Program(text).work(network=lambda group: groups.append(group) or 1e3)["gradient"]
    assert dict(work.collectives) == {"between slices": 64 * 128 * 2}
    assert groups == [[]], "of all devices"
    assert work.network == 64 * 128 * 2 / 1e3


def test_each_operation_takes_the_longer_of_computing_and_moving():
    work = program(loop, *LOOP).work(peak=1e3, bandwidth=1e30)
    assert total(work, "seconds") == pytest.approx(5 * 2 * 8 * 16 * 16 / 1e3)


def test_collectives_of_a_mesh_are_found_with_their_groups():
    mesh = make_mesh(MeshShape(data=2, fsdp=4), jax.devices())
    where = jax.NamedSharding(mesh, jax.P("fsdp"))
    x = jax.device_put(np.ones((8, 4), np.float32), where)
    gather = jax.jit(lambda x: x * 2, out_shardings=jax.NamedSharding(mesh, jax.P()))
    groups = []
    parts = Program(gather.lower(x).compile().as_text()).work(network=lambda group: groups.append(group) or 1.0)
    assert sum(work.collectives["all-gather"] for work in parts.values()) == 8 * 4 * 4
    assert groups == [[0, 1, 2, 3]]


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        Program("HloModule nothing")


@pytest.mark.parametrize("images", ["2,", ""])
def test_the_attention_kernel_counts_its_two_products(images):
    """JAX leaves the axis of the images out where a device has one, as with GigaTok XL-XXL on v5e:16x16."""
    rows = f"bf16[{images}4,256,64]"
    text = textwrap.dedent(f"""
    HloModule kernel

    ENTRY %main (m: s8[1,2,4], q: {rows}, k: bf16[{images}4,512,64]) -> {rows} {{
      %m = s8[1,2,4]{{2,1,0}} parameter(0)
      %q = {rows} parameter(1)
      %k = bf16[{images}4,512,64] parameter(2)
      ROOT %splash_mha_fwd.3 = {rows} custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call", metadata={{op_name="attention"}}
    }}
    """)
    assert Program(text).work()["attention"].flops == (2 if images else 1) * 2 * 2 * 4 * 256 * 512 * 64
