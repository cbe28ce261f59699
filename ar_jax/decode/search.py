"""Search over the tokens drawn so far: several candidates of every image, of which a judge of their previews keeps the best.

All of it is one compiled program with one loop: the candidates of an image are rows of one batch, previews are decoded and judged
inside (`decode.glimpse`, `decode.judges`), and what is kept is gathered with its keys and values.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from ar_jax.decode.judges import ByClass
from ar_jax.decode.sequential import Account, Claim, Sequential, Task, check_cache, looked_at
from ar_jax.generators.base import Setting
from ar_jax.heads.categorical import gumbel
from ar_jax.nets.attention import Kept
from ar_jax.orders import Order, to_slots
from ar_jax.tokens import MOST
from ar_jax.typing import Array, Bool, Index, Int, Many, Params, Tokens, Within

Number = Annotated[int, Within(1, 4096)]


@struct.dataclass
class Found:
    """What a search kept, the best first.

    Attributes:
      tokens: [s b k n c] in slot order, after each of the stops.
      scores: float32 [s b k], their judge's; -inf where there were fewer.
      calls: by network, int32 [b]; "judge" counts images. Rows that only fill the batch are not counted.
    """

    tokens: Tokens
    scores: Array
    calls: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Search:
    """Beam search and lookahead: at every stop all candidates are judged by their previews, and the best are gone on with.

    It begins with one empty beam. To the next stop every beam is continued to `candidates`; of those of all beams together the
    `beams` best stay. What has been left behind competes no longer, so the best score may fall.

    Source: SoTo, "(1D) Ordered Tokens Enable Efficient Test-Time Search".
    """

    judge: Callable = ByClass()
    """Of previews (`decode.judges`)."""
    beams: Number = 5
    """How many are kept."""
    candidates: Number = 10
    """Of each beam."""
    stops: tuple[int, ...] = ()
    """Steps of the order after which candidates are judged, rising; () is by `every`. What is left after the last is drawn
    without a choice."""
    every: Many = 0
    """After every so many steps, and at the end; 0 is after 1, 2, 4, ... and at the end."""
    branch: Literal["whole", "last"] = "whole"
    """Candidates are drawn each by itself from stop to stop (whole), or share all but their last code, of which the likeliest
    under the same noise are taken, no two alike (last, as published; a fraction of the calls)."""
    spread: bool = False
    """The first stop has as many candidates as the others, not those of one beam."""
    ahead: Many = 0
    """Lookahead: candidates are judged with so many steps more, drawn greedily and then dropped; cut at the end."""
    ahead_stops: Many = 0
    """Only the first so many stops look ahead; 0 is all."""
    cache: Kept = "own"
    """See `Sequential`."""

    claim = Claim.APPROXIMATE  # of what the judge likes, by intent

    def __post_init__(self):
        check_cache(self.cache)
        if any(late <= early for early, late in zip((0, *self.stops), self.stops)):
            raise ValueError(f"decoder.stops is {self.stops}; they must rise, from 1 on")

    def weights(self) -> Params:
        """Parameters of the judge."""
        return self.judge.open()

    def __call__(self, task: Task) -> tuple[Tokens, Account]:
        """As `Sequential`: the best candidate of the last stop."""
        tokens, found = self.search(task)
        stops, begin = self.stops_of(task.order, task)
        ends = np.cumsum([0, *task.order.sizes])[sorted({begin, *stops, len(task.order.sizes)})]
        return tokens, Account(found.calls, jnp.broadcast_to(jnp.diff(ends), (task.images, len(ends) - 1)))

    def stops_of(self, order: Order, task: Task) -> tuple[tuple[int, ...], int]:
        """Steps of the order after which there is a choice, and the number of those that are known beforehand.

        Raises:
          ValueError: a stop beyond the last step.
        """
        begin = int((np.cumsum(order.sizes) <= (task.source.ranks if task.source else 0)).sum())
        steps = len(order.sizes) - begin
        stops = self.stops or (even(self.every, steps) if self.every else doubling(steps))
        if stops[-1] > steps:
            raise ValueError(f"decoder.stops is {stops}, but there are {steps} steps to draw")
        return tuple(begin + stop for stop in stops), begin

    def search(self, task: Task) -> tuple[Tokens, Found]:
        """The best tokens in slot order, and what was kept at every stop."""
        task = _ready(task, self)
        run = _Run(self, task)
        (stops, begin), b, k = self.stops_of(task.order, task), task.images, self.beams
        shape = (len(stops), b, k)
        state = run.start()
        tokens = jnp.zeros((*shape, task.order.n, state.tokens.shape[-1]), state.tokens.dtype)
        alive = jnp.broadcast_to((jnp.arange(k) == 0) | (self.spread and self.branch == "whole"), (b, k))
        calls = dict.fromkeys([*run.calls, "judge"], jnp.zeros(b, jnp.int32))
        carry = state, alive, calls, (tokens, jnp.zeros(shape))

        def body(j, carry, low, high):
            state, alive, calls, notes = carry
            state, scores, spent = run.chunk(j, low, high, state, alive)
            now = looked_at(run.beams, state, run.ends(high))[0].reshape(*shape[1:], *tokens.shape[3:])
            notes = tuple(note.at[j].set(new) for note, new in zip(notes, (now, scores)))
            alive = (scores > -jnp.inf).at[:, 0].set(True)
            return state, alive, jax.tree.map(jnp.add, calls, spent), notes

        ends = np.array([begin, *stops])
        if run.even:  # one loop, whatever the stops
            table = jnp.asarray(ends)
            carry = lax.fori_loop(0, len(stops), lambda j, carry: body(j, carry, table[j], table[j + 1]), carry)
        else:
            for j in range(len(stops)):
                carry = body(j, carry, int(ends[j]), int(ends[j + 1]))
        state, _, calls, notes = carry
        best = taken(state, jnp.arange(b) * k, b * k)
        if stops[-1] < len(task.order.sizes):
            end = len(task.order.sizes)
            best = run.draw(task, run.setting(task), best, stops[-1], end)
            calls |= {name: calls[name] + many for name, many in run.spent(stops[-1], end).items()}
        return to_slots(best.tokens, task.order), Found(*notes, calls)


@dataclasses.dataclass(frozen=True)
class BestOf:
    """Images drawn to the end, of which the judge chooses: `Search` with one stop."""

    candidates: Number = 16
    """Images drawn for every one that is kept."""
    judge: Callable = ByClass()
    """Of images (`decode.judges`)."""
    cache: Kept = "own"
    """See `Sequential`."""

    claim = Claim.APPROXIMATE

    def __post_init__(self):
        check_cache(self.cache)

    def weights(self) -> Params:
        """Parameters of the judge."""
        return self.judge.open()

    def __call__(self, task: Task) -> tuple[Tokens, Account]:
        """As `Sequential`."""
        return Search(self.judge, 1, self.candidates, every=len(task.order.sizes), cache=self.cache)(task)


def doubling(steps: int, count: int = 0, base: int = 2) -> tuple[int, ...]:
    """1, base, base^2, ... and the end, each once; at most the first `count` of them, 0 is all."""
    powers = [base**i for i in range(steps.bit_length() + 1) if base**i < steps] + [steps]
    return tuple(powers[: count or len(powers)])


def even(every: int, steps: int) -> tuple[int, ...]:
    """Every so many steps, and the end."""
    return (*range(every, steps, every), steps)


class _Run:
    """One search: its batches of b images, of b k beams and of b k c candidates."""

    def __init__(self, search: Search, task: Task):
        self.search, self.task, order = search, task, task.order
        k, c = search.beams, search.candidates
        self.even = len(set(order.rooms or order.sizes)) == 1
        self.firsts, self.rooms = np.cumsum(order.sizes) - order.sizes, order.rooms or order.sizes
        # the first candidate of all draws as `Sequential` does; a number above those of ranks tells the others apart
        numbers = jnp.arange(k * c)

        def keys_of(key):
            others = jax.vmap(lambda i: jax.random.fold_in(key, MOST + i))(numbers)
            return jnp.where(numbers == 0, key, others)

        keys = jax.vmap(keys_of)(task.keys)
        self.beams = self.repeated(k, keys[:, ::c])
        self.candidates = self.repeated(k * c, keys)
        self.calls = {name: np.cumsum([0, *count]) for name, count in task.generator.calls(order).items()}
        if search.branch == "last":
            self.check_last()

    def check_last(self):
        generator, order = self.task.generator, self.task.order
        if (
            not hasattr(generator, "rows")
            or set(order.sizes) != {1}
            or len(generator.spec.codes) != 1
            or generator.spec.grammar
        ):
            raise ValueError(
                f"decoder.branch is 'last', which takes causal generators that reveal one code a step, without a grammar; this "
                f"{type(generator).__name__} does not, use 'whole'"
            )

    def repeated(self, times: int, keys: Array) -> Task:
        """The task with so many neighbours for every image."""
        task, many = self.task, lambda x: jnp.repeat(jnp.asarray(x), times, axis=0)
        order = task.order if len(task.order.slot) == 1 else task.order.replace(slot=many(task.order.slot))
        return dataclasses.replace(
            task, batch=jax.tree.map(many, task.batch), order=order, keys=keys.reshape(-1),
            source=jax.tree.map(many, task.source),
        )  # fmt: skip

    def setting(self, task: Task) -> Setting:
        return task.setting(self.search.cache)

    def ends(self, steps: Index) -> Index:
        """Ranks that are known after so many steps."""
        ends = np.append(self.firsts, self.task.order.n)
        return jnp.asarray(ends)[steps]

    def spent(self, low: Index, high: Index) -> dict[str, Index]:
        """Calls of each network from one step to another."""
        tables = {name: jnp.asarray(table) for name, table in self.calls.items()}
        return {name: table[high] - table[low] for name, table in tables.items()}

    def start(self) -> Any:
        """The state of all beams before the first step, with room for all ranks."""
        task, setting = self.beams, self.setting(self.beams)
        return task.known(task.call(task.begin(setting), task.order.n, setting, method="grow"))

    def draw(self, task: Task, setting: Setting, state: Any, low: Index, high: Index) -> Any:
        """Takes the steps from `low` to `high`."""
        one = Sequential().stepper(task, setting)
        if self.even:
            firsts = jnp.asarray(self.firsts)
            return lax.fori_loop(low, high, lambda i, state: one(state, i, firsts[i], self.rooms[0]), state)
        for i in range(low, high):
            state = one(state, i, int(self.firsts[i]), self.rooms[i])
        return state

    def chunk(self, j: Index, low: Index, high: Index, state: Any, alive: Bool[Array, "b k"]):
        """From one stop to the next: the beams kept, their scores [b k], and what it took."""
        search, b = self.search, self.task.images
        k, c, q = search.beams, search.candidates, search.beams * search.candidates
        count, parent = alive.sum(1), jnp.broadcast_to(jnp.arange(q) // c, (b, q))
        if search.branch == "last":
            setting = self.setting(self.beams)
            state = self.draw(self.beams, setting, state, low, high - 1)
            token, valid, state, begun = self.branch(j, high - 1, state, setting)
            parent, count = jnp.where(begun, 0, parent), jnp.where(begun, 1, count)
            wide = state if search.ahead or not hasattr(state, "cache") else state.replace(cache=None)
            wide = _with(taken(wide, _flat(parent, k), b * k), token.reshape(b * q, 1), high - 1)
            valid &= jnp.take_along_axis(alive, parent, axis=1)
            many = valid.sum(1)
        else:
            wide = taken(state, jnp.repeat(jnp.arange(b * k), c), b * k)
            wide = self.draw(self.candidates, self.setting(self.candidates), wide, low, high)
            valid = jnp.repeat(alive, c, axis=1)
            many = count = valid.sum(1)
        shown, until = wide, high
        if search.ahead:
            limit = search.ahead_stops or len(self.firsts)
            until = jnp.where(j < limit, jnp.minimum(high + search.ahead, len(self.firsts)), high)
            until = until if self.even else int(np.where(j < limit, min(high + search.ahead, len(self.firsts)), high))
            setting = self.setting(self.candidates)
            greedy = setting.knobs.replace(temperature=jnp.zeros_like(jnp.asarray(setting.knobs.temperature)))
            shown = self.draw(self.candidates, setting.replace(knobs=greedy), wide, high, until)
        tokens, known = looked_at(self.candidates, shown, self.ends(until))
        images = self.task.look(tokens, known)
        scores = search.judge(self.task.extra, images.reshape(b, q, *images.shape[1:]), self.task.batch)
        scores = jnp.where(valid & ~jnp.isnan(scores), scores.astype(jnp.float32), -jnp.inf)
        scores, chosen = lax.top_k(scores, k)
        if search.branch == "last":  # of all candidates only their last codes differ from their beams
            state = taken(state, _flat(jnp.take_along_axis(parent, chosen, axis=1), k), b * k)
            state = _with(state, jnp.take_along_axis(token, chosen, axis=1).reshape(b * k, 1), high - 1)
        else:
            state = taken(wide, _flat(chosen, q), b * q)
        both = zip(self.spent(low, high).items(), self.spent(high, until).values())
        spent = {name: (count * drawn + many * further).astype(jnp.int32) for (name, drawn), further in both}
        return self.beams.known(state), scores, spent | {"judge": many.astype(jnp.int32)}

    def branch(self, j: Index, i: Index, state: Any, setting: Setting):
        """Different codes of one rank: [b q], which of them can be, the state with its row; and whether all are of one beam."""
        search, task, b = self.search, self.beams, self.task.images
        k, c, q = search.beams, search.candidates, search.beams * search.candidates
        h, cache = task.call(state, i, 1, setting, method="rows")

        def logits_of(self, h):
            return self.head.filtered(h, task.images, setting.knobs, i)

        logits = task.call(h, method=logits_of)[:, 0]
        noise = jax.vmap(lambda key: gumbel(jax.random.fold_in(key, i), logits.shape[1:]))(task.keys)
        noisy = logits + jnp.where(jnp.asarray(setting.knobs.temperature)[i] > 0, noise, 0)
        most = min(q if search.spread else c, logits.shape[-1])
        score, token = lax.top_k(noisy.reshape(b, k, -1), most)
        pad = ((0, 0), (0, 0), (0, (q if search.spread else c) - most))
        score, token = jnp.pad(score, pad, constant_values=-jnp.inf), jnp.pad(token, pad)
        begun = jnp.asarray((j == 0) & search.spread)
        each = [x[:, :, :c].reshape(b, q) for x in (score, token)]
        if search.spread:
            each = [jnp.where(begun, x[:, 0], y) for x, y in zip((score, token), each)]
        return each[1].astype(jnp.int32), each[0] > -jnp.inf, state.replace(cache=cache), begun


def _ready(task: Task, search: Search) -> Task:
    if task.look is None:
        raise ValueError(
            "decoder Search judges images, but whoever draws here makes none; use sample.py or ar_jax.evaluate"
        )
    if task.knobs.soften is not None:
        raise ValueError("soft draws mixtures of codes, of which there is nothing to choose; give it or decoder Search")
    return task if task.extra is not None else dataclasses.replace(task, extra=search.weights())


def _flat(index: Int[Array, "b q"], each: int) -> Int[Array, "r"]:
    """Places in a batch of so many neighbours for every image."""
    return (index + each * jnp.arange(len(index))[:, None]).reshape(-1)


def _with(state: Any, token: Int[Array, "r 1"], rank: Index) -> Any:
    return state.replace(
        tokens=jnp.where((jnp.arange(state.tokens.shape[1]) == rank)[:, None], token[:, None], state.tokens)
    )


def taken(state: Any, index: Int[Array, "r"], images: int) -> Any:
    """A state of some images of another, in any order and as often as wished; keys and values [... B h r e] with guided rows."""
    cache = getattr(state, "cache", None)
    rest = state if cache is None else state.replace(cache=None)
    rest = jax.tree.map(lambda x: x[index], rest)
    if cache is None:
        return rest

    def rows(x):
        axis = x.ndim - 4
        ways = x.shape[axis] // images
        return jnp.take(x, (index[:, None] * ways + jnp.arange(ways)).reshape(-1), axis=axis)

    return rest.replace(cache=jax.tree.map(rows, cache))
