"""DQ-Transformer: codes of two densities (`DQVAE`) as one sequence, where every item's place is drawn before its code.

The sequence of an image is its start, the coarse cells that have a code, an end, perhaps the start again, the fine places that
have one, an end. What follows is padding.
"""

import dataclasses
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ar_jax.data import Info
from ar_jax.decode.logits import top_k
from ar_jax.generators.base import Conditioning, Frozen, Generator, Setting, State, Step, image_weight
from ar_jax.heads.categorical import draw
from ar_jax.nets.attention import Rows
from ar_jax.nets.conditioning import Cond, Label, fold, widen
from ar_jax.nets.linear import Linear, look_up
from ar_jax.nets.vit import Successive
from ar_jax.orders import Order
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Batch, Bool, Float, Index, Int, Many, Metrics, PRNGKey, Within, typed

COARSE, FILLING, STARTING, FINE, ENDED = range(5)  # what the next item of a sequence is
normal = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Items:
    """An item a step, as many as the fine grid has places, and `extra` ends and starts; nothing is left for the last step.

    Attributes:
      extra: 2 for the two ends, 1 where the start stands again, and what the coarse part is filled up to, less one.
    """

    extra: Annotated[int, Within(2, 2**20)] = 3

    def __call__(self, spec: TokenSpec, keys: Any = None, images: int = 1, train_step: Index = 0) -> Order:
        cells, places = grids(spec)
        steps = places + self.extra
        if steps > cells + places:
            raise ValueError(
                f"order.extra is {self.extra}, but {cells} cells and {places} places leave {cells} ranks for it at most"
            )
        slot = np.arange(spec.n, dtype=np.int32)[None]
        left = spec.n - steps
        return Order(slot, (1,) * steps + ((left,) if left else ()))


def grids(spec: TokenSpec) -> tuple[int, int]:
    """How many coarse cells and fine places there are.

    Raises:
      ValueError: the tokens are not those of `DQVAE`.
    """
    scales = spec.scales
    if len(scales) != 2 or scales[1] != (2 * scales[0][0], 2 * scales[0][1]) or len(spec.codes) != 1:
        raise ValueError(
            f"DQTransformer needs one code a token on a coarse grid and one twice as fine, but the tokenizer has grids "
            f"{scales} with codes {spec.codes}"
        )
    return tuple(height * width for height, width in scales)


class StartClass(Label):
    """What stands at the start: rows [b 3 d] of the class as a content, as a coarse place and as a fine place.

    Attributes: see `Label`; without a class the rows are zeros.
    """

    no_decay = ("content", "coarse", "fine")

    @nn.compact
    @typed
    def __call__(self, batch: Batch, drop: Bool[Array, "b"]) -> Cond:
        """As `Label`."""
        if self.apart:
            raise ValueError("conditioning.apart is True, but StartClass has no row for 'no class'; give False")
        names, shape = ("content", "coarse", "fine"), (self.classes, self.width)
        std = nn.initializers.normal(self.std)
        rows = [look_up(self.param(name, std, shape), batch["label"]) for name in names]
        none = drop | (jnp.asarray(batch["label"]) >= self.classes)
        return Cond(jnp.where(none[:, None, None], 0, jnp.stack(rows, axis=1)))


class Sequence(NamedTuple):
    """Items of images.

    Attributes:
      content: codes; then pad, end, start.
      place: cells or fine places; then pad, end, start of their grid.
      fine: of the fine part.
    """

    content: Int[Array, "b t"]
    place: Int[Array, "b t"]
    fine: Bool[Array, "b t"]


@struct.dataclass
class Progress(State):
    """A sequence that is being drawn.

    Attributes:
      item: the last one, [b 1].
      phase: what the next one is, int32 [b].
      tokens, cache: as in `State`, but tokens are in slot order, those that are not drawn are the code that stands for none.
    """

    item: Any = None
    phase: Any = None


class DQTransformer(Generator):
    """Two networks one upon the other: the first predicts where the next item lies, the second, told that, its code.

    Attributes:
      places, contents: the networks, of equal width.
      conditioning: what the sequence starts with (`StartClass`).
      again: the start stands before the fine part too.
      regions: fine items cell by cell, in place of row by row.
      room: items of the coarse part, its end among them, that it is filled up to with padding. In the published batches it is
        as long as the longest; 0 is none, so that an image does not depend on its neighbours.
      rows: of the table of positions in the sequence; 0 is as many as are fed.
      given: in sampling, the fine part takes all places that have no code yet in order; else they are drawn too.
      top_places: places are drawn from so many likeliest; 0 is all.
      spec: the tokens; None until the tokenizer is known (`complete`).
    Source: DQ-VAE (arXiv:2305.11718).
    """

    places: Successive
    contents: Successive
    conditioning: Conditioning
    again: bool = True
    regions: bool = False
    room: Many = 0
    rows: Many = 0
    given: bool = True
    top_places: Many = 100
    spec: TokenSpec | None = None

    editable = False
    no_decay = ("content", "coarse", "fine", "segment", "order")
    adjustable = ("given", "top_places")

    def complete(self, spec: TokenSpec, info: Info) -> "DQTransformer":
        widths = {"contents": self.contents.width, "conditioning": self.conditioning.width}
        for name, width in widths.items():
            if width != self.places.width:
                raise ValueError(f"generator.{name}.width is {width}; it must be {self.places.width}, that of places")
        if self.room > grids(spec)[0] + 1:
            raise ValueError(
                f"generator.room is {self.room}, but the coarse part has at most {grids(spec)[0] + 1} items; give as many"
            )
        done = super().complete(spec, info)
        if self.rows and self.rows < done.length - 1:
            raise ValueError(f"generator.rows is {self.rows}, but sequences have {done.length - 1}; give as many, or 0")
        return done

    @nn.nowrap
    def calls(self, order: Order) -> dict[str, np.ndarray]:
        return {"generator": np.array([size == 1 for size in order.sizes], int)}

    @property
    def dtype(self) -> Any:
        return self.contents.dtype

    @property
    def codes(self) -> int:
        """Codes of the codebook; the tokens have one more, which stands for none."""
        return self.spec.codes[0] - 1

    @property
    def length(self) -> int:
        """Items of the longest sequence, the start among them: that of an image without coarse codes."""
        return 1 + max(1, self.room) + self.again + grids(self.spec)[1] + 1

    @property
    def fine_order(self) -> Int[np.ndarray, "f"]:
        """Fine places in the order of the sequence."""
        height, width = self.spec.scales[1]
        row, column = np.divmod(np.arange(height * width), width)
        inner = (row % 2, column % 2) if self.regions else (column,)
        outer = (row // 2, column // 2) if self.regions else (row,)
        return np.lexsort((*outer, *inner)[::-1]).astype(np.int32)

    def by_layer(self) -> "DQTransformer":
        return self.clone(places=self.places.by_layer(), contents=self.contents.by_layer())

    def slices(self, path: tuple[str, ...], leaf: Array) -> dict[tuple[str, ...], Array]:
        part = self.parts().get(path[0])
        return part.slices(path, leaf) if part is not None else {path: leaf}

    def setup(self):
        (cells, places), width, classes = grids(self.spec), self.places.width, self.conditioning.classes
        self.content = self.param("content", normal, (self.codes + 2, width))
        self.coarse = self.param("coarse", normal, (cells + 2, width))
        self.fine = self.param("fine", normal, (places + 2, width))
        self.segment = self.param("segment", normal, (2, width))
        self.order = self.param("order", nn.initializers.zeros, (self.rows or self.length - 1, width))

        def readout(entries):
            return Linear(entries, self.dtype, jnp.float32, normal)

        # use_fast_variance loses digits where the mean is large against the spread
        norm = {"epsilon": 1e-5, "dtype": self.dtype, "use_fast_variance": False}
        self.place_norm, self.content_norm = nn.LayerNorm(**norm), nn.LayerNorm(**norm)
        self.place_readout = readout(places + 2 + classes)
        self.content_readout = readout(self.codes + 2 + classes)

    # Sequences

    @nn.nowrap
    def sequence(self, tokens: Int[Array, "b n 1"]) -> Sequence:
        """The items of images."""
        cells, _ = grids(self.spec)
        tokens, none, at = tokens[..., 0], self.codes, jnp.arange(self.length)
        coarse, fine = tokens[:, :cells], tokens[:, cells:][:, self.fine_order]
        cell, own = _packed(coarse, jnp.arange(cells), none)
        place, more = _packed(fine, jnp.asarray(self.fine_order), none)
        whole = jnp.maximum((own.shape[1] - (own == none).sum(1)) + 1, self.room)[:, None]  # of the coarse part
        in_coarse, in_fine = at - 1, at - 1 - whole - self.again
        first = self.part(cell, own, jnp.broadcast_to(in_coarse, (len(tokens), self.length)), cells)
        second = self.part(place, more, in_fine, grids(self.spec)[1])
        later = at > whole
        return Sequence(*(jnp.where(later, b, a) for a, b in zip(first, second)), later)

    @nn.nowrap
    def part(self, place: Array, content: Array, at: Array, entries: int) -> tuple[Array, Array]:
        """Contents and places of the items `at` of a part, whose items -1 are its start."""
        count = (content != self.codes).sum(1, keepdims=True)
        inside = jnp.clip(at, 0, content.shape[1] - 1)
        kind = jnp.where(at < 0, 2, jnp.where(at == count, 1, 0))  # start, end, pad
        item = (at >= 0) & (at < count)

        def found(values, first):
            return jnp.where(item, jnp.take_along_axis(values, inside, axis=1), first + kind)

        return found(content, self.codes), found(place, entries)

    @nn.nowrap
    def restored(self, items: Sequence) -> Int[Array, "b n 1"]:
        """The tokens of sequences; the inverse of `sequence`."""
        cells, places = grids(self.spec)
        real = items.content < self.codes
        slot = jnp.where(real, items.place + jnp.where(items.fine, cells, 0), cells + places)
        empty = jnp.full((len(slot), self.spec.n + 1), self.codes, jnp.int32)
        filled = jax.vmap(lambda empty, slot, content: empty.at[slot].set(content))(empty, slot, items.content)
        return filled[:, :-1, None]

    # The networks

    def embed(self, items: Sequence, cond: Cond, first: Index) -> Float[Array, "B q d"]:
        """Rows of the first network for items from number `first` on."""
        ways = len(cond.rows) // len(items.place)
        content = _rows(self.content, items.content, self.codes)
        start = items.content == self.codes + 2
        content = jnp.where(widen(start, ways)[..., None], cond.rows[:, :1], widen(content, ways))
        order = jax.lax.dynamic_slice_in_dim(self.order, first, items.place.shape[1])
        segment = look_up(self.segment, items.fine.astype(jnp.int32))
        return content + self.embed_place(items, cond) + order + widen(segment, ways)

    def embed_place(self, items: Sequence, cond: Cond) -> Float[Array, "B q d"]:
        """Vectors of the items' places."""
        (cells, places), ways = grids(self.spec), len(cond.rows) // len(items.place)

        def of(table, entries, row):
            place = widen(_rows(table, items.place, entries), ways)
            return jnp.where(widen(items.place == entries + 2, ways)[..., None], row, place)

        coarse, fine = of(self.coarse, cells, cond.rows[:, 1:2]), of(self.fine, places, cond.rows[:, 2:])
        return jnp.where(widen(items.fine, ways)[..., None], fine, coarse)

    def place_logits(self, h: Float[Array, "B q d"]) -> Float[Array, "B q v"]:
        return self.place_readout(self.place_norm(h))

    def content_logits(self, h: Float[Array, "B q d"]) -> Float[Array, "B q v"]:
        return self.content_readout(self.content_norm(h))

    def forced(self, items: Sequence, cond: Cond) -> tuple[Float[Array, "B q v"], Float[Array, "B q w"]]:
        """Logits of places and contents of all items but the start, float32."""
        before, after = Sequence(*(x[:, :-1] for x in items)), Sequence(*(x[:, 1:] for x in items))
        rows = Rows(np.arange(self.length - 1, dtype=np.int32))
        h, _ = self.places(self.embed(before, cond, 0), rows)
        g, _ = self.contents(h + self.embed_place(after, cond).astype(h.dtype), rows)
        return self.place_logits(h), self.content_logits(g)

    @typed
    def loss(
        self, tokens: Int[Array, "b n 1"], batch: Batch, order: Order, *, drop: Bool[Array, "b"],
        key: PRNGKey | None = None, tokenizer: Frozen | None = None,
    ) -> tuple[Float[Array, "b m"], Float[Array, "b m"], Metrics]:  # fmt: skip
        """Teacher forcing.

        Args:
          tokens: in slot order.
          batch: the condition, and optionally "valid" [b], the weight of each image (default 1).
          order, key, tokenizer: unused.
          drop: images trained without their condition.

        Returns:
          Loss and weight of every item after the start. The mean is the contents' mean and half of each mean of coarse and
          fine places. And metrics.
        """
        items, cond = self.sequence(tokens), self.condition(batch, drop)
        content, coarse, fine, weight, later = self.errors(items, batch, drop, *self.forced(items, cond))
        total = weight.sum()

        def scaled(x, part):
            return 0.5 * x * total / jnp.maximum((weight * part).sum(), 1e-9)

        def mean(x, part):
            return (x * weight * part).sum() / jnp.maximum((weight * part).sum(), 1e-9)

        loss = content + jnp.where(later, scaled(fine, later), scaled(coarse, ~later))
        figures = {
            "perplexity": jnp.exp(mean(content, 1.0)),
            "coarse_places": mean(coarse, ~later),
            "fine_places": mean(fine, later),
        }
        return loss, weight, figures

    def errors(self, items: Sequence, batch: Batch, drop: Array, places: Array, contents: Array) -> tuple[Array, ...]:
        """Cross entropies of contents, coarse and fine places [b m] (zeros where there is none), weights, and where it is fine."""
        after = Sequence(*(x[:, 1:] for x in items))
        pad = after.content == self.codes
        start = after.content == self.codes + 2
        label = jnp.where(start, jnp.minimum(jnp.asarray(batch["label"]), self.conditioning.classes - 1)[:, None], 0)
        of_content = cross_entropy(contents, after.content + label)
        of_place = cross_entropy(places, after.place + label)
        weight = image_weight(batch, len(pad))[:, None] * ~pad * ~(start & drop[:, None])
        return of_content, of_place * ~after.fine, of_place * after.fine, weight, after.fine

    # Sampling

    def begin(self, setting: Setting, images: int) -> Progress:
        order, more = setting.order, self.length - 1
        if (steps := sum(size == 1 for size in order.sizes)) < more:
            extra = more - grids(self.spec)[1]
            raise ValueError(f"the order draws {steps} items, but sequences have {more}; give order Items({extra})")
        rows = len(setting.cond.rows)
        cache = tuple(net.empty_cache(rows, setting.kept) for net in (self.places, self.contents))
        every = jnp.zeros((images, 1), jnp.int32)
        start = Sequence(every + self.codes + 2, every + grids(self.spec)[0] + 2, every > 0)
        return Progress(self.spec.zeros(images) + self.codes, _Both(*cache), item=start, phase=every[:, 0] + COARSE)

    def grow(self, state: Progress, ranks: int, setting: Setting) -> Progress:
        fed = min(ranks, self.length - 1)
        return state.replace(cache=_Both(*(cache.grow(max(fed, cache.rows)) for cache in state.cache)))

    def step(self, state: Progress, now: Step, setting: Setting) -> Progress:
        """Draws the place of the next item, then its code."""
        if now.size != 1:
            return state
        cond, (cells, places) = setting.cond, grids(self.spec)
        tokens, phase, caches = state.tokens[..., 0], state.phase, state.cache
        first = jnp.asarray(now.first, jnp.int32)
        rows = Rows(first[None], None, now.first, jnp.arange(caches.rows, dtype=jnp.int32))
        keys = [jax.vmap(lambda key, k=k: jax.random.fold_in(key, k))(now.keys[:, 0])[:, None] for k in (0, 1)]

        h, first_cache = self.places(self.embed(state.item, cond, now.first), rows, cache=caches.places)
        free, allowed = self.allowed(tokens, phase)
        place = self.drawn(self.place_logits(h), keys[0], allowed, setting, now.i, self.top_places)
        if self.given:
            order = jnp.asarray(self.fine_order)
            following = jnp.where(free.any(1), order[free[:, order].argmax(1)], places + 1)
            place = jnp.where(phase == FINE, following, place)
        later, drawing = phase >= STARTING, (phase == COARSE) | (phase == FINE)
        entries = jnp.where(later, places, cells)
        real = drawing & (place != entries + 1)
        kind = jnp.where(phase == STARTING, 2, jnp.where(drawing, 1, 0))  # of what is no code: start, end, pad
        place = jnp.where(real, place, entries + kind)

        # what stands for the content is not looked at, but for a start
        item = Sequence((self.codes + kind)[:, None], place[:, None], later[:, None])
        g, second_cache = self.contents(h + self.embed_place(item, cond).astype(h.dtype), rows, cache=caches.contents)
        logits = self.content_logits(g)
        code = self.drawn(logits, keys[1], jnp.arange(logits.shape[-1])[None] < self.codes, setting, now.i)
        content = jnp.where(real, code, self.codes + kind)
        slot = jnp.where(later, cells, 0) + place
        here = real[:, None] & (jnp.arange(self.spec.n) == slot[:, None])
        return Progress(
            jnp.where(here, content[:, None], tokens)[..., None],
            _Both(first_cache, second_cache),
            item=item._replace(content=content[:, None]),
            phase=self.following(phase, real, first + 1),
        )

    def drawn(
        self, logits: Float[Array, "B 1 v"], keys: Array, allowed: Bool[Array, "#b v"], setting: Setting, i: Index,
        most: int | None = None,
    ) -> Int[Array, "b"]:  # fmt: skip
        """One of the allowed entries for each image, of the `most` likeliest, or by the filter of the knobs."""
        temperature = jnp.asarray(setting.knobs.temperature)[i]
        logits = fold(logits, len(logits) // len(keys), jnp.asarray(setting.knobs.guidance)[i])
        logits = jnp.where(allowed[:, None], logits / jnp.where(temperature > 0, temperature, 1), -jnp.inf)
        return draw(setting.knobs.filter(logits) if most is None else top_k(logits, most), keys, temperature)[:, 0]

    def following(self, phase: Int[Array, "b"], real: Bool[Array, "b"], items: Index) -> Int[Array, "b"]:
        """What comes after so many items behind the start, of which the last was a code or not."""
        then = jnp.where(items < self.room, FILLING, STARTING if self.again else FINE)
        after = jnp.select([(phase == COARSE) | (phase == FILLING), phase == STARTING], [then, FINE], ENDED)
        return jnp.where(real, phase, after).astype(jnp.int32)

    def allowed(
        self, tokens: Int[Array, "b n"], phase: Int[Array, "b"]
    ) -> tuple[Bool[Array, "b f"], Bool[Array, "b v"]]:
        """Fine places without a code, in cells without one; and the places that the next item may have.

        A cell or place is taken once, and the fine part ends when, and only when, none is left.
        """
        cells, places = grids(self.spec)
        (height, width), classes = self.spec.scales[0], self.conditioning.classes
        unused = tokens == self.codes
        cell = unused[:, :cells].reshape(-1, height, width).repeat(2, axis=1).repeat(2, axis=2).reshape(-1, places)
        free = unused[:, cells:] & cell

        def padded(*parts):
            row = jnp.concatenate(parts, axis=1)
            return jnp.pad(row, ((0, 0), (0, places + 2 + classes - row.shape[1])))

        no = jnp.zeros((len(tokens), 1), bool)
        coarse = padded(unused[:, :cells], no, ~no)
        fine = padded(free, no, ~free.any(1, keepdims=True))
        return free, jnp.where((phase == FINE)[:, None], fine, coarse)


class _Both(NamedTuple):
    """Caches of both networks."""

    places: Any
    contents: Any

    @property
    def rows(self) -> int:
        return self.places.rows


def cross_entropy(logits: Float[Array, "b m v"], target: Int[Array, "b m"]) -> Float[Array, "b m"]:
    """In nats."""
    chosen = jnp.where(jnp.arange(logits.shape[-1]) == target[..., None], logits, 0).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def _packed(tokens, places, none):
    """Places and codes of the tokens that are one, in their order, the others behind them."""
    order = jnp.argsort(tokens == none, axis=1, stable=True)
    return places[order], jnp.take_along_axis(tokens, order, axis=1)


def _rows(table, index, pad):
    """Rows of a table; that of the padding has no gradient, and beyond the table is its last."""
    rows = look_up(table, jnp.minimum(index, len(table) - 1))
    return jnp.where((index == pad)[..., None], jax.lax.stop_gradient(rows), rows)
