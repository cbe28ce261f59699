"""Attention decided by integers: every row carries the step at which its token becomes known."""

import functools
import operator
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from ar_jax.machine import shares
from ar_jax.machine.sharding import BATCH, platform
from ar_jax.typing import Array, Bool, Float, Index, Int, typed

ATTENTION = "attention"  # name of the results, for policies of what a backward pass keeps
LANES = 128  # of a TPU's vector registers
FEW = 64  # rows for which a GPU's kernel is not worth it


@typed
def visible(
    query_step: Int[Array, "q"],
    key_step: Int[Array, "r"],
    first: Index = 0,
    valid: Bool[Array, "B r"] | None = None,
    own: bool = False,
) -> Bool[Array, "#B q r"]:
    """Which rows a row may see: those whose step is not later, and always itself.

    Args:
      query_step: steps of the querying rows.
      key_step: steps of all rows.
      first: place of the first querying row among all rows.
      valid: rows that others may see (padded caption rows are not); None is all.
      own: rows of the same step only.
    """
    seen = _compare(own)(jnp.asarray(key_step), jnp.asarray(query_step)[:, None])[None]
    if valid is None:
        return seen
    itself = first + jnp.arange(len(query_step))[:, None] == jnp.arange(len(key_step))
    return seen & valid[:, None] | itself


def _compare(own):
    return operator.eq if own else operator.le


@struct.dataclass
class Int8:
    """Rows of a cache in one byte a number, in units of the largest magnitude of a row and head / 127.

    Attributes:
      numbers: int8 [... r e].
      unit: [... r 1], in the dtype of the rows.
    """

    numbers: Array
    unit: Array

    @classmethod
    def of(cls, x: Float[Array, "*b r e"]) -> "Int8":
        """Numbers are off by half a unit at most, 0.4% of the row's largest; rows of zeros stay zero."""
        unit = jnp.abs(x).max(-1, keepdims=True).astype(jnp.float32) / 127
        unit = jnp.maximum(unit, jnp.finfo(x.dtype).tiny).astype(x.dtype)
        return cls(jnp.clip(jnp.round(x.astype(jnp.float32) / unit), -127, 127).astype(jnp.int8), unit)

    def plain(self) -> Float[Array, "*b r e"]:
        return self.numbers.astype(self.unit.dtype) * self.unit


Kept = Literal["own", "int8"]  # how a cache keeps keys and values: in the dtype of the products, or as `Int8`


@typed
def attend(
    q: Float[Array, "B h q e"],
    k: Float[Array, "B h r e"] | Int8,
    v: Float[Array, "B h r e"] | Int8,
    mask: Bool[Array, "#B q r"],
    scale: float | None = None,
    drop: Callable | None = None,
) -> Float[Array, "B h q e"]:
    """Dot-product attention with a float32 softmax; products are multiplied by `scale`, None is e^-1/2.

    `drop` may leave out some of the weights [B h q r].
    """
    packed, dtype = isinstance(k, Int8), q.dtype  # units are left out of the products, so that bytes are what they read
    keys, values = (x.numbers.astype(dtype) if packed else x for x in (k, v))
    logits = jnp.einsum("bhqe,bhre->bhqr", q * _scale(q, scale), keys, preferred_element_type=jnp.float32)
    logits = logits * k.unit[:, :, None, :, 0] if packed else logits
    weights = jax.nn.softmax(jnp.where(mask[:, None], logits, -jnp.inf))
    weights = weights * v.unit[:, :, None, :, 0] if packed else weights
    weights = weights.astype(values.dtype)
    if drop is not None:
        # a barrier, or the TPU compiler fuses the products on both sides of the weights and overflows its stack
        weights = lax.optimization_barrier(drop(weights))
    return jnp.einsum("bhqr,bhre->bhqe", weights, values)


def _scale(q, scale):
    return q.shape[-1] ** -0.5 if scale is None else scale


@struct.dataclass
class Rows:
    """Which rows of a sequence a network is run on: `first..first+q`.

    Attributes:
      step: int [q], a numpy array where it is known while tracing; a row sees rows of no later step.
      coords: [#B q 3], level, row and column of each; None for networks that do not ask.
      first: place of the first row in the sequence.
      keys: with a cache, int [r], steps of all its rows, also of those not written yet, which must be later than `step`.
      valid: bool [B r], rows that others may see; None is all.
    """

    step: Array
    coords: Array | None = None
    first: Index = 0
    keys: Array | None = None
    valid: Array | None = None

    def fit(self, most: int) -> None:
        """Raises a ValueError if the sequence is longer than a network's table of places."""
        if (longest := len(self.step if self.keys is None else self.keys)) > most:
            raise ValueError(f"backbone.rows is {most}, but the sequence has {longest}; give as many, or 0")

    def of(self, table: Float[Array, "r d"]) -> Float[Array, "q d"]:
        """What a table of places has for these rows; see `fit`."""
        self.fit(len(table))
        return lax.dynamic_slice_in_dim(jnp.asarray(table), self.first, len(self.step))

    def sight(self, own: bool = False, masked: bool = False) -> "Sight":
        """What these rows see; those of their own step only, or as a mask where no kernel will do."""
        if masked:
            keys = self.step if self.keys is None else self.keys
            return Sight(visible(self.step, keys, self.first, self.valid, own))
        return sight(self.step, self.keys, self.first, self.valid, own)


def split_heads(y: Float[Array, "B q f"], heads: int, parts: int = 3) -> Array:
    """Queries, keys and values [parts B h q e] of a joint product whose outputs lie head by head."""
    return jnp.moveaxis(y.reshape(*y.shape[:2], heads, parts, -1), (3, 2), (0, 2))


def join_heads(y: Float[Array, "B h q e"]) -> Float[Array, "B q f"]:
    y = jnp.moveaxis(y, 1, 2)
    return y.reshape(*y.shape[:2], -1)


Rowwise = Array | Int8


def remember(
    cache: tuple[Rowwise, Rowwise] | None, k: Array, v: Array, first: Index
) -> tuple[Rowwise, Rowwise, tuple[Rowwise, Rowwise] | None]:
    """Keys and values to look at, [B h r e]: with a cache all of its rows, these written at `first`; and the cache."""
    if cache is None:
        return k, v, None
    new = tuple(Int8.of(x) if isinstance(old, Int8) else x for old, x in zip(cache, (k, v)))
    k, v = jax.tree.map(lambda old, new: lax.dynamic_update_slice_in_dim(old, new, first, axis=2), cache, new)
    return k, v, (k, v)


@struct.dataclass
class Sight:
    """Who sees whom, and with it how to attend; made by `sight`.

    Attributes:
      mask: bool [#B q r] for `attend`, or None.
      valid: bool [B q] or None, for `splash`.
      step, keys: of the querying and of all rows, for `splash`; None takes `attend` or `fused`.
      own: rows see those of the same step only.
      fuse: `fused` computes it where it can.
      causal: the mask is the lower triangle.
    """

    mask: Array | None = None
    valid: Array | None = None
    step: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)
    keys: tuple[int, ...] | None = struct.field(pytree_node=False, default=None)
    own: bool = struct.field(pytree_node=False, default=False)
    fuse: bool = struct.field(pytree_node=False, default=False)
    causal: bool = struct.field(pytree_node=False, default=False)

    def __call__(self, q: Array, k: Rowwise, v: Rowwise, scale: float | None = None) -> Array:
        if isinstance(k, Int8) and (self.fuse or self.step is not None):
            k, v = k.plain(), v.plain()
        if self.fuse and q.dtype in (jnp.bfloat16, jnp.float16):
            return fused(q, k, v, None if self.causal else self.mask, scale)
        if self.step is None:
            return attend(q, k, v, self.mask, scale)
        step, keys = (np.array(x, np.int32) for x in (self.step, self.keys))
        return splash(q, k, v, step, self.valid, keys=keys, own=self.own, scale=scale)


def sight(
    step: Int[Array, "q"],
    keys: Int[Array, "r"] | None = None,
    first: Index = 0,
    valid: Bool[Array, "B r"] | None = None,
    own: bool = False,
) -> Sight:
    """What rows of these steps see.

    On a TPU `splash` computes it where the steps are known while tracing; with a cache, if the rows fill a kernel's block
    and none of them is hidden. On a GPU `fused` does, in bfloat16 or float16, unless there are a few rows only.

    Args: as of `visible`; `keys` are the steps of a cache's rows.
    """
    known = all(isinstance(x, np.ndarray) for x in (step, step if keys is None else keys))
    worth = keys is None or (len(step) >= LANES and valid is None)
    keys = step if keys is None else keys
    if known and worth and platform() == "tpu":
        return Sight(valid=valid, step=tuple(step.tolist()), keys=tuple(keys.tolist()), own=own)
    fuse = platform() == "gpu" and len(step) >= FEW
    causal = known and valid is None and not own and keys is step and bool((np.diff(step) > 0).all())
    return Sight(visible(step, keys, first, valid, own), fuse=fuse, causal=causal)


@typed
def fused(
    q: Float[Array, "B h q e"],
    k: Float[Array, "B h r e"],
    v: Float[Array, "B h r e"],
    mask: Bool[Array, "#B q r"] | None = None,
    scale: float | None = None,
    implementation: str = "cudnn",
) -> Float[Array, "B h q e"]:
    """`attend` by cuDNN's kernel, which keeps no logits in memory; without a mask, rows see those before and themselves.

    Args:
      implementation: "xla" runs JAX's own form of it on any device, for tests.
    """
    features, scale = q.shape[-1], _scale(q, scale)
    wide = [(0, 0)] * 3 + [(0, -features % 8)]  # the kernel's channels come in eights
    q, k, v = (jnp.moveaxis(jnp.pad(x, wide), 1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None]
    y = jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, is_causal=mask is None, implementation=implementation
    )
    return checkpoint_name(jnp.moveaxis(y, 1, 2)[..., :features], ATTENTION)


@typed
def splash(
    q: Float[Array, "B h q e"],
    k: Float[Array, "B h r e"],
    v: Float[Array, "B h r e"],
    step: Int[np.ndarray, "q"],
    valid: Bool[Array, "B q"] | None = None,
    interpret: bool = False,
    keys: Int[np.ndarray, "r"] | None = None,
    own: bool = False,
    scale: float | None = None,
) -> Float[Array, "B h q e"]:
    """`attend` by JAX's splash kernel: no logits in memory, no work on blocks nobody sees.

    On the mesh in use (`jax.set_mesh`) every device takes its images and its heads.

    Args:
      step: of the querying rows, fixed while tracing.
      valid: as in `visible`, where all rows see all rows. Rows that are not valid get other values than from `attend`;
        nobody sees them.
      interpret: run the kernel step by step on any device, for tests.
      keys: steps of the rows that are seen; None is `step`.
      own, scale: as in `visible` and `attend`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention

    keys = step if keys is None else keys
    rows, features = q.shape[2:]
    q, k, v = (_padded(x) for x in (q * _scale(q, scale), k, v))
    padded, mask = q.shape[2], _static_mask(step.tobytes(), keys.tobytes(), own)
    if valid is None and (padded > rows or len(keys) != rows):
        segments = None  # the mask hides the padding
    else:
        segments = jnp.ones((len(q), rows), bool) if valid is None else valid
        segments = jnp.pad(segments, ((0, 0), (0, padded - rows))).astype(jnp.int32)

    def local(q, k, v, segments):
        kernel = splash_attention.make_splash_mha(
            splash_attention.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=_blocks(padded, k.shape[2]),
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
        images = shares.others(BATCH)
        heads = P(images, "tp")
        local = jax.shard_map(local, in_specs=(heads, heads, heads, P(images)), out_specs=heads, check_vma=False)
    return local(q, k, v, segments)[:, :, :rows, :features]


def _padded(x):
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES), (0, -x.shape[3] % (LANES // 2))))


@functools.lru_cache
def _static_mask(step: bytes, keys: bytes, own: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention

    def padded(steps):
        # padding comes after everything: nobody sees it
        steps = np.frombuffer(steps, np.int32)
        return np.pad(steps, (0, -len(steps) % LANES), constant_values=np.iinfo(np.int32).max)

    seen = _compare(own)(padded(keys)[None, :], padded(step)[:, None])
    seen[:, 0] |= ~seen.any(1)  # the softmax of a padded row needs a finite sum too
    return splash_attention.NumpyMask(seen)


def _blocks(rows, keys):
    from jax.experimental.pallas.ops.tpu import splash_attention

    def block(rows):
        return next(size for size in range(min(rows, 1024), 0, -LANES) if rows % size == 0)

    queries = dict.fromkeys(("block_q", "block_q_dkv"), block(rows))
    others = ("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute")
    return splash_attention.BlockSizes(**queries, **dict.fromkeys(others, block(keys)), use_fused_bwd_kernel=True)
