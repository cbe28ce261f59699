import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.machine.sharding import MeshShape, make_mesh
from ar_jax.nets import attention
from ar_jax.nets.attention import Sight, attend, fused, sight, splash, visible

CAUSAL = np.arange(-1, 150, dtype=np.int32)
SCALES = np.repeat(np.arange(5, dtype=np.int32), [1, 4, 16, 36, 81])  # next-scale prediction: blocks see one another


def test_rows_see_steps_that_are_not_later():
    np.testing.assert_array_equal(
        visible(np.int32([1, 2]), np.int32([0, 1, 1, 2]))[0], [[True, True, True, False], [True, True, True, True]]
    )


def test_rows_that_are_not_valid_are_seen_by_themselves_only():
    valid = jnp.array([[False, True, True], [True, True, True]])
    step = np.int32([-1, 0, 1])
    seen = visible(step, step, valid=valid)
    np.testing.assert_array_equal(seen[0], [[True, False, False], [False, True, False], [False, True, True]])
    np.testing.assert_array_equal(seen[1], np.tri(3, dtype=bool))


def test_a_cached_row_finds_itself_by_its_place():
    seen = visible(np.int32([0]), np.int32([-1, 0, 1]), first=1, valid=jnp.array([[True, False, True]]))
    np.testing.assert_array_equal(seen[0], [[True, True, False]])


def arrays(rows, features, heads=2, images=2):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (images, heads, rows, features)) for key in keys]


@pytest.mark.parametrize("step", [CAUSAL, SCALES], ids=["causal", "scales"])
@pytest.mark.parametrize("padded", [False, True], ids=["all rows", "padded captions"])
def test_splash_equals_plain_attention_with_its_gradients(step, padded):
    """To 2e-5 of values of size 1; neither the rows (151, 138) nor the channels (20) fill a TPU's tiles."""
    rows = len(step)
    *qkv, cotangent = arrays(rows, 20)
    valid = jnp.arange(rows) >= jnp.array([[7], [0]]) if padded else None
    seen = jnp.ones((2, 1, rows, 1)) if valid is None else valid[:, None, :, None]

    def both(attention):
        out, pull = jax.vjp(lambda *qkv: attention(*qkv) * seen, *qkv)
        return out, pull(cotangent)

    plain = both(functools.partial(attend, mask=visible(step, step, valid=valid)))
    fast = both(functools.partial(splash, step=step, valid=valid, interpret=True))
    for want, got in zip(jax.tree.leaves(plain), jax.tree.leaves(fast)):
        np.testing.assert_allclose(got * 1, want * 1, rtol=0, atol=2e-5)


def test_splash_divides_images_and_heads_over_a_mesh():
    *qkv, _ = arrays(len(SCALES), 64)
    mesh = make_mesh(MeshShape(data=1, fsdp=2, tp=2), jax.devices()[:4])
    where = jax.NamedSharding(mesh, jax.P("fsdp", "tp"))
    with jax.set_mesh(mesh):
        out = jax.jit(functools.partial(splash, step=SCALES, interpret=True))(*jax.device_put(qkv, where))
    assert out.sharding.is_equivalent_to(where, 4)
    np.testing.assert_allclose(out, attend(*qkv, mask=visible(SCALES, SCALES)), rtol=0, atol=2e-5)


def test_without_a_tpu_attention_is_plain():
    assert sight(CAUSAL).step is None
    assert sight(CAUSAL).mask.shape == (1, 151, 151)


@pytest.mark.parametrize("step", [CAUSAL, SCALES], ids=["causal", "scales"])
def test_the_gpus_kernel_gets_the_same_question(step):
    """Its question in JAX's own form, with gradients; the kernel itself is compared by tests/accelerator.py."""
    *qkv, cotangent = arrays(len(step), 20)
    mask = visible(step, step)

    def both(attention):
        out, pull = jax.vjp(attention, *qkv)
        return out, pull(cotangent)

    plain = both(functools.partial(attend, mask=mask, scale=0.7))
    fast = both(functools.partial(fused, mask=None if step is CAUSAL else mask, scale=0.7, implementation="xla"))
    for want, got in zip(jax.tree.leaves(plain), jax.tree.leaves(fast)):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_a_gpu_takes_its_kernel_where_it_pays(monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    asked = []
    monkeypatch.setattr(attention, "fused", lambda *arguments: asked.append(arguments) or arguments[0])
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in arrays(len(CAUSAL), 16))
    sight(CAUSAL)(q, k, v)
    sight(SCALES)(*(x[:, :, : len(SCALES)] for x in (q, k, v)))
    assert asked[0][3] is None, "the kernel knows the triangle without a mask"
    assert asked[1][3].shape == (1, len(SCALES), len(SCALES))
    few = sight(CAUSAL[-3:], CAUSAL, 148)
    assert isinstance(few, Sight)
    assert not few.fuse
    sight(CAUSAL)(q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32))
    assert len(asked) == 2, "float32 is attended plainly"
