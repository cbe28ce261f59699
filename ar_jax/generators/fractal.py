"""FractalGen (arXiv:2502.17437): generators inside generators, down to the pixels.

The tokens of a generator (`Causal`, `Infilling`) are patches of pixels, and its head is `Inside`: another generator, of the patches
inside a patch. The last generator's tokens are pixels, whose head is `Colours`.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.generators.base import Conditioning, Frozen, Generator, Knobs, Setting, State, Step, image_weight
from ar_jax.generators.inputs import Previous
from ar_jax.generators.masked import MaskRatio
from ar_jax.heads.colours import Colours, Handed
from ar_jax.machine import shares
from ar_jax.machine.sharding import BATCH, Rules, constrain
from ar_jax.nets.conditioning import Cond, widen
from ar_jax.nets.linear import Linear
from ar_jax.nets.mlp import xavier
from ar_jax.nets.transformer import init
from ar_jax.nets.vit import ClipViT
from ar_jax.orders import Order, raster, scan_steps, to_slots, whole
from ar_jax.tokenizers.pixels import VALUES, patch_of
from ar_jax.tokens import TokenSpec, grid
from ar_jax.typing import (
    Array,
    Batch,
    Bool,
    Float,
    Having,
    Index,
    Int,
    Key,
    Metrics,
    PRNGKey,
    Tokens,
    Within,
    typed,
)

MEAN, SPREAD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])  # of ImageNet's pixels, as parts of 255


def standard(values: Array, channels: int) -> Float[Array, "*b k"]:
    """Values 0..255 [*b k], channel after channel, as networks see them: by ImageNet's mean and spread, of one channel by the
    mean ones."""
    mean, spread = (x if channels == 3 else x.mean(keepdims=True) for x in (MEAN, SPREAD))
    x = jnp.asarray(values, jnp.float32).reshape(*values.shape[:-1], channels, -1)
    return ((x / 255 - mean[:, None]) / spread[:, None]).reshape(values.shape)


def cut(patches: Int[Array, "b k"], channels: int, side: int) -> Int[Array, "b n k2"]:
    """Patches of a side inside patches, in raster order."""
    cells = _cells(patches.shape[-1], channels, side)
    x = patches.reshape(-1, channels, cells, side, cells, side)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(len(patches), cells**2, -1)


def joined(inside: Int[Array, "b n k2"], channels: int, side: int) -> Int[Array, "b k"]:
    """The inverse of `cut`."""
    b, n, k = inside.shape
    cells = _cells(n * k, channels, side)
    x = inside.reshape(b, cells, cells, channels, side, side)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(b, -1)


def _cells(k, channels, side):
    return round((k // channels) ** 0.5) // side


class PreviousPatch(Previous):
    """As `Previous`, of a patch its projected pixels."""

    def complete(self, spec: TokenSpec) -> "PreviousPatch":
        patch_of(spec.codes)
        return self.clone(spec=spec)

    def setup(self):
        self.projection = Linear(self.width, kernel_init=xavier, bias=True)

    def embed(self, tokens: Tokens, elsewhere: Frozen | None = None) -> Float[Array, "b m d"]:
        return self.projection(standard(tokens, patch_of(self.spec.codes)[0]))


class Inside(nn.Module):
    """A generator of the patches inside a patch, as the head of the generator of those.

    Every patch is an image to it, whose condition is what the generator above hands on. It is drawn with the guidance and the
    temperature of the step above.

    Attributes:
      generator: `Causal` with `PreviousPatch`, or `Infilling`; its conditioning is `FromAbove`.
      patch: side of the patches inside.
      order: of them.
      guide: draws the patch's mean colour first, which the generator then knows; its loss is added. None leaves it out.
    """

    generator: Annotated[nn.Module, Having("loss", "nats", "begin", "step", "on")]
    patch: Annotated[int, Within(1, 2**6)] = 1
    order: Callable = raster
    guide: Colours | None = None

    def complete(self, spec: TokenSpec) -> "Inside":
        """Raises a ValueError if tokens are no patches that this could cut."""
        channels, side = patch_of(spec.codes)
        if side % self.patch or side == self.patch:
            raise ValueError(
                f"head.patch is {self.patch}, but the patches that it cuts have a side of {side}; it must be a part of that"
            )
        cells, pixel = side // self.patch, TokenSpec(grid(1, 1), codes=(VALUES,) * channels)
        inner = self.generator.on(TokenSpec(grid(cells, cells), codes=(VALUES,) * (channels * self.patch**2)))
        inner = inner.clone(conditioning=inner.conditioning.clone(colour=self.guide is not None))
        return self.clone(generator=inner, guide=self.guide and self.guide.complete(pixel))

    @property
    def channels(self) -> int:
        return patch_of(self.generator.spec.codes)[0]

    @property
    def rules(self) -> Rules:
        """What tensor parallelism divides (see `sharding.shard`)."""
        return self.generator.rules + (self.guide.rules if self.guide else ())

    def by_layer(self) -> "Inside":
        """The same head laid out for decoding."""
        return self.clone(generator=self.generator.by_layer())

    @nn.nowrap
    def slices(self, path: tuple[str, ...], leaf: Array) -> dict[tuple[str, ...], Array]:
        """What becomes of a parameter in that layout; `path` begins with the head's name."""
        head, part, *inside = path
        if part != "generator":
            return {path: leaf}
        return {(head, part, *where): x for where, x in self.generator.slices(tuple(inside), leaf).items()}

    @nn.nowrap
    def calls(self, steps: int) -> np.ndarray:
        """Calls of all networks in every decode step, int [steps]."""
        order = self.order(self.generator.spec, jax.random.split(jax.random.key(0), 1), 1, 0)
        inside = sum(int(count.sum()) for count in self.generator.calls(order).values())
        return np.full(steps, inside + (self.channels if self.guide else 0))

    @typed
    def loss(
        self,
        h: Handed,
        target: Int[Array, "b m k"],
        *,
        key: PRNGKey | None = None,
        weight: Float[Array, "b m"] | None = None,
    ) -> Float[Array, "b m"]:
        """Of every patch, so that the weighted mean is that of the loss inside, over all that the patches have inside.

        Args:
          h: what the generator above hands on.
          target: patches.
          key: for generators and guides that draw.
          weight: of the patches in the mean; None is 1.
        """
        (b, m, _), keys = target.shape, (None,) * 3 if key is None else jax.random.split(key, 3)
        patches = target.reshape(b * m, -1)
        valid = jnp.ones(b * m) if weight is None else weight.reshape(-1)
        batch, guiding = {"handed": _each(h), "valid": valid}, 0.0
        if self.guide:
            mean = patches.reshape(b * m, self.channels, -1).mean(-1)
            near = _rounded(mean + 0.01 * self.ties(keys[0], mean.shape))
            guiding = self.guide.loss(h, near.reshape(b, m, -1))
            batch["colour"] = standard(mean, self.channels)
        loss, weight, _ = self.generator.loss(
            cut(patches, self.channels, self.patch), batch, self.ordered(keys[1], b * m), drop=jnp.zeros(b * m, bool), key=keys[2]
        )
        total = (loss * weight).sum(1) / jnp.where(valid > 0, valid, 1)
        count = weight.sum() / jnp.maximum(valid.sum(), 1e-9)  # of what patches have inside, the mean
        return (total / jnp.maximum(count, 1e-9)).reshape(b, m) + guiding

    def nats(self, h: Handed, target: Int[Array, "b m k"], *, key: PRNGKey | None = None) -> Float[Array, "b m"]:
        """Minus the log-probability of every patch, or an unbiased estimate of a bound of it (see `Infilling.nats`).

        With a guide, of the patch and its mean colour, as it is drawn.
        """
        (b, m, _), keys = target.shape, (None,) * 2 if key is None else jax.random.split(key)
        patches = target.reshape(b * m, -1)
        batch, guiding = {"handed": _each(h)}, 0.0
        if self.guide:
            mean = _rounded(patches.reshape(b * m, self.channels, -1).mean(-1))
            guiding = self.guide.nats(h, mean.reshape(b, m, -1))
            batch["colour"] = standard(mean, self.channels)
        inside = self.generator.nats(
            cut(patches, self.channels, self.patch), batch, self.ordered(keys[0], b * m), drop=jnp.zeros(b * m, bool), key=keys[1]
        )
        return inside.reshape(b, m) + guiding

    def sample(
        self, h: Handed, keys: Key[Array, "b m"], knobs: Knobs, i: Index, tokenizer: Frozen | None = None
    ) -> Int[Array, "b m k"]:
        """Draws a patch per place of step `i`; guided rows (B = b * ways) are folded with every pixel.

        Raises:
          ValueError: mixtures of codes are asked for.
        """
        if knobs.soften is not None:
            raise ValueError("sampling.soft mixes the codes of one codebook, but tokens are patches of pixels; give False")
        (images, m), n = keys.shape, self.generator.spec.n
        ways = len(h) // images
        # every place of an image is an image inside, beside its rows without the condition
        h = jnp.moveaxis(h.reshape(images, ways, *h.shape[1:]), 1, 2)
        handed, keys = _each(h.reshape(images * m * ways, 1, *h.shape[3:])), keys.reshape(-1)
        guidance, temperature = jnp.asarray(knobs.guidance)[i], jnp.asarray(knobs.temperature)[i]

        def alike(steps):
            return knobs.replace(guidance=jnp.full(steps, guidance), temperature=jnp.full(steps, temperature))

        batch = {"handed": handed}
        if self.guide:
            colour = self.guide.sample(handed[:, None], self.own(keys, jnp.array([n + 1])), alike(1), 0)[:, 0]
            batch["colour"] = widen(standard(colour, self.channels), ways)
        order = self.order(self.generator.spec, self.own(keys, jnp.array([n]))[:, 0], len(keys), 0)
        cond = self.generator.condition(batch, jnp.zeros(len(handed), bool))
        setting = Setting(cond, order, alike(len(order.sizes)))
        generator, variables = self.generator.unbind()
        call = partial(generator.apply, variables)

        def step(state, i, first, size):
            return call(state, Step(i, first, self.own(keys, first + jnp.arange(size))), setting, method="step")

        def grow(state, ranks):
            return call(state, ranks, setting, method="grow")

        state = call(setting, len(keys), method="begin")
        state = scan_steps(order.sizes, step, state, rooms=order.rooms, grow=grow)
        patches = joined(to_slots(state.tokens, order), self.channels, self.patch)
        return patches.reshape(images, m, -1)

    @nn.nowrap
    def own(self, keys: Key[Array, "b"], numbers: Int[Array, "m"]) -> Key[Array, "b m"]:
        """Keys of ranks inside; beyond them, of the order and of the colour."""
        return jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(numbers))(keys)

    @nn.nowrap
    def ordered(self, key: PRNGKey | None, rows: int) -> Order:
        """An order for training."""
        keys = None if key is None else shares.draw(jax.random.split, key, (rows,))
        return self.order(self.generator.spec, keys, rows, 0)

    @nn.nowrap
    def ties(self, key: PRNGKey | None, shape: tuple[int, int]) -> Float[Array, "b c"]:
        """Unit normal numbers; a hundredth of them decides which way halves of colours are rounded."""
        if key is None:
            raise ValueError("a head with a guide draws noise in training, so it needs a key")
        return shares.draw(jax.random.normal, key, shape)


def _each(h):
    """What is handed on, place by place, [b m d] or [b m r d] to [b*m r d]."""
    return h.reshape(-1, 1 if h.ndim == 3 else h.shape[2], h.shape[-1])


def _rounded(values):
    return jnp.clip(jnp.round(values), 0, VALUES - 1).astype(jnp.int32)


class Infilling(Generator):
    """Patches are predicted from any set of known ones, by a network over all places, those not yet known with a learned vector.

    A place hands on five vectors: its own, those of the places above, to the right, below and to the left; zeros outside.

    Attributes:
      backbone: the network.
      conditioning: makes rows from a batch, which come before the patches (`Repeated`, `FromAbove`).
      head: draws a patch from those vectors (`Inside`, `Colours`).
      mask: part of the patches that is hidden in training, drawn for every image.
      spec: the tokens; None until the tokenizer is known (`complete`).
    """

    backbone: ClipViT
    conditioning: Conditioning
    head: Inside | Colours
    mask: MaskRatio = MaskRatio(least=0.0)
    spec: TokenSpec | None = None

    any_order = True

    def on(self, spec: TokenSpec) -> "Infilling":
        patch_of(spec.codes)
        return super().on(spec)

    def example(self) -> tuple[Order, None]:
        return whole(self.spec), None

    def setup(self):
        width, rows = self.backbone.width, self.conditioning.rows + self.spec.n
        self.input = Linear(width, self.backbone.dtype, None, xavier, bias=True)
        self.mask_token = self.param("mask_token", init, (width,))
        self.positions = self.param("positions", init, (rows, width))

    def by_layer(self) -> "Infilling":
        return self.clone(head=self.head.by_layer())

    def slices(self, path: tuple[str, ...], leaf: Array) -> dict[tuple[str, ...], Array]:
        return self.head.slices(path, leaf) if path[0] == "head" else {path: leaf}

    @typed
    def loss(
        self, tokens: Int[Array, "b n k"], batch: Batch, order: Order, *, drop: Bool[Array, "b"], key: PRNGKey,
        tokenizer: Frozen | None = None,
    ) -> tuple[Float[Array, "b n"], Float[Array, "b n"], Metrics]:  # fmt: skip
        """Prediction of the hidden patches; which and how many is drawn for every image.

        Args:
          tokens: in slot order.
          batch: the condition, and optionally "valid" [b], the weight of each image (default 1).
          order: unused.
          drop: images trained without their condition.
          key: for the mask and the head.
          tokenizer: unused.

        Returns:
          The head's loss and weight of every slot (0 where it is known), and metrics.
        """
        mask_key, head_key = jax.random.split(key)
        hidden = self.drawn_mask(mask_key, tokens.shape[:2])
        weight = image_weight(batch, len(tokens))[:, None] * hidden
        h = self.hidden(tokens, hidden, self.condition(batch, drop))
        return self.head.loss(h, tokens, key=head_key, weight=weight), weight, {"masked": hidden.mean()}

    @nn.nowrap
    def drawn_mask(self, key: PRNGKey, shape: tuple[int, int]) -> Bool[Array, "b n"]:
        """Slots that training hides."""
        ratio_key, place_key = jax.random.split(key)
        ratio = shares.draw(self.mask.draw, ratio_key, (shape[0], 1))
        return _some(place_key, jnp.maximum(jnp.ceil(shape[1] * ratio), 1), shape)

    def nats(
        self, tokens: Int[Array, "b n k"], batch: Batch, order: Order, *, drop: Bool[Array, "b"], key: PRNGKey,
        tokenizer: Frozen | None = None,
    ) -> Float[Array, "b"]:  # fmt: skip
        """An unbiased estimate of a bound of minus the log-probability of every image; arguments as of `loss`.

        Drawn one by one in a random order, patches have the bound sum over r of E[-log p(patch of rank r | those before)]. A
        number of hidden ones is drawn evenly, of which each is as likely to be next; n times their mean is the estimate.
        Source: order-agnostic diffusion (arXiv:2110.02037).
        """
        count_key, place_key, head_key = jax.random.split(key, 3)
        n, b = self.spec.n, len(tokens)
        count = shares.draw(partial(jax.random.randint, minval=1, maxval=n + 1), count_key, (b, 1))
        hidden = _some(place_key, count, (b, n))
        h = self.hidden(tokens, hidden, self.condition(batch, drop))
        return n * (self.head.nats(h, tokens, key=head_key) * hidden).sum(1) / count[:, 0]

    @typed
    def hidden(self, tokens: Int[Array, "b n k"], hidden: Bool[Array, "#b n"], cond: Cond) -> Float[Array, "B n 5 d"]:
        """What every slot hands on.

        Args:
          tokens: in slot order.
          hidden: which of them the network must not see.
          cond: rows of B = b * ways guided images.
        """
        x = self.input(standard(tokens, patch_of(self.spec.codes)[0]))
        x = jnp.where(hidden[..., None], self.mask_token.astype(x.dtype), x)
        x = jnp.concatenate([cond.rows.astype(x.dtype), widen(x, len(cond.rows) // len(tokens))], axis=1)
        x = (x + self.positions).astype(x.dtype)
        return self.around(self.backbone(constrain(x, BATCH))[:, cond.rows.shape[1] :])

    @nn.nowrap
    def around(self, h: Float[Array, "B n d"]) -> Float[Array, "B n 5 d"]:
        """Every place's vector, and those of its neighbours."""
        (rows, columns), (b, n, d) = self.spec.scales[0], h.shape
        x = jnp.pad(h.reshape(b, rows, columns, d), ((0, 0), (1, 1), (1, 1), (0, 0)))
        places = (1, 1), (0, 1), (1, 2), (2, 1), (1, 0)
        return jnp.stack([x[:, r : r + rows, c : c + columns] for r, c in places], axis=3).reshape(b, n, 5, d)

    def begin(self, setting: Setting, images: int) -> State:
        return State(self.spec.zeros(images))

    def step(self, state: State, now: Step, setting: Setting) -> State:
        """Draws the ranks of a step from those before; there may be more than the step reveals."""
        order, ranks = setting.order, now.first + jnp.arange(now.size)
        unknown = jnp.broadcast_to(jnp.arange(order.n) >= now.first, order.slot.shape)
        hidden = to_slots(unknown[..., None].astype(jnp.int32), order)[..., 0] > 0
        h = self.hidden(to_slots(state.tokens, order), hidden, setting.cond)
        slots = jnp.take(jnp.asarray(order.slot), ranks, axis=1, mode="clip")
        slots = widen(slots, len(h) // len(slots))
        h = jnp.take_along_axis(h, slots[..., None, None], axis=1)
        drawn = self.head.sample(h, now.keys, setting.knobs, now.i)
        return State(state.tokens.at[:, ranks].set(drawn, mode="drop"))


def _some(key, count, shape):
    """So many random slots of every image, bool [b n]."""
    scores = shares.draw(jax.random.uniform, key, shape)
    return jnp.argsort(scores, axis=1) < count  # the inverse of a random permutation is as random
