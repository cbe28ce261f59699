"""CLIP's text encoder, from a released folder's weights."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ar_jax.typing import Array, Float, Int, Params, typed

PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclasses.dataclass(frozen=True)
class Clip:
    """Sizes, by the names of its config.json.

    Source: arXiv:2103.00020.
    """

    hidden_size: int = 512
    num_attention_heads: int = 8
    num_hidden_layers: int = 12
    intermediate_size: int = 2048
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(f"hidden_act is {self.hidden_act!r}; it must be quick_gelu or gelu")

    @property
    def width(self) -> int:
        return self.hidden_size

    @property
    def longest(self) -> int:
        return self.max_position_embeddings

    def shapes(self, weights: Params) -> dict[str, tuple[int, ...]]:
        """Shapes by key of what `forward` reads; free sizes are those of the weights."""
        width, hidden = self.hidden_size, self.intermediate_size
        table = "text_model.embeddings.token_embedding.weight"
        kernels = {
            table: (len(weights[table]), width),
            "text_model.embeddings.position_embedding.weight": (self.max_position_embeddings, width),
        }
        pairs, norms = {}, ["text_model.final_layer_norm"]
        for layer in self._layers():
            pairs |= {f"{layer}.self_attn.{part}": (width, width) for part in PARTS}
            pairs |= {f"{layer}.mlp.fc1": (hidden, width), f"{layer}.mlp.fc2": (width, hidden)}
            norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        kernels |= {f"{name}.weight": shape for name, shape in pairs.items()}
        biases = {f"{name}.bias": shape[:1] for name, shape in pairs.items()}
        return kernels | biases | {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}

    @functools.partial(jax.jit, static_argnums=0)
    @typed
    def forward(self, weights: Params, tokens: Int[Array, "b r"], length: Int[Array, "b"]) -> Float[Array, "b r d"]:
        """Last hidden rows of right-padded tokens after the last norm, float32; a token sees itself and those before."""

        def dense(x, name):
            return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

        def norm(x, name):
            x = x - x.mean(-1, keepdims=True)
            x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.layer_norm_eps)
            return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

        def activation(x):
            return (
                x * jax.nn.sigmoid(1.702 * x) if self.hidden_act == "quick_gelu" else jax.nn.gelu(x, approximate=False)
            )

        with jax.default_matmul_precision("highest"):
            table = weights["text_model.embeddings.token_embedding.weight"]
            rows = min(tokens.shape[1], self.max_position_embeddings)  # what is cut off is padding
            x = table[tokens[:, :rows]] + weights["text_model.embeddings.position_embedding.weight"][:rows]
            for layer in self._layers():
                y = norm(x, f"{layer}.layer_norm1")
                q, k, v = (dense(y, f"{layer}.self_attn.{part}") for part in PARTS[:3])
                q, k, v = (part.reshape(*x.shape[:2], self.num_attention_heads, -1) for part in (q, k, v))
                y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
                x = x + dense(y, f"{layer}.self_attn.out_proj")
                y = activation(dense(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1"))
                x = x + dense(y, f"{layer}.mlp.fc2")
            x = norm(x, "text_model.final_layer_norm")
            return jnp.pad(x, ((0, 0), (0, tokens.shape[1] - rows), (0, 0)))

    def _layers(self):
        return [f"text_model.encoder.layers.{i}" for i in range(self.num_hidden_layers)]


def of_config(config: dict[str, Any]) -> Clip:
    config = config.get("text_config", config)
    names = {field.name for field in dataclasses.fields(Clip)}
    return Clip(**{name: value for name, value in config.items() if name in names})
