"""Drawings that can be watched: the tokens of a model in pieces, with a picture after each.

What a slider turns goes into programs as an array: guidance and temperature of every step, the numbers of a filter, the
seed, the condition, the given image. So these compile nothing; what else there is to set makes programs of its own.
"""

import contextlib
import copy
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.decode.edit import hold
from ar_jax.decode.glimpse import glimpse
from ar_jax.decode.sampling import Sampling, decoding_keys, looking
from ar_jax.decode.sequential import Sequential, Task, looked_at, softened
from ar_jax.files.images import to_uint8
from ar_jax.files.models import blamed, image_shape
from ar_jax.generators.base import Knobs
from ar_jax.machine.flops import with_fields
from ar_jax.machine.precision import multiply_in
from ar_jax.options import Sampler
from ar_jax.sampler import Given, arranged, by_token, condition_table, image_keys, known_beforehand, open_drawer
from ar_jax.tokenizers.conditioned import said_of

GLIMPSES = 16  # pictures of a drawing in the making, about
MOST = 64  # images at a time
KEPT = 256  # programs; every hole is an order of its own for generators that take any


class Request(NamedTuple):
    """What is to be drawn.

    Attributes:
      sampling: how, with the changed fields of the model.
      labels: classes by name or number, used in turn; () is all of them.
      captions: for models that take them.
      count: number of images, 1 to `MOST`.
      seed: 0 to 2^64 - 1.
      given: a part of an image that is kept, or None.
    """

    sampling: Sampling
    labels: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    count: int = 4
    seed: int = 0
    given: Given | None = None


class Stage(NamedTuple):
    """What there is to tell of a drawing in the making.

    Attributes:
      note: one line: what is compiled, how much is drawn; in the end calls and seconds.
      images: uint8 [count h w 3] as far as they are known, or None as long as there are none.
      names: the condition of each image.
      done: this is the end.
    """

    note: str
    images: np.ndarray | None = None
    names: tuple[str, ...] = ()
    done: bool = False


@dataclasses.dataclass
class Clock:
    """Seconds spent on drawing tokens and on compiling."""

    draw: float = 0.0
    compile: float = 0.0

    @contextlib.contextmanager
    def running(self, on: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        setattr(self, on, getattr(self, on) + time.perf_counter() - began)


Told = tuple[str, np.ndarray | None, bool]  # note, images, whether this is the end


class Easel:
    """A model on one device, ready to draw, one drawing at a time.

    Attributes:
      drawer: the model (see `sampler.Drawer`); its options say with which numerics.
      shape: height, width and channels of its images.
      compiled: number of programs that were compiled so far.
    Raises:
      ValueError: no such model.
    """

    def __init__(self, run: str, options: Sampler):
        self.drawer = open_drawer(run, options)
        self.shape = image_shape(self.drawer.decoder)
        self.compiled = 0
        self._programs, self._params, self._turn = {}, {}, threading.Lock()
        self._conditions = functools.lru_cache(16)(self._conditions)

    def draw(self, request: Request) -> Iterator[Stage]:
        """Draws, and tells how it goes.

        Raises:
          ValueError: a request that this model cannot fulfil.
        """
        if not 1 <= request.count <= MOST:
            raise ValueError(f"count is {request.count}; it must be 1 to {MOST}")
        if not 0 <= request.seed < 2**64:
            raise ValueError(f"seed is {request.seed}; it must be 0 to 2^64 - 1")
        if request.given is not None and not (request.given.free.any() or request.given.scales):
            raise ValueError("all of the image is kept, so nothing is left to draw; paint a hole")
        names, table = self._conditions(request.labels, request.captions)
        if not self._turn.acquire(blocking=False):
            yield Stage("waiting for another drawing")
            self._turn.acquire()
        try:
            with blamed(self.drawer.model, self.drawer.tokenizer):
                work = Work(self, request.sampling, _roundly(request.count), request.given)
            shown = np.arange(request.count) % len(names)
            ids = np.resize(shown, work.images)
            batch = {name: rows[ids] for name, rows in table.items()}
            names = tuple(names[i] for i in shown)
            for note, images, done in work.run(batch, request.seed):
                if images is not None:
                    images = images[: request.count]
                    images = np.broadcast_to(images, (*images.shape[:3], 3))
                yield Stage(note, images, names, done)
        finally:
            self._turn.release()

    def program(self, key: tuple, function: Callable, arguments: tuple, clock: Clock, donate: tuple[int, ...] = ()):
        """The compiled program of a key; says so, with `yield`, before it compiles."""
        if key not in self._programs:
            yield f"compiling program {self.compiled + 1}", None, False
            with clock.running("compile"), multiply_in(self.drawer.options.precision):
                with blamed(self.drawer.model, self.drawer.tokenizer):
                    lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
                self._programs[key] = lowered.compile()
                self.compiled += 1
                if len(self._programs) > KEPT:
                    del self._programs[next(iter(self._programs))]
        return self._programs[key]

    @functools.cached_property
    def frozen(self) -> Any:
        """Parameters of the tokenizer."""
        return self.drawer.tokenizer.params(average=self.drawer.options.average)

    def params(self, unrolled: bool) -> Any:
        """Parameters of the generator."""
        if unrolled not in self._params:
            options = self.drawer.options
            dtype = jnp.dtype(options.dtype).type
            self._params[unrolled] = self.drawer.model.params(dtype, options.average, None, unrolled)
        return self._params[unrolled]

    def _conditions(self, labels, captions):
        options = dataclasses.replace(self.drawer.options, captions=captions, features="")
        return condition_table(self.drawer.model.info, options, labels)


class Work:
    """One drawing; its programs are kept by the easel."""

    def __init__(self, easel: Easel, sampling: Sampling, images: int, given: Given | None):
        drawer, options = easel.drawer, easel.drawer.options
        parts = drawer.model.module, drawer.tokenizer.module, drawer.model.order
        generator, self.tokenizer, self.order_fn = sampling.adapted(*parts)
        generator = with_fields(generator, dtype=jnp.dtype(options.dtype).type)
        unroll = by_token(generator, self.order_fn) if options.unroll is None else options.unroll
        self.generator = generator.by_layer() if unroll else generator
        self.easel, self.sampling, self.images, self.given = easel, sampling, images, given
        self.params, self.frozen = easel.params(unroll), easel.frozen
        self.shown = self.tokenizer
        if options.pixels != "own":
            self.shown = with_fields(self.tokenizer, dtype=jnp.dtype(options.pixels).type)
        self.known, self.scales = known_beforehand(generator, given), given.scales if given else 0
        self.order = jax.eval_shape(self._order, {"seed": np.zeros(2, np.uint32), "pixels": self._pixels()})[0]
        what = repr((_fixed(sampling.filter), sampling.decoder, sampling.soft, sampling.fields))
        self.key = what, images, given and (self.scales, self.known.tobytes())

    def run(self, batch: dict[str, np.ndarray], seed: int) -> Iterator[Told]:
        clock, decoder = Clock(), self.sampling.decoder
        inputs = self._inputs(batch, seed)
        draw = self._in_pieces if isinstance(decoder, Sequential) else self._at_once
        tokens, known, kept, calls = yield from draw(inputs, clock)
        images, finite = yield from self._show(inputs, kept, tokens, known, clock)
        if not finite.all():
            raise ValueError("the images hold NaN or infinity; are the weights damaged, or the settings too extreme?")
        said = ", ".join(f"{count:.4g} of the {name}" for name, count in calls.items())
        compiled = f"; compiled in {clock.compile:.1f} s before" * bool(clock.compile)
        yield f"calls an image: {said}; {clock.draw:.2f} s for {self.images} at a time{compiled}", images, True

    def _in_pieces(self, inputs, clock):
        order, arguments = self.order, (self.params, self.frozen, inputs)
        begin = yield from self._program("begin", self._begin, arguments, clock)
        state, kept = begin(*arguments)
        done, piece, known = int(self.known.sum()), self._piece(), None
        for i, stretch in enumerate(self.sampling.decoder.stretches(order, state, done)):
            given = *arguments, kept, state
            enter = yield from self._program(f"enter {i}", functools.partial(self._enter, stretch), given, clock)
            state, count = enter(*given), len(stretch.steps)
            for first in range(0, count, piece):
                stop = min(first + piece, count)
                given = *arguments, kept, state, np.array([first, stop], np.int32)
                take = functools.partial(self._take, stretch)
                take = yield from self._program(f"take {i}", take, given, clock, donate=(4,))
                with clock.running("draw"):
                    state, tokens, known = jax.block_until_ready(take(*given))
                at = int(stretch.steps[stop - 1]) + 1
                if at < len(order.sizes):
                    images, _ = yield from self._show(inputs, kept, tokens, known, clock)
                    yield f"step {at} of {len(order.sizes)}", images, False
        left = np.cumsum(order.sizes) > done
        calls = {name: count[left].sum() for name, count in self.generator.calls(order).items()}
        return tokens, known, kept, calls

    def _at_once(self, inputs, clock):
        arguments = self.params, self.frozen, inputs
        whole = yield from self._program("whole", self._whole, arguments, clock)
        yield "drawing", None, False
        with clock.running("draw"):
            tokens, kept, calls = jax.block_until_ready(whole(*arguments))
        known = np.ones((self.images, self.generator.spec.n), bool)
        return tokens, known, kept, {name: float(np.mean(count)) for name, count in calls.items()}

    def _show(self, inputs, kept, tokens, known, clock):
        """Images uint8 [b h w c], and which of them are finite."""
        arguments = self.frozen, inputs, kept, tokens, known
        show = yield from self._program("show", self._picture, arguments, clock)
        return [np.asarray(part) for part in show(*arguments)]

    def _program(self, name, function, arguments, clock, donate=()):
        return self.easel.program((name, *self.key), function, arguments, clock, donate)

    def _piece(self):
        """Steps that make about so many pictures; whole rows of tokens, where each is drawn by itself."""
        sizes, width = self.order.sizes, self.generator.spec.scales[-1][1]
        steps = math.ceil(len(sizes) / GLIMPSES)
        return math.ceil(steps / width) * width if set(sizes) == {1} and steps > 1 else steps

    def _pixels(self):
        return self.given and (self.given.image, self.given.free)

    def _inputs(self, batch, seed):
        """All that programs take besides parameters and what they hand to one another."""
        spec, sampling = self.generator.spec, self.sampling
        turned = {name: getattr(sampling.filter, name) for name in _arrays(sampling.filter)}
        return {
            "batch": batch, "seed": np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32),
            "guidance": np.asarray(sampling.guidance(self.order, spec), np.float32),
            "temperature": np.asarray(sampling.temperature(self.order, spec), np.float32),
            "filter": {name: np.asarray(x, np.float32 if isinstance(x, float) else np.int32) for name, x in turned.items()},
            "pixels": self._pixels(), "paste": np.asarray(bool(self.given and self.given.paste)),
        }  # fmt: skip

    # What programs do

    def _begin(self, params, frozen, inputs):
        task = self._task(params, frozen, inputs)
        kept = None if task.source is None else task.source.tokens
        task = softened(task)
        return task.begin(task.setting(self.sampling.decoder.cache)), kept

    def _enter(self, stretch, params, frozen, inputs, kept, state):
        task = softened(self._task(params, frozen, inputs, kept))
        return self.sampling.decoder.enter(task, task.setting(self.sampling.decoder.cache), state, stretch)

    def _take(self, stretch, params, frozen, inputs, kept, state, part):
        decoder, task = self.sampling.decoder, softened(self._task(params, frozen, inputs, kept))
        state = decoder.advance(task, task.setting(decoder.cache), state, stretch, tuple(part))
        last = jnp.asarray(np.cumsum(self.order.sizes)[stretch.steps])[part[1] - 1]
        return state, *looked_at(task, state, last)

    def _whole(self, params, frozen, inputs):
        task = self._task(params, frozen, inputs)
        tokens, account = self.sampling.decoder(task)
        return tokens, None if task.source is None else task.source.tokens, account.calls

    def _picture(self, frozen, inputs, kept, tokens, known):
        _, edit = self._order(inputs)
        _, call = self._tokenizer(frozen, edit, kept, inputs["batch"])
        images = glimpse(self.tokenizer, call, tokens, known, decoding_keys(self._keys(inputs)[0]))
        if edit is not None:
            images = jnp.where(inputs["paste"] & ~edit.free[..., None], edit.image, images)
        return to_uint8(images), jnp.isfinite(images).all((1, 2, 3))

    def _task(self, params, frozen, inputs, kept=None):
        order, edit = self._order(inputs)
        source, call = self._tokenizer(frozen, edit, kept, inputs["batch"])
        steps = np.arange(len(order.sizes), dtype=np.float32) / max(len(order.sizes) - 1, 1)
        chosen = with_arrays(self.sampling.filter, inputs["filter"])
        knobs = Knobs(inputs["guidance"], inputs["temperature"], chosen, steps if self.sampling.soft else None)
        keys, _ = self._keys(inputs)
        # guided whatever the weight, which is turned without another program
        look = looking(self.tokenizer, call, keys)
        return Task(self.generator, params, inputs["batch"], order, knobs, keys, True, call, source, look)

    def _keys(self, inputs):
        key = jax.random.wrap_key_data(inputs["seed"], impl="threefry2x32")
        return image_keys(key, jnp.arange(self.images, dtype=jnp.uint32))

    def _order(self, inputs):
        """The order, and what is given of the images."""
        _, keys = self._keys(inputs)
        return arranged(self.generator, self.order_fn, keys, inputs["pixels"], self.scales, self.known)

    def _tokenizer(self, frozen, edit, kept, batch):
        """The tokens that are kept, and the frozen tokenizer."""

        def call(*arguments, method, **keywords):
            module = self.shown if method in ("decode", "decode_until", "prefix", "partly") else self.tokenizer
            keywords |= said_of(self.tokenizer, batch, len(arguments[0])) if method == "decode" else {}
            return module.apply({"params": frozen}, *arguments, method=method, **keywords)

        return (None, call) if edit is None else hold(self.tokenizer, call, edit, kept)


def _roundly(count):
    """The number of images that a program draws: few programs serve all counts."""
    return 1 << (count - 1).bit_length()


def _arrays(part):
    return getattr(part, "arrays", ())


def _fixed(part):
    """What of a part makes another program."""
    if not dataclasses.is_dataclass(part):
        return part
    return type(part), [
        (f.name, getattr(part, f.name)) for f in dataclasses.fields(part) if f.name not in _arrays(part)
    ]


def with_arrays(part, arrays):
    """A copy of a part with arrays in place of numbers, which its own checks could not look at."""
    part = copy.copy(part)
    for name, value in arrays.items():
        object.__setattr__(part, name, value)
    return part
