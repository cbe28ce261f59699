"""Quantisers with several codebooks for each place, as pure functions over them."""

import itertools

import jax.numpy as jnp

from ar_jax.tokenizers.quantize import VectorLoss, look_up, normalise, vector_quantise
from ar_jax.typing import Array, Float, Int, Metrics, Tokens, typed


@typed
def factorised_quantise(
    latents: tuple[Float[Array, "*b _"], ...],
    codebooks: tuple[Float[Array, "_v _"], ...],
    loss: VectorLoss = VectorLoss(),
    disentangle: float = 0.0,
) -> tuple[tuple[Float[Array, "*b _"], ...], Int[Array, "*b k"], Metrics]:
    """Replaces the latents of every stream by their nearest codes, each stream in its own codebook, straight-through.

    Args:
      latents: of k streams, at the same places; normalise them and the codebooks beforehand for cosine search.
      codebooks: of each stream, as wide as its latents; they need not have equally many codes.
      loss: weights, for every stream alike.
      disentangle: weight of `entanglement`; the codes of all streams are then equally wide.

    Returns:
      The codes of every stream with the gradient of its latents; their indices; and the weighted losses: of stream k
      "codebook/code{k}", "commit/code{k}", "entropy/code{k}", and of all "disentangle".
    Source: FQGAN (arXiv:2411.16681).
    """
    streams = [vector_quantise(z, codebook, loss) for z, codebook in zip(latents, codebooks, strict=True)]
    codes, index, each = zip(*streams)
    losses = {f"{name}/code{k}": value for k, some in enumerate(each) for name, value in some.items()}
    if disentangle:
        losses["disentangle"] = disentangle * entanglement(codes)
    return codes, jnp.stack(index, axis=-1), losses


@typed
def entanglement(codes: tuple[Float[Array, "*b c"], ...]) -> Float[Array, ""]:
    """Mean over places of the squared cosine between the codes of two streams, and over all pairs of streams; 0 to 1."""
    directions = [normalise(code) for code in codes]
    pairs = itertools.combinations(directions, 2)
    cosines = [(one * other).sum(-1) for one, other in pairs]
    return sum((jnp.square(cosine).mean() for cosine in cosines), jnp.zeros(())) / max(len(cosines), 1)


@typed
def look_up_all(codebooks: tuple[Float[Array, "_v _"], ...], tokens: Tokens) -> Float[Array, "b n c"]:
    """The codes of all sub-codes of tokens, side by side; vectors in the tokens' place stay as they are."""
    if jnp.issubdtype(tokens.dtype, jnp.floating):
        return tokens
    return jnp.concatenate([look_up(codebook, tokens[..., k : k + 1]) for k, codebook in enumerate(codebooks)], axis=-1)
