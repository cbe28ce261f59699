"""Quantisers as pure functions over codebooks, and how codes are used."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.nets.resize import resize
from ar_jax.tokenizers import quantize_blocks as blocks
from ar_jax.tokenizers.quantize_averaged import Average
from ar_jax.tokens import TokenSpec, rows
from ar_jax.typing import Array, Float, Int, Metrics, Tokens, typed


@typed
def normalise(x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """x / max(|x|, 1e-12) along the last axis."""
    # The inner maximum keeps the gradient of the root finite at zero.
    return x / jnp.maximum(jnp.sqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-30)), 1e-12)


@typed
def distances(z: Float[Array, "*b c"], codebook: Float[Array, "v c"]) -> Float[Array, "*b v"]:
    """Squared Euclidean distance to every code, float32."""
    dots = jnp.einsum("...c,vc->...v", z, codebook, precision=lax.Precision.HIGHEST)
    return jnp.square(z).sum(-1, keepdims=True) + jnp.square(codebook).sum(-1) - 2 * dots


def codebook_init(l2_norm: bool) -> Callable:
    """Initialiser of a codebook [v c]: uniform within 1/v, with `l2_norm` brought to length 1."""

    def init(key, shape):
        codebook = jax.random.uniform(key, shape, minval=-1 / shape[0], maxval=1 / shape[0])
        return normalise(codebook) if l2_norm else codebook

    return init


def straight_through(z, code):
    """`code` in the forward pass, the gradient of `z` in the backward pass."""
    return z + lax.stop_gradient(code - z)


def rotated(z: Float[Array, "*b c"], code: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """As `straight_through`, but the gradient is turned by the rotation from z to its code, and scaled as their lengths are.

    Source: the rotation trick (arXiv:2410.06424); forward `code`, up to 1e-6.
    """
    length = lambda x: jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    code = lax.stop_gradient(code)
    u, q = (lax.stop_gradient(x / (length(x) + 1e-6)) for x in (z, code))
    half = (u + q) / jnp.maximum(length(u + q), 1e-12)  # between both: the rotation is a reflection at it, and a turn
    dot = lambda x: (z * x).sum(-1, keepdims=True)  # noqa: E731
    turned = z - 2 * dot(half) * half + 2 * dot(u) * q
    return turned * lax.stop_gradient(length(code) / (length(z) + 1e-6))


@dataclasses.dataclass(frozen=True)
class VectorLoss:
    """Weights of the training losses of vector quantisation.

    Attributes:
      codebook: pulls codes to the latents.
      commit: pulls latents to their codes.
      entropy: sample entropy minus batch entropy of the soft assignment; pushes towards confident, even use.
      temperature: of that soft assignment.
    """

    codebook: float = 1.0
    commit: float = 0.25
    entropy: float = 0.0
    temperature: float = 0.01


@typed
def vector_quantise(
    z: Float[Array, "*b c"],
    codebook: Float[Array, "v c"],
    loss: VectorLoss = VectorLoss(),
    limit: int = blocks.BLOCK,
    through: Callable[[Array, Array], Array] = straight_through,
) -> tuple[Float[Array, "*b c"], Int[Array, "*b"], Metrics]:
    """Replaces each vector by its nearest code (the first of equals).

    Args:
      z: latents; normalise both arguments beforehand for cosine search.
      codebook: codes.
      loss: weights.
      limit: numbers of [pixels, codes] that are held at a time; more are computed by blocks of codes (`quantize_blocks`).
      through: z, its code -> the code with a gradient for z (`straight_through`, `rotated`).

    Returns:
      The codes with the gradient of z, their indices, and the weighted losses "codebook", "commit", "entropy".
    Source: VQ-VAE (arXiv:1711.00937); entropy term as in LlamaGen (arXiv:2406.06525).
    """
    index, entropy = _assigned(z, codebook, loss, limit)
    code = codebook[index]
    losses = {
        "codebook": loss.codebook * jnp.square(code - lax.stop_gradient(z)).mean(),
        "commit": loss.commit * jnp.square(lax.stop_gradient(code) - z).mean(),
    }
    if loss.entropy:
        losses["entropy"] = loss.entropy * entropy
    return through(z, code), index, losses


@typed
def residual_quantise(
    latents: Float[Array, "b h w c"],
    codebook: Float[Array, "v c"],
    sizes: tuple[tuple[int, int], ...],
    part: Callable[[int, Array], Array],
    loss: VectorLoss = VectorLoss(),
    cosine: bool = False,
) -> tuple[Float[Array, "b h w c"], Int[Array, "b n"], Float[Array, "b n c"], Metrics]:
    """Describes a map as a sum: every scale quantises, in its size, what the scales before it left over.

    Args:
      latents: the map.
      codebook: shared by all scales.
      sizes: height and width of every scale.
      part: level, its map of codes -> what it adds to the sum, of the size of `latents`.
      loss: weights. "codebook" is the distance between the sum after a scale and the latents, with the gradient of all
        parts so far; "commit" the same, with that of the latents; "entropy" moves the codebook only, since what is left
        over is taken without gradient. All are means over the scales.
      cosine: search by angle; what is added are the codes as they are.

    Returns:
      The sum with the gradient of `latents`, the indices of all scales, what they stand for, and the weighted losses.
    Source: VAR (arXiv:2404.02905), algorithm 1.
    """
    rest, total, levels = lax.stop_gradient(latents), jnp.zeros_like(latents), []
    for level, size in enumerate(sizes):
        z = resize(rest, size, "area")
        index, entropy = _assigned(*((normalise(z), normalise(codebook)) if cosine else (z, codebook)), loss)
        added = part(level, codebook[index])
        total, rest = total + added, rest - lax.stop_gradient(added)
        losses = {
            "codebook": loss.codebook * jnp.square(total - lax.stop_gradient(latents)).mean(),
            "commit": loss.commit * jnp.square(lax.stop_gradient(total) - latents).mean(),
        }
        if loss.entropy:
            losses["entropy"] = loss.entropy * entropy
        levels.append((index, z, losses))
    index, z, losses = zip(*levels)
    losses = jax.tree.map(lambda *x: sum(x) / len(x), *losses)
    return straight_through(latents, total), rows(index), rows(z), losses


def _assigned(z, codebook, loss, limit=blocks.BLOCK):
    """Index of the nearest code, and sample minus batch entropy of the soft assignment, or None where it has no weight."""
    rows = blocks.rows_of(z)
    if blocks.few(rows, len(codebook), limit):
        distance = distances(z, codebook)
        entropy = _entropy_loss(-distance / loss.temperature) if loss.entropy else None
        return jnp.argmin(distance, axis=-1).astype(jnp.int32), entropy

    def near(codes):
        return -distances(z, codes)

    index, top = blocks.best(near, codebook, rows, limit)
    if not loss.entropy:
        return index, None
    soft = (codebook, top / loss.temperature, rows, limit)
    sample, batch = blocks.entropies(lambda codes: near(codes) / loss.temperature, *soft)
    return index, sample - batch


def _entropy_loss(affinity):
    affinity = affinity.reshape(-1, affinity.shape[-1])
    p = jax.nn.softmax(affinity)
    sample = -(p * jax.nn.log_softmax(affinity + 1e-5)).sum(-1).mean()
    average = p.mean(0)
    return sample + (average * jnp.log(average + 1e-5)).sum()


@dataclasses.dataclass(frozen=True)
class Codebook:
    """Which tokens are indices into a table of codes, and where it lies if it is learned.

    Attributes:
      path: of its parameter [v c], "/" between names; a number takes a part of a stacked one ("codebooks/1"). "" is not
        learned (FSQ, LFQ, BSQ).
      sub_codes: numbers of the sub-codes that it serves; residual ones may share one.
      levels: numbers of the levels that it serves; () is all.
      average: how it follows the vectors that choose its codes, in place of gradients; None does not.
    """

    path: str = ""
    sub_codes: tuple[int, ...] = (0,)
    levels: tuple[int, ...] = ()
    average: Average | None = None


@typed
def look_up(codes: Float[Array, "v c"], tokens: Tokens) -> Float[Array, "b n c"]:
    """The codes of tokens with one sub-code; vectors in their place stay as they are."""
    return tokens if jnp.issubdtype(tokens.dtype, jnp.floating) else jnp.asarray(codes)[tokens[..., 0]]


@typed
def count_codes(
    tokens: Int[Array, "b n k"], spec: TokenSpec, weight: Float[Array, "b"] | None = None
) -> Int[Array, "l v"] | Float[Array, "l v"]:
    """How often every level of a batch uses every code; codes of all sub-codes lie one after the other.

    Args:
      weight: of every image; None counts all alike.
    """
    level, total = spec.coords[:, 0], sum(spec.codes)
    first = np.cumsum([0, *spec.codes[:-1]])
    places = level[:, None] * total + first + tokens
    levels = int(level.max()) + 1
    if weight is not None:
        weight = jnp.broadcast_to(weight[:, None, None], places.shape).reshape(-1)
    return jnp.bincount(places.reshape(-1), weight, length=levels * total).reshape(levels, total)


@typed
def usage(frequency: Float[Array, "l v"] | Int[Array, "l v"], codes: tuple[int, ...], rare: float = 0.0) -> Metrics:
    """How codes are used.

    Args:
      frequency: of every code on every level, or their counts; sub-codes one after the other, as `count_codes` has them.
      codes: sizes of the sub-codes.
      rare: codes below this part of an even share do not count as in use; with 0 those do that occur at all.

    Returns:
      "usage", the share of codes in use, and "code_perplexity", exp of the entropy of their frequencies (1..codes), both
      means over sub-codes. If there are several levels, also those of each: "usage/0", "code_perplexity/0" and so on;
      if there are several sub-codes, those of each over all levels: "usage/code0", "code_perplexity/code0".
    """

    def figures(frequency):
        used = (frequency > 0) & (frequency * len(frequency) >= rare * frequency.sum())
        return {"usage": used.mean(), "code_perplexity": _perplexity(frequency)}

    def named(figures, name):
        return {f"{figure}/{name}": value for figure, value in figures.items()}

    def mean(some):
        return jax.tree.map(lambda *x: sum(x) / len(x), *some)

    each = jnp.split(frequency, np.cumsum(codes)[:-1], axis=1)
    whole = [figures(one.sum(0)) for one in each]
    metrics = mean(whole)
    for level in range(len(frequency) if len(frequency) > 1 else 0):
        metrics |= named(mean([figures(one[level]) for one in each]), level)
    for k, some in enumerate(whole if len(codes) > 1 else ()):
        metrics |= named(some, f"code{k}")
    return metrics


def _perplexity(frequency):
    p = frequency / frequency.sum()
    return jnp.exp(-(p * jnp.log(jnp.maximum(p, 1e-30))).sum())
