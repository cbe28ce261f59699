"""Jacobi decoding: a window of tokens is guessed and corrected together until nothing changes."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ar_jax.decode.sequential import Account, Claim, Task, check_cache, keys_of
from ar_jax.generators.base import Setting, State
from ar_jax.nets.attention import Kept
from ar_jax.orders import to_slots
from ar_jax.typing import Array, Index, Int, Key, Tokens


@dataclasses.dataclass(frozen=True)
class Jacobi:
    """Draws all tokens of a window from guesses of those before them, over and over, each with the noise of its own rank.

    The first token of the window is right after one call, and with it all that follow as long as they were guessed
    right; the window then moves on, by as many in every image as it may. Since a draw is a function of the tokens before
    it and of the noise, what the iteration ends in are the tokens of `Sequential`. For causal generators of codes that
    draw one a step.

    Source: Jacobi decoding (arXiv:2305.10427), with fixed noise as in speculative Jacobi decoding (arXiv:2410.01699).
    """

    window: int = 16
    """Tokens that are guessed together."""
    cache: Kept = "own"
    """See `Sequential`."""

    @property
    def claim(self) -> Claim:
        return Claim.SAME_TOKENS if self.cache == "own" else Claim.APPROXIMATE

    def __post_init__(self):
        check_cache(self.cache)
        if self.window < 1:
            raise ValueError(f"decoder.window is {self.window}; it must be 1 or more")

    def __call__(self, task: Task) -> tuple[Tokens, Account]:
        """As `Sequential`.

        Raises:
          ValueError: the generator draws no codes, or not one after the other, or mixtures of codes are asked for.
        """
        generator, order = task.generator, task.order
        if not hasattr(generator, "rows") or not generator.spec.codes or set(order.sizes) != {1}:
            raise ValueError(
                f"decoder Jacobi needs a causal generator of codes that reveals one token a step; this "
                f"{type(generator).__name__} reveals {max(order.sizes)}, of {generator.spec.codes or 'no'} codes"
            )
        if generator.spec.grammar:
            raise ValueError("decoder Jacobi follows no grammar, which the tokens of this model have; use Sequential")
        if task.knobs.soften is not None:
            raise ValueError("soft draws mixtures of codes, but decoder Jacobi compares codes; give one of them")
        images, n, setting = task.images, order.n, task.setting(self.cache)
        window = min(self.window, n)

        def body(carry):
            state, first, calls, accepted = carry
            start = jnp.minimum(first, n - window)  # the last windows reach back to tokens that are right already
            inside = start[:, None] + jnp.arange(window)
            drawn, state = draw_windows(task, state, start, keys_of(task.keys, inside), setting)
            guess = jnp.take_along_axis(state.tokens, inside[..., None], axis=1)
            tokens = jax.vmap(lambda x, new, at: lax.dynamic_update_slice_in_dim(x, new, at, axis=0))(
                state.tokens, drawn, start
            )
            state = task.known(state.replace(tokens=tokens))
            now = jnp.take_along_axis(state.tokens, inside[..., None], axis=1)
            # a token is right if all those before it were guessed right
            right = (guess == now).all(-1) | (inside < first[:, None])
            many = start + 1 + jnp.cumprod(right, axis=1)[:, :-1].sum(1) - first
            many = jnp.where(first < n, many, 0).astype(jnp.int32)
            accepted = accepted.at[:, calls.max()].set(many)
            return state, first + many, calls + (first < n), accepted

        state = task.call(task.begin(setting), n, setting, method="grow")
        zero = jnp.zeros(images, jnp.int32)
        carry = (task.known(state), zero, zero, jnp.zeros((images, n), jnp.int32))
        state, _, calls, accepted = lax.while_loop(lambda carry: (carry[1] < n).any(), body, carry)
        return to_slots(state.tokens, order), Account({"generator": calls}, accepted)


def draw_windows(
    task: Task, state: State, first: Int[Array, "b"], keys: Key[Array, "b m"], setting: Setting
) -> tuple[Int[Array, "b m k"], State]:
    """Draws ranks first..first+m of every image, which begin at another rank in each, from the tokens in the state.

    Args:
      task: whose generator draws.
      state: with room in its cache for all these ranks.
      first: of the window, by image.
      keys: of its ranks.
      setting: see `Setting`.
    Returns:
      The tokens, and the state with the rows of these ranks in its cache.
    """
    images, m = keys.shape
    split = lambda x, axis: x.reshape(*x.shape[:axis], images, -1, *x.shape[axis + 1 :])  # noqa: E731
    axes = jax.tree.map(lambda x: x.ndim - 4, state.cache)  # of the images in keys and values, [... B h r e]
    cond, cache = jax.tree.map(lambda x: split(x, 0), setting.cond), jax.tree.map(split, state.cache, axes)
    slot = jnp.broadcast_to(setting.order.slot, (images, setting.order.n))

    def one(tokens, cache, cond, slot, first, keys):
        own = setting.replace(cond=cond, order=setting.order.replace(slot=slot[None]))
        h, cache = task.call(State(tokens[None], cache), first, m, own, method="rows")

        def draw(j: Index):
            row, key = lax.dynamic_slice_in_dim(h, j, 1, axis=1), lax.dynamic_slice_in_dim(keys, j, 1)[None]
            return task.call(
                row, key, setting.knobs, first + j, setting.tokenizer,
                method=lambda self, *arguments: self.head.sample(*arguments),
            )[0, 0]  # fmt: skip

        return jax.vmap(draw)(jnp.arange(m)), cache

    drawn, cache = jax.vmap(one, in_axes=(0, axes, 0, 0, 0, 0), out_axes=(0, axes))(
        state.tokens, cache, cond, slot, first, keys
    )
    join = lambda x, axis: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])  # noqa: E731
    return drawn, state.replace(cache=jax.tree.map(join, cache, axes))
