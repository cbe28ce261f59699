"""SemAIM: patches are predicted in an order of the image's own, so that the network learns to see. It draws no images."""

import math
from typing import Any, Literal, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ar_jax.generators.base import Conditioning, Frozen, Generator, image_weight
from ar_jax.machine import shares
from ar_jax.machine.sharding import BATCH, constrain
from ar_jax.nets import vit
from ar_jax.nets.attention import Sight, join_heads, split_heads
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import xavier
from ar_jax.nets.positions import sine_quarters
from ar_jax.nets.transformer import init
from ar_jax.orders import Order, to_slots
from ar_jax.tokenizers.continuous import patchify, unpatchify
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Blocks, Bool, Float, Metrics, PRNGKey, typed


class ContentBlock(vit.Block):
    """A block that gives its rows to others, too, and how much the first row looks at each, as a mean over the heads."""

    def __call__(self, x, cache, seen, first):
        q, k, _ = split_heads(self.qkv(self.attention_norm(x)), self.heads)
        logits = jnp.einsum("bhqe,bhre->bhqr", q[:, :, :1], k, preferred_element_type=jnp.float32)
        look = jax.nn.softmax(logits * q.shape[-1] ** -0.5).mean((1, 2))
        x, _ = super().__call__(x, None, seen, first)
        return x, (x, look)


class QueryBlock(vit.Block):
    """Rows that ask the content's, after the same norm of both; and a perceptron."""

    def __call__(self, x, cache, content, seen):
        x = constrain(x, BATCH)
        y, others = self.attention_norm(x), self.attention_norm(content)
        asks = (self.query, y), (self.key, others), (self.value, others)
        x = x + self.out(join_heads(seen(*(split_heads(net(rows), self.heads, 1)[0] for net, rows in asks))))
        return x + self.perceptron(self.mlp_norm(x), True), cache


class TwoStreams(vit.Plain):
    """A content stream, whose rows look at one another, and a query stream, whose rows look at the content; one last norm.

    Attributes:
      layers, width, heads: sizes, of the content's blocks.
      queries: blocks of the query stream, after every so many of the content; 0 is as many.
      others: see `Plain`; nothing is dropped.
    Source: SemAIM (arXiv:2312.10457).
    """

    queries: Blocks = 0

    def setup(self):
        count = self.queries or self.layers
        if self.layers % count:
            raise ValueError(f"backbone.queries is {self.queries}; it must divide the {self.layers} layers")
        self.blocks = self.blocks_with(bias=True, kind=ContentBlock)
        fields = self.fields_of_block(bias=True, apart=True)
        self.asking = self.stack(QueryBlock, fields, (0, nn.broadcast), count)
        self.norm = vit._norm(self.dtype, eps=self.eps)

    @typed
    def __call__(
        self, x: Float[Array, "b q d"], queries: Float[Array, "q d"], keys: Float[Array, "b q"]
    ) -> Float[Array, "b q d"]:
        """Query rows: each knows the content of smaller keys; content rows know that of keys that are not larger."""
        content, query = sights(keys)
        _, (rows, _) = self.blocks(x.astype(self.dtype), None, Sight(content), 0)
        step = self.layers // (self.queries or self.layers)
        start = jnp.broadcast_to(queries.astype(self.dtype), x.shape)
        return self.norm(self.asking(start, None, rows[step - 1 :: step], Sight(query))[0])

    @typed
    def encode(self, x: Float[Array, "b q d"]) -> tuple[Float[Array, "b q d"], Float[Array, "b q"]]:
        """Content rows that all see all, after the last norm; and how much the first one looks at each in the last layer."""
        seen = Sight(jnp.ones((1, x.shape[1], x.shape[1]), bool))
        x, (_, looks) = self.blocks(x.astype(self.dtype), None, seen, 0)
        return self.norm(x), looks[-1]


@typed
def sights(keys: Float[Array, "b q"]) -> tuple[Bool[Array, "b q q"], Bool[Array, "b q q"]]:
    """What content rows and query rows see, if the first one is the class's: all see that, and it sees itself alone."""
    first = jnp.arange(keys.shape[1]) == 0
    keys = jnp.where(first, -jnp.inf, keys)
    return keys[:, None] <= keys[:, :, None], (keys[:, None] < keys[:, :, None]) | first


@typed
def similarity(
    rows: Float[Array, "b q d"], by: Literal["class", "mean"] = "class"
) -> Float[Array, "b n"]:
    """Cosines of all rows but the first, the class's, with that one, or with their mean."""
    patches = rows[:, 1:].astype(jnp.float32)
    to = patches.mean(1, keepdims=True) if by == "mean" else rows[:, :1].astype(jnp.float32)
    return (unit(patches) * unit(to)).sum(-1)


def unit(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Vectors of length 1."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@typed
def distances(attention: Float[Array, "b n"], size: tuple[int, int]) -> Float[Array, "b n"]:
    """From the place of a grid that gets the most of an attention."""
    places = np.stack(np.divmod(np.arange(math.prod(size)), size[1]), -1).astype(np.float32)
    apart = np.linalg.norm(places[:, None] - places, axis=-1).astype(np.float32)
    return jnp.asarray(apart)[attention.argmax(1)]


@typed
def feature_errors(found: Float[Array, "b n d"], wanted: Float[Array, "b n d"]) -> Float[Array, "b n"]:
    """Squared distances of vectors brought to length 1."""
    return jnp.square(unit(found) - unit(wanted)).sum(-1)


class Readout(nn.Module):
    """A two-layer perceptron, float32 in the end."""

    width: int
    out: int
    dtype: Any = jnp.float32

    def setup(self):
        self.fc1 = Linear(self.width, self.dtype, None, xavier, bias=True)
        self.fc2 = Linear(self.out, self.dtype, jnp.float32, xavier, bias=True)

    def __call__(self, h):
        return self.fc2(nn.gelu(self.fc1(h), approximate=False))


class SemAIM(Generator):
    """Every patch is predicted from those nearer to what the image shows; what is learned are the features of its encoder.

    There is no sampler, and previews are off (`preview_every=0`): errors are squared, so predictions are blurred means. How good
    the features are, a linear probe says (`tests/probe.py`).

    Attributes:
      backbone: the network.
      conditioning: `Nothing`, as wide as the network.
      follows: patches come by the distance from the one most like the whole image ("distance"), by that likeness itself
        ("similarity"), both seen by the network as it is, or by the order that it is given ("order").
      by: the whole image is the class's row ("class"), the mean of the patches ("mean"), or what the class's row looks at in the
        last layer is most like it ("attention").
      target: blurred patches, each of mean 0 and variance 1 ("pixels"), or the network's own features of the unmasked image.
      blur, sigma: side of the blur's window, an odd number of pixels, and its standard deviation.
      spec: the tokens, patches of pixels; None until the tokenizer is known (`complete`).
    Source: SemAIM (arXiv:2312.10457).
    """

    backbone: TwoStreams
    conditioning: Conditioning
    follows: Literal["distance", "similarity", "order"] = "distance"
    by: Literal["class", "mean", "attention"] = "class"
    target: Literal["pixels", "features"] = "pixels"
    blur: int = 9
    sigma: float = 1.0
    spec: TokenSpec | None = None

    editable = False

    def on(self, spec: TokenSpec) -> "SemAIM":
        found = super().on(spec)
        if len(spec.scales) != 1 or math.prod(spec.scales[0]) != spec.n or not found.patch:
            raise ValueError(
                f"SemAIM needs one full grid of square patches of pixels (`Patches`), but tokens have {spec.channels} channels "
                f"in {spec.scales}"
            )
        if self.blur < 1 or self.blur % 2 == 0 or not self.sigma > 0:
            raise ValueError(
                f"generator.blur is {self.blur} and sigma {self.sigma}; they must be an odd number of pixels and above 0"
            )
        return found

    @property
    def patch(self) -> int:
        """Side of a patch, of one or three colours; 0 if it is none."""
        sides = (math.isqrt(self.spec.channels // colours) for colours in (1, 3))
        return next((side for side, colours in zip(sides, (1, 3)) if colours * side**2 == self.spec.channels), 0)

    def setup(self):
        net = self.backbone
        self.input = Linear(net.width, net.dtype, None, xavier, bias=True)
        self.first = self.param("first", init, (1, net.width))
        self.head = Readout(4 * net.width, self.spec.channels if self.target == "pixels" else net.width, net.dtype)

    @property
    def places(self) -> np.ndarray:
        """Columns in the first half and rows in the second, float32 [1+n d]; that of the class is zero."""
        table = sine_quarters(*self.spec.scales[0], self.backbone.width)
        return np.pad(np.roll(table, self.backbone.width // 2, axis=1), ((1, 0), (0, 0)))

    @typed
    def loss(
        self,
        tokens: Float[Array, "b n c"],
        batch: Batch,
        order: Order,
        *,
        drop: Bool[Array, "b"],
        key: PRNGKey,
        tokenizer: Frozen | None = None,
    ) -> tuple[Float[Array, "b n"], Float[Array, "b n"], Metrics]:
        """Mean squared error of every patch, or squared distance of its feature.

        Args:
          tokens: in slot order.
          batch: optionally "valid" [b], the weight of each image (default 1).
          order: for `follows="order"`.
          drop, tokenizer: unused.
          key: breaks ties between distances.

        Returns:
          Loss and weight of every slot, and no metrics.
        """
        uniform = shares.draw(jax.random.uniform, key, tokens.shape[:2])
        rows, looks = self.features(tokens)
        keys = self.keys(lax.stop_gradient(rows), lax.stop_gradient(looks), uniform, order)
        found = self.predicted(tokens, keys)[:, 1:]
        if self.target == "pixels":
            loss = jnp.square(found - self.wanted(tokens)).mean(-1)
        else:
            loss = feature_errors(found, lax.stop_gradient(rows[:, 1:]).astype(jnp.float32))
        return loss, image_weight(batch, len(tokens))[:, None] * jnp.ones(loss.shape), {}

    def embed(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b q d"]:
        """Rows of the class and of all patches, with their places."""
        x = self.input(tokens)
        first = jnp.broadcast_to(self.first.astype(x.dtype), (len(x), 1, x.shape[-1]))
        return constrain(jnp.concatenate([first, x], axis=1) + self.places.astype(x.dtype), BATCH)

    def features(self, tokens: Float[Array, "b n c"]) -> tuple[Float[Array, "b q d"], Float[Array, "b n"]]:
        """What the network sees in whole images: rows of the class and of all patches; and how much the class's looks at each."""
        rows, looks = self.backbone.encode(self.embed(tokens))
        return rows, looks[:, 1:]

    @nn.nowrap
    def keys(
        self, rows: Float[Array, "b q d"], looks: Float[Array, "b n"], uniform: Float[Array, "b n"], order: Order
    ) -> Float[Array, "b n"]:
        """By which patches come, the smallest first."""
        if self.follows == "order":
            step = jnp.broadcast_to(jnp.asarray(order.step, jnp.float32), order.slot.shape)
            return jnp.broadcast_to(to_slots(step[..., None], order)[..., 0], uniform.shape)
        attention = looks if self.by == "attention" else jax.nn.softmax(similarity(rows, self.by))
        if self.follows == "similarity":
            return 1 - attention
        return distances(attention, self.spec.scales[0]) + 1e-3 * uniform

    def predicted(self, tokens: Float[Array, "b n c"], keys: Float[Array, "b n"]) -> Float[Array, "b q c"]:
        """Predictions at the class's place, which mean nothing, and of all patches from those of smaller keys."""
        keys = jnp.pad(keys, ((0, 0), (1, 0)))
        return self.head(self.backbone(self.embed(tokens), jnp.asarray(self.places), keys))

    @nn.nowrap
    def wanted(self, tokens: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Patches of the blurred image, each of mean 0 and variance 1."""
        image = unpatchify(tokens.astype(jnp.float32), self.spec.scales[0], self.patch)
        down, across = (blur_matrix(side, self.blur, self.sigma) for side in image.shape[1:3])
        image = jnp.einsum("yh,xw,bhwc->byxc", down, across, image, precision=lax.Precision.HIGHEST)
        x = patchify(image, self.patch)
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, ddof=1, keepdims=True) + 1e-6)

    def begin(self, *_: Any) -> NoReturn:
        raise ValueError("SemAIM draws no images: it predicts patches to learn features of images (see tests/probe.py)")

    step = begin


def blur_matrix(n: int, window: int, sigma: float) -> np.ndarray:
    """Of a line of pixels to the blurred one, float32 [n n]; beyond its ends is black."""
    apart = np.arange(n)[:, None] - np.arange(n)
    wave = np.exp(-np.square(np.arange(window) - window // 2) / (2 * sigma**2)).sum()
    return np.where(np.abs(apart) <= window // 2, np.exp(-np.square(apart) / (2 * sigma**2)) / wave, 0).astype(np.float32)
