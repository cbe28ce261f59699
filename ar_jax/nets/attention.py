"""Attention decided by integers: every row carries the step at which its token becomes known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P

from ar_jax.sharding import BATCH, platform
from ar_jax.typing import Array, Bool, Float, Index, Int, typed

ATTENTION = "attention"  # name of the results, for policies of what a backward pass keeps
LANES = 128  # of a TPU's vector registers


@typed
def visible(
    query_step: Int[Array, "q"], key_step: Int[Array, "r"], first: Index = 0, valid: Bool[Array, "B r"] | None = None
) -> Bool[Array, "#B q r"]:
    """Which rows a row may see: those whose step is not later, and always itself.

    Args:
      query_step: steps of the querying rows.
      key_step: steps of all rows.
      first: place of the first querying row among all rows.
      valid: rows that others may see (padded caption rows are not); None is all.
    """
    past = (jnp.asarray(key_step) <= jnp.asarray(query_step)[:, None])[None]
    if valid is None:
        return past
    own = first + jnp.arange(len(query_step))[:, None] == jnp.arange(len(key_step))
    return past & valid[:, None] | own


@typed
def attend(
    q: Float[Array, "B h q e"], k: Float[Array, "B h r e"], v: Float[Array, "B h r e"], mask: Bool[Array, "#B q r"]
) -> Float[Array, "B h q e"]:
    """Scaled dot-product attention with a float32 softmax."""
    logits = jnp.einsum("bhqe,bhre->bhqr", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None], logits, -jnp.inf))
    return jnp.einsum("bhqr,bhre->bhqe", weights.astype(v.dtype), v)


@struct.dataclass
class Sight:
    """Who sees whom, and with it how to attend; made by `sight`.

    Attributes:
      mask: bool [#B q r] for `attend`, or None.
      valid: bool [B q] or None, for `splash`.
      step: of every row, for `splash`; None takes `attend`.
    """

    mask: Array | None = None
    valid: Array | None = None
    step: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)

    def __call__(self, q: Array, k: Array, v: Array) -> Array:
        if self.step is None:
            return attend(q, k, v, self.mask)
        return splash(q, k, v, np.array(self.step, np.int32), self.valid)


def sight(
    step: Int[Array, "q"],
    keys: Int[Array, "r"] | None = None,
    first: Index = 0,
    valid: Bool[Array, "B r"] | None = None,
) -> Sight:
    """What rows of these steps see.

    On a TPU `splash` computes it where all rows see all rows (`keys` is None) and the steps are known while tracing.

    Args: as of `visible`; `keys` are the steps of a cache's rows.
    """
    if keys is None and isinstance(step, np.ndarray) and platform() == "tpu":
        return Sight(valid=valid, step=tuple(step.tolist()))
    return Sight(visible(step, step if keys is None else keys, first, valid))


@typed
def splash(
    q: Float[Array, "B h q e"],
    k: Float[Array, "B h q e"],
    v: Float[Array, "B h q e"],
    step: Int[np.ndarray, "q"],
    valid: Bool[Array, "B q"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B h q e"]:
    """`attend` of all rows to all rows by JAX's splash kernel: no logits in memory, no work on blocks nobody sees.

    On the mesh in use (`jax.set_mesh`) every device takes its images and its heads.

    Args:
      step: of every row, fixed while tracing.
      valid: as in `visible`. Rows that are not valid get other values than from `attend`; nobody sees them.
      interpret: run the kernel step by step on any device, for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    rows, features = q.shape[2:]
    padded = -(-rows // LANES) * LANES
    room = ((0, 0), (0, 0), (0, padded - rows), (0, -features % (LANES // 2)))
    q, k, v = (jnp.pad(x, room) for x in (q * features**-0.5, k, v))
    if valid is None and padded > rows:
        segments = None  # the mask hides the padding
    else:
        segments = jnp.ones((len(q), rows), bool) if valid is None else valid
        segments = jnp.pad(segments, ((0, 0), (0, padded - rows))).astype(jnp.int32)

    def local(q, k, v, segments):
        kernel = splash_attention.make_splash_mha(
            splash_attention.MultiHeadMask([_static_mask(step.tobytes(), rows, padded)] * q.shape[1]),
            block_sizes=_blocks(padded),
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=ATTENTION,
            interpret=interpret,
        )
        if segments is None:
            return jax.vmap(kernel)(q, k, v)
        return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, splash_attention.SegmentIds(ids, ids)))(q, k, v, segments)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        heads = P(BATCH, "tp")
        local = jax.shard_map(local, in_specs=(heads, heads, heads, P(BATCH)), out_specs=heads, check_vma=False)
    return local(q, k, v, segments)[:, :, :rows, :features]


@functools.lru_cache
def _static_mask(step: bytes, rows: int, padded: int):
    from jax.experimental.pallas.ops.tpu import splash_attention

    # padding comes after everything: nobody sees it, and it sees all, so that its softmax has a finite sum
    steps = np.pad(np.frombuffer(step, np.int32), (0, padded - rows), constant_values=np.iinfo(np.int32).max)
    return splash_attention.NumpyMask(steps[None, :] <= steps[:, None])


def _blocks(rows):
    from jax.experimental.pallas.ops.tpu import splash_attention

    block = next(size for size in range(min(rows, 1024), 0, -LANES) if rows % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    return splash_attention.BlockSizes(**dict.fromkeys(names, block), use_fused_bwd_kernel=True)
