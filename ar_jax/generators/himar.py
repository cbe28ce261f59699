"""Hi-MAR: masked prediction of a few low-resolution tokens, the pivots, then of all others, told what the pivots were made of.

`HiMar(TaskViT(...), TaskViT(...), Label(..., apart=True), Diffusion(...), JointDiffusion(...))` in the order of `Resolutions`, on the
tokens of an `ImagePyramid` of two scales.

Source: Hi-MAR (arXiv:2505.20288).
"""

import dataclasses
import math
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ar_jax.data import Info
from ar_jax.decode.guidance import Linear as LinearGuidance
from ar_jax.generators.base import Conditioning, Frozen, Generator, Setting, Step, image_weight
from ar_jax.generators.masked import MaskRatio
from ar_jax.heads.diffusion import Diffusion, continuous
from ar_jax.heads.joint_diffusion import JointDiffusion
from ar_jax.machine import shares
from ar_jax.machine.sharding import BATCH, constrain
from ar_jax.nets import vit
from ar_jax.nets.attention import Rows
from ar_jax.nets.conditioning import Cond, widen
from ar_jax.nets.linear import Linear, look_up
from ar_jax.nets.mlp import norm, xavier
from ar_jax.nets.transformer import init
from ar_jax.nets.vit import Plain
from ar_jax.orders import Order, Shuffled, to_ranks
from ar_jax.tokens import TokenSpec
from ar_jax.typing import (
    Array,
    Batch,
    Bool,
    Float,
    Index,
    Key,
    Metrics,
    PRNGKey,
    Share,
    Steps,
    Within,
    finite,
    typed,
)

TASKS = 2  # of the networks: to predict pivots, and the other tokens
SHARES = 0.4, 0.6  # of the two losses: twice a fifth, and three quarters of four fifths


@dataclasses.dataclass(frozen=True)
class Resolutions:
    """The pivots in a random order, then the other tokens in a random order, for every image; see `orders.Shuffled`.

    Attributes:
      steps: of decoding the other tokens.
      pivot_steps: of decoding the pivots.
      scans: programs that the steps of each may be compiled to.
    """

    steps: Steps = 4
    pivot_steps: Steps = 32
    scans: Annotated[int, Within(1, 1024)] = 4

    adjustable = ("steps", "pivot_steps", "scans")

    def __call__(self, spec: TokenSpec, keys: Key[Array, "b"], images: int = 1, train_step: Index = 0) -> Order:
        level = spec.coords[:, 0]
        parts = [dataclasses.replace(spec, coords=spec.coords[level == i] * [0, 1, 1]) for i in range(TASKS)]
        each = jax.vmap(lambda key: jax.random.split(key, TASKS), out_axes=1)(keys)
        pivots, others = (
            Shuffled(steps, self.scans)(part, keys, images)
            for part, steps, keys in zip(parts, (self.pivot_steps, self.steps), each)
        )
        first = pivots.rooms
        if first[-1] == others.rooms[0]:  # steps of both kinds share no loop
            first = (*first[:-1], first[-1] + 1)
        slot = jnp.concatenate([pivots.slot, pivots.n + others.slot], axis=1)
        return Order(slot, pivots.sizes + others.sizes, first + others.rooms)


@dataclasses.dataclass(frozen=True)
class ByResolution:
    """Rises from 1 with the part of the tokens that is known, of the pivots and then of the others (see `Linear`)."""

    weight: float = 1.0
    """Of the condition, where it rises to for the other tokens; 1 is unguided."""
    pivots: float = 1.0
    """Where it rises to for the pivots."""

    def __post_init__(self):
        finite("guidance.weight", self.weight)
        finite("guidance.pivots", self.pivots)

    def __call__(self, order: Order, spec: TokenSpec) -> np.ndarray:
        early = np.cumsum(order.sizes) <= pivots_of(spec)
        sizes = np.array(order.sizes)
        parts = ((self.pivots, sizes[early]), (self.weight, sizes[~early]))
        return np.concatenate([LinearGuidance(w)(order.replace(sizes=tuple(part.tolist())), spec) for w, part in parts])


def pivots_of(spec: TokenSpec) -> int:
    """How many pivots there are."""
    return math.prod(spec.scales[0])


class TaskBlock(vit.Block):
    """As `vit.Block`; what the task's vector says scales the norms and gates the branches."""

    def setup(self):
        super().setup()
        shape = (TASKS, 4 * self.width)
        ones = nn.initializers.ones(None, (TASKS, 1, self.width))
        begin = jnp.concatenate([0 * ones, ones, 0 * ones, ones], axis=1).reshape(shape)
        self.task_scale = self.param("task_scale", nn.initializers.zeros, shape)
        self.task_shift = self.param("task_shift", lambda *_: begin)

    def __call__(self, x, cache, task, vector, seen, first):
        det = not self.has_rng("dropout")
        x = constrain(x, BATCH)
        scale, shift = (jnp.asarray(table, jnp.float32)[task] for table in (self.task_scale, self.task_shift))
        scale1, gate1, scale2, gate2 = jnp.split(vector * scale + shift, 4)
        y = (self.attention_norm(x) * (1 + scale1)).astype(self.dtype)
        y, cache = self.attend(y, cache, seen, first, det)
        x = (x + gate1 * self.drop(y, deterministic=det)).astype(x.dtype)
        y = self.perceptron((self.mlp_norm(x) * (1 + scale2)).astype(self.dtype), det)
        return (x + gate2 * self.drop(y, deterministic=det)).astype(x.dtype), cache


class TaskViT(Plain):
    """As `ViT`, for two tasks, which have a vector each."""

    no_decay = ("task_shift", "task_scale")

    def setup(self):
        self.blocks = self.stack(TaskBlock, self.fields_of_block(True), (nn.broadcast,) * 4)
        self.task = self.param("task", nn.initializers.normal(1.0), (TASKS, self.width))
        self.ada = Linear(4 * self.width, self.dtype, jnp.float32, xavier, bias=True)
        self.norm = norm(None, self.dtype)

    @typed
    def __call__(
        self, x: Float[Array, "B q d"], task: int, *, valid: Bool[Array, "#B q"] | None = None
    ) -> Float[Array, "B q d"]:
        """Runs all layers for a task, 0 or 1; rows that are not `valid` are seen by nobody else."""
        if valid is not None:
            valid = jnp.broadcast_to(valid, x.shape[:2])
        rows = Rows(np.zeros(x.shape[1], np.int32), valid=valid)
        seen = rows.sight(masked=self.attention_dropout > 0 and self.has_rng("dropout"))  # kernels do not drop weights
        shared = (jnp.int32(task), self.ada(nn.silu(jnp.asarray(self.task))[task]), seen, rows.first)
        return self.norm(self.run(self.blocks, x.astype(self.dtype), None, (), shared)[0])


@struct.dataclass
class State:
    """What the decoding loop hands from step to step.

    Attributes:
      tokens: in rank order, zeros where unknown, [b r c]; while pivots are drawn there is no room for others.
      said: hidden rows that the pivots were drawn from, under their condition, [b p d].
    """

    tokens: Array
    said: Array


class HiMar(Generator):
    """Two tasks of one encoder and one decoder, as `Masked` has them: the pivots, each by the head; then the other tokens, all
    together by `joint_head`, told by the hidden rows of the pivots in place of the pivots themselves.

    Attributes:
      encoder, decoder: the networks.
      conditioning: makes one row from a batch (`Label`), as wide as the encoder.
      head: of the pivots.
      joint_head: of the other tokens; in every step it draws all of them, and those that the step reveals are kept.
      buffer: rows before the tokens; each carries the condition.
      mask: part of the pivots that is hidden in training; of the other tokens cos(pi/2 r) are, r even in 0..1.
      told: part of the images that are told of the pivots in training; others get learned rows in their place.
      told_after: updates until the part has risen to that, from 0.
      spec: the tokens, of two levels; None until the tokenizer is known (`complete`).
    """

    encoder: TaskViT
    decoder: TaskViT
    conditioning: Conditioning
    head: Diffusion
    joint_head: JointDiffusion
    buffer: Annotated[int, Within(0, 2**24)] = 64
    mask: MaskRatio = MaskRatio()
    told: Share = 0.5
    told_after: Annotated[int, Within(0, 2**31)] = 0
    spec: TokenSpec | None = None

    stepped = True  # its loss asks for the number of the update

    def complete(self, spec: TokenSpec, info: Info) -> "HiMar":
        continuous(spec, "HiMar")
        if len(spec.scales) != TASKS or spec.n != sum(height * width for height, width in spec.scales):
            raise ValueError(
                f"HiMar needs tokens of two full grids, pivots first, but the tokenizer has {spec.n} in {spec.scales}; "
                "use ImagePyramid with two scales"
            )
        return super().complete(spec, info)

    def example(self) -> tuple[Order, Frozen | None]:
        keys = jax.random.split(jax.random.key(0), 1)
        return Resolutions(1, 1)(self.spec, keys), None

    @property
    def pivots(self) -> int:
        return pivots_of(self.spec)

    def setup(self):
        rows, wide, width = self.buffer + self.spec.n, self.encoder.width, self.decoder.width

        def dense(features, net):
            return Linear(features, net.dtype, None, xavier, bias=True)

        self.input, self.pivot_input, self.told_input = (dense(wide, self.encoder) for _ in range(3))
        self.decoder_input, self.input_norm = dense(width, self.decoder), norm(None, self.encoder.dtype)
        self.encoder_positions = self.param("encoder_positions", init, (TASKS, rows, wide))
        self.decoder_positions = self.param("decoder_positions", init, (TASKS, rows, width))
        self.head_positions = self.param("head_positions", init, (self.spec.n, width))
        self.mask_token = self.param("mask_token", init, (TASKS, self.spec.n, width))
        self.placeholder = self.param("placeholder", init, (self.pivots, self.spec.channels))

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
        step: Index | None = None,
    ) -> tuple[Float[Array, "b n"], Float[Array, "b n"], Metrics]:
        """Prediction of hidden pivots, and then of hidden other tokens; how many are hidden is drawn once for the batch.

        Args:
          tokens: in slot order.
          batch: the condition, and optionally "valid" [b], the weight of each image (default 1).
          order: its first ranks are the pivots.
          drop: images trained without their condition, for the pivots; for the other tokens it is their neighbours in the batch.
          key: for the masks and the heads.
          tokenizer: unused.
          step: the update's number; None is one at which enough images are told.

        Returns:
          Loss and weight of every rank, and metrics.
        """
        keys, p, n = jax.random.split(key, 5), self.pivots, self.spec.n
        target, images = to_ranks(tokens, order), len(tokens)
        known = p - jnp.ceil(p * self.mask.draw(keys[0])).astype(jnp.int32)
        hidden = jnp.ceil((n - p) * jnp.cos(jnp.pi / 2 * jax.random.uniform(keys[1]))).astype(jnp.int32)
        share = self.told * (1.0 if step is None else jnp.minimum(1, step / max(self.told_after, 1)))
        told = shares.draw(jax.random.uniform, keys[2], (images,)) > 1 - share
        slot = jnp.asarray(order.slot)[:, p:] - p

        h = self.hidden_pivots(target[:, : p - math.ceil(p * self.mask.least)], known, self.condition(batch, drop), order)
        first = self.head.loss(h, target[:, :p], key=keys[3])
        of_pivots = jnp.arange(p) >= known
        rows = self.pivot_rows(jax.lax.stop_gradient(h), told[:, None] & of_pivots, order)
        other = self.condition(batch, jnp.roll(drop, 1))
        h = self.hidden_others(rows, target[:, p:], n - p - hidden, other, order)
        second = self.joint_head.loss(h, target[:, p:], slot, jnp.arange(n - p) >= n - p - hidden, key=keys[4])

        parts = SHARES[0] * of_pivots / of_pivots.sum(), jnp.full(n - p, SHARES[1] / (n - p))
        weight = image_weight(batch, images)[:, None] * jnp.concatenate(parts)
        loss = jnp.concatenate([first, second], axis=1)
        return loss, weight, {"masked": 1 - known / p, "masked_others": hidden / (n - p)}

    def pivot_rows(self, said: Float[Array, "b p d"], told: Bool[Array, "#b p"], order: Order) -> Float[Array, "b p e"]:
        """What the second task sees of the pivots: what their hidden rows say, where it is told, or learned rows."""
        learned = self.pivot_input(look_up(self.placeholder, jnp.asarray(order.slot)[:, : self.pivots]))
        return jnp.where(told[..., None], self.told_input(said), learned)

    def hidden_pivots(
        self, tokens: Float[Array, "b r c"], known: Index, cond: Cond, order: Order
    ) -> Float[Array, "B p d"]:
        """Hidden rows of the pivots in rank order, of the first r of which some are known."""
        return self.hidden(0, self.pivot_input(tokens), known, cond, order)[:, : self.pivots]

    def hidden_others(
        self, pivots: Float[Array, "b p e"], tokens: Float[Array, "b r c"], known: Index, cond: Cond, order: Order
    ) -> Float[Array, "B q d"]:
        """Hidden rows of the other tokens in rank order, of the first r of which some are known, and all `pivot_rows`."""
        rows = jnp.concatenate([pivots, self.input(tokens)], axis=1)
        return self.hidden(1, rows, self.pivots + known, cond, order)[:, self.pivots :]

    @typed
    def hidden(
        self, task: int, rows: Float[Array, "b r e"], known: Index, cond: Cond, order: Order
    ) -> Float[Array, "B n d"]:
        """Hidden row of every rank; of the first r ranks so many are known, the others' rows are never read."""
        images = len(cond.rows)
        slots = jnp.asarray(order.slot)
        slots = widen(slots, images // len(slots) if len(slots) > 1 else 1)
        buffer = jnp.broadcast_to(cond.rows, (images, self.buffer, cond.rows.shape[-1])).astype(rows.dtype)
        x = jnp.concatenate([buffer, widen(rows, images // len(rows))], axis=1)
        valid = jnp.arange(x.shape[1]) < self.buffer + known
        x = (x + self._positions(self.encoder_positions[task], slots)[:, : x.shape[1]]).astype(x.dtype)
        encoded = self.encoder(constrain(self.input_norm(x), BATCH), task, valid=valid[None])
        decoded = self.decoder_input(encoded)
        blank = jnp.asarray(self.mask_token)[task]
        blank = jnp.concatenate([jnp.zeros((len(slots), self.buffer, blank.shape[-1])), look_up(blank, slots)], axis=1)
        more = blank.shape[1] - x.shape[1]
        decoded, valid = jnp.pad(decoded, ((0, 0), (0, more), (0, 0))), jnp.pad(valid, (0, more))
        x = jnp.where(valid[:, None], decoded, blank.astype(decoded.dtype))
        x = (x + self._positions(self.decoder_positions[task], slots)).astype(x.dtype)
        h = self.decoder(constrain(x, BATCH), task)[:, self.buffer :]
        return (h + look_up(self.head_positions, slots)).astype(h.dtype)

    def _positions(self, table, slots):
        """Positions of the buffer and of all ranks, [#B p d]."""
        begin = jnp.broadcast_to(table[: self.buffer], (len(slots), self.buffer, table.shape[-1]))
        return jnp.concatenate([begin, look_up(table[self.buffer :], slots)], axis=1)

    def begin(self, setting: Setting, images: int) -> State:
        """Without room for any rank."""
        said = jnp.zeros((images, self.pivots, self.decoder.width), self.decoder.dtype)
        return State(self.spec.zeros(images)[:, :0], said)

    def grow(self, state: State, ranks: int, setting: Setting) -> State:
        return state.replace(tokens=jnp.pad(state.tokens, ((0, 0), (0, ranks - state.tokens.shape[1]), (0, 0))))

    def step(self, state: State, now: Step, setting: Setting) -> State:
        """Reveals the ranks of a step; there may be more than it has."""
        early = now.first < self.pivots if isinstance(now.first, int) else state.tokens.shape[1] <= self.pivots
        drawn, state = (self.draw_pivots if early else self.draw_others)(state, now, setting)
        ranks = now.first + jnp.arange(now.size)
        return state.replace(tokens=state.tokens.at[:, ranks].set(drawn, mode="drop"))

    def draw_pivots(self, state: State, now: Step, setting: Setting) -> tuple[Float[Array, "b m c"], State]:
        ways, ranks = len(setting.cond.rows) // len(now.keys), now.first + jnp.arange(now.size)
        h = self.hidden_pivots(state.tokens[:, : self.pivots], now.first, setting.cond, setting.order)
        h = jnp.take(h, ranks, axis=1, mode="clip")
        said = state.said.at[:, ranks].set(h[::ways], mode="drop")
        return self.head.sample(h, now.keys, setting.knobs, now.i), state.replace(said=said)

    def draw_others(self, state: State, now: Step, setting: Setting) -> tuple[Float[Array, "b m c"], State]:
        p, cond, order = self.pivots, setting.cond, setting.order
        known, tokens = now.first - p, state.tokens[:, p:]
        rows = self.pivot_rows(state.said, jnp.ones((1, p), bool), order)
        h = self.hidden_others(rows, tokens, known, cond, order)
        tokens = jnp.pad(tokens, ((0, 0), (0, h.shape[1] - tokens.shape[1]), (0, 0)))
        slot, ranks = jnp.asarray(order.slot)[:, p:] - p, jnp.arange(h.shape[1])
        drawn = self.joint_head.sample(h, tokens, ranks < known, slot, self.keys(now, h.shape[1]), setting.knobs, now.i)
        return jnp.take(drawn, known + jnp.arange(now.size), axis=1, mode="clip"), state

    @nn.nowrap
    def keys(self, now: Step, count: int) -> Key[Array, "b n"]:
        """Of all other tokens in a step, from the key of the first rank that it reveals."""
        return jax.vmap(lambda key: jax.vmap(lambda j: jax.random.fold_in(key, j))(jnp.arange(count)))(now.keys[:, 0])

    @nn.nowrap
    def calls(self, order: Order) -> dict[str, np.ndarray]:
        early = np.cumsum(order.sizes) <= self.pivots
        joint = ~early * len(self.joint_head.chain()[1])
        return {
            "generator": np.ones(len(early), int),
            "head": early * self.head.calls(len(early)),
            "joint head": joint,
        }
