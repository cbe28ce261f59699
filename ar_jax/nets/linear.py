"""The linear layer of the transformers."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from ar_jax.machine.sharding import constrain
from ar_jax.typing import Array, Float, Int, Params, typed

PRODUCT = "product"  # name of the results, for policies of what a backward pass keeps
MATRICES = ("kernel", "embedding")  # names of what rows are multiplied with, and of tables that they are looked up in

_float32 = contextvars.ContextVar("float32", default=False)


@contextlib.contextmanager
def float32_gradients(on: bool = True) -> Iterator[None]:
    """What is traced inside computes gradients of kernels in float32, whatever its products are in, and a mesh sums them so."""
    token = _float32.set(on)
    try:
        yield
    finally:
        _float32.reset(token)


class Linear(nn.Module):
    """x W, or x W + b.

    Attributes:
      features: of the result.
      dtype: of the product's inputs; the parameter stays float32.
      out_dtype: of the result; None is `dtype`. float32 accumulates and returns float32.
      bias: add a learned vector.
      bias_init: where it begins.
    """

    features: int
    dtype: Any = jnp.float32
    out_dtype: Any = None
    kernel_init: Any = nn.initializers.normal(0.02)
    bias: bool = False
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    @typed
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b f"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = product(x.astype(self.dtype), kernel, self.out_dtype or self.dtype)
        if self.bias:
            y = (y + self.param("bias", self.bias_init, (self.features,))).astype(y.dtype)
        return checkpoint_name(y, PRODUCT)


def cast(params: Params, dtype: Any) -> Params:
    """Parameters for sampling in `dtype`: kernels and embeddings, which products round to it anyway.

    All others are small and stay as they are: norms, biases, positions, the sharpness of attention.
    """

    def one(path, leaf):
        return leaf.astype(dtype) if path[-1].key in MATRICES else leaf

    return jax.tree_util.tree_map_with_path(one, params)


@typed
def look_up(table: Float[Array, "v d"], index: Int[Array, "*b"]) -> Float[Array, "*b d"]:
    """Rows of a table. On a mesh every device gathers the whole table first, which is far smaller than partial results."""
    return constrain(jnp.asarray(table), None, None)[index]


@jax.custom_vjp
def _product(x, w, like):
    return lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=like.dtype)


def product(x: Float[Array, "*b d"], w: Float[Array, "d f"], dtype: Any) -> Float[Array, "*b f"]:
    """x W in `dtype`, W rounded to the dtype of x, with the weight's gradient computed as x^T g.

    JAX's own rule computes it as (g^T x)^T, which XLA on CPU may take almost twice as long for; a training step of
    LlamaGen-B took 17% less time with it. The gradient is rounded to the dtype of x, unless in `float32_gradients`.
    """
    return _product(x, w if _float32.get() else w.astype(x.dtype), jnp.zeros((), dtype))


def _forward(x, w, like):
    rounded = w.astype(x.dtype)
    return _product(x, rounded, like), (x, rounded, jnp.zeros((), w.dtype))


def _backward(saved, g):
    x, w, like = saved
    rows = tuple(range(x.ndim - 1))
    g = g.astype(x.dtype)
    dx = lax.dot_general(g, w, (((g.ndim - 1,), (1,)), ((), ())), preferred_element_type=x.dtype)
    dw = lax.dot_general(x, g, ((rows, rows), ((), ())), preferred_element_type=like.dtype)
    return dx, dw, None


_product.defvjp(_forward, _backward)
