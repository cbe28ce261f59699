"""T5's encoder (v1.0, v1.1, Flan), from a released folder's weights."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.typing import Array, Float, Int, Params, typed


@dataclasses.dataclass(frozen=True)
class T5:
    """Sizes, by the names of its config.json.

    Source: arXiv:1910.10683; v1.1: arXiv:2002.05202; Flan: arXiv:2210.11416.
    """

    d_model: int
    num_heads: int
    d_kv: int
    num_layers: int
    feed_forward_proj: str = "relu"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        if self.feed_forward_proj not in ("relu", "gated-gelu"):
            raise ValueError(f"feed_forward_proj is {self.feed_forward_proj!r}; it must be relu or gated-gelu")

    @property
    def width(self) -> int:
        return self.d_model

    @property
    def longest(self) -> int:
        """T5 has no table of positions; it was trained on 512 tokens."""
        return 512

    def shapes(self, weights: Params) -> dict[str, tuple[int, ...]]:
        """Shapes by key of what `forward` reads; free sizes are those of the weights."""
        inner, hidden = self.num_heads * self.d_kv, weights["encoder.block.0.layer.1.DenseReluDense.wo.weight"].shape[1]
        found = {
            "shared.weight": (len(weights["shared.weight"]), self.d_model),
            "encoder.final_layer_norm.weight": (self.d_model,),
            BIAS: (self.relative_attention_num_buckets, self.num_heads),
        }
        for i in range(self.num_layers):
            attention, mlp = (f"encoder.block.{i}.layer.{part}" for part in (0, 1))
            found |= {f"{attention}.SelfAttention.{name}.weight": (inner, self.d_model) for name in "qkv"}
            found |= {f"{attention}.SelfAttention.o.weight": (self.d_model, inner)}
            found |= {f"{part}.layer_norm.weight": (self.d_model,) for part in (attention, mlp)}
            for name in ("wi_0", "wi_1") if self.feed_forward_proj == "gated-gelu" else ("wi",):
                found[f"{mlp}.DenseReluDense.{name}.weight"] = (hidden, self.d_model)
            found[f"{mlp}.DenseReluDense.wo.weight"] = (self.d_model, hidden)
        return found

    @functools.partial(jax.jit, static_argnums=0)
    @typed
    def forward(self, weights: Params, tokens: Int[Array, "b r"], length: Int[Array, "b"]) -> Float[Array, "b r d"]:
        """Last hidden rows of right-padded tokens, float32."""

        def norm(x, name):
            x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.layer_norm_epsilon)
            return x * weights[f"{name}layer_norm.weight"]

        with jax.default_matmul_precision("highest"):
            rows = tokens.shape[1]
            bias = jnp.moveaxis(weights[BIAS][self.buckets(rows)], -1, 0)[None]
            bias = jnp.where(jnp.arange(rows) < length[:, None, None, None], bias, -jnp.inf)
            x = weights["shared.weight"][tokens]
            for i in range(self.num_layers):
                attention, mlp = (f"encoder.block.{i}.layer.{part}" for part in (0, 1))
                y = norm(x, f"{attention}.")
                q, k, v = (y @ weights[f"{attention}.SelfAttention.{name}.weight"].T for name in "qkv")
                q, k, v = (part.reshape(*part.shape[:2], self.num_heads, self.d_kv) for part in (q, k, v))
                seen = jax.nn.dot_product_attention(q, k, v, bias, scale=1.0).reshape(*x.shape[:2], -1)
                x = x + seen @ weights[f"{attention}.SelfAttention.o.weight"].T
                dense = {
                    name: weights.get(f"{mlp}.DenseReluDense.{name}.weight") for name in ("wi", "wi_0", "wi_1", "wo")
                }
                y = norm(x, f"{mlp}.")
                if self.feed_forward_proj == "relu":
                    y = jax.nn.relu(y @ dense["wi"].T)
                else:
                    y = jax.nn.gelu(y @ dense["wi_0"].T, approximate=True) * (y @ dense["wi_1"].T)
                x = x + y @ dense["wo"].T
            return norm(x, "encoder.final_")

    def buckets(self, rows: int) -> Int[np.ndarray, "q k"]:
        """Of every query and key by the distance of their places: half of them for keys that follow."""
        away = np.arange(rows)[None] - np.arange(rows)[:, None]
        half = self.relative_attention_num_buckets // 2
        exact, far = half // 2, self.relative_attention_max_distance
        distance = np.abs(away)
        with np.errstate(divide="ignore"):
            steps = np.log(np.float32(distance) / np.float32(exact)) / np.float32(math.log(far / exact))
        steps = np.where(distance < exact, 0, steps) * np.float32(half - exact)
        wide = np.minimum(exact + steps.astype(np.int64), half - 1)
        return np.where(away > 0, half, 0) + np.where(distance < exact, distance, wide)


BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"  # of all layers


def of_config(config: dict[str, Any]) -> T5:
    names = {field.name for field in dataclasses.fields(T5)}
    return T5(**{name: value for name, value in config.items() if name in names})
