"""Search over ordered tokens, on a toy generator and a toy judge."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import constant_knobs, fixed

from ar_jax.data import Info
from ar_jax.decode.glimpse import glimpse
from ar_jax.decode.judges import by_rank, by_score
from ar_jax.decode.search import Search, doubling, even
from ar_jax.decode.sequential import Task
from ar_jax.generators.base import State
from ar_jax.generators.causal import Causal
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.orders import raster
from ar_jax.tokens import TokenSpec, grid


class Given(Categorical):
    """Rows are logits."""

    def setup(self):
        pass

    def __call__(self, h):
        return h


class Toy(Causal):
    """Logits of a place, plus those of the token before it."""

    tables: tuple = ()

    def condition(self, batch, drop):
        return self.conditioning(batch, drop)

    def begin(self, setting, images):
        return State(self.spec.zeros(images))

    def rows(self, state, first, size, setting):
        place, pair = TABLES
        before = jnp.take(state.tokens[..., 0], jnp.maximum(first - 1, 0), axis=1)
        return (place[first] + jnp.where(first > 0, pair[before], 0))[:, None], None


TABLES = []


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Shows a token as a pixel, its number plus one."""

    spec: TokenSpec

    def __call__(self, tokens, method):
        return tokens[:, None].astype(jnp.float32) + 1


@dataclasses.dataclass(frozen=True)
class Toyish:
    """Values of the tokens, and of the first and the last together."""

    def open(self):
        return None

    def __call__(self, params, images, batch):
        value, cross = params
        tokens = images[:, :, 0, :, 0].astype(jnp.int32) - 1
        n = (tokens >= 0).sum(-1)
        last = jnp.take_along_axis(tokens, n[..., None] - 1, axis=-1)[..., 0]
        each = value[jnp.arange(tokens.shape[-1]), jnp.maximum(tokens, 0)]
        return jnp.where(tokens >= 0, each, 0).sum(-1) + cross[tokens[..., 0], last] * jnp.sqrt(n)


def toy(folder):
    h, io = folder.h, folder.io
    n, codes = h["max_tokens"], h["vocab_size"]
    TABLES[:] = [jnp.asarray(io["position_logits"]), jnp.asarray(io["pair_logits"])]
    spec = TokenSpec(grid(1, n), codes=(codes,))
    generator = Toy(Transformer(1, 8, 2), Label(8), Given()).complete(spec, Info(classes=1))
    params = {"conditioning": {"embedding": jnp.zeros((2, 8))}}
    pixels = Pixels(spec)
    wide = {"judge": Toyish(), "beams": h["beam_width"], "candidates": h["candidates_per_beam"], "branch": "last"}
    steps = len(folder.want["rollout_schedule"])
    searches = {
        "geometric": {"stops": doubling(n, h["geometric_steps"])},
        "linear": {"stops": even(h["tokens_per_step"], n)[: h["linear_steps"]]},
        "first": {"stops": tuple(folder.want["first_schedule"].tolist()), "spread": True},
        "lookahead": {"stops": doubling(n, h["geometric_steps"]), "ahead": h["lookahead"]},
        "rollout": {
            "stops": doubling(n, h["geometric_steps"]), "ahead": n, "ahead_stops": min(h["max_lookahead_step"], steps),
        },
    }  # fmt: skip
    outputs = {}
    for name, fields in searches.items():
        search, results = Search(**wide, **fields), h["num_results"]

        @jax.jit
        def run(judged, search=search):
            task = Task(
                generator, params, {"label": jnp.zeros(1, jnp.int32)}, raster(spec), constant_knobs(np.ones(n), 0.0),
                jax.random.split(jax.random.key(0), 1), look=lambda *at: glimpse(pixels, pixels, *at), extra=judged,
            )  # fmt: skip
            return search.search(task)

        _, found = run((jnp.asarray(io["value"]), jnp.asarray(io["cross"])))
        outputs |= {
            f"{name}_schedule": np.array(search.stops), f"{name}_verifier_calls": found.calls["judge"][0],
            f"{name}_final": found.tokens[-1, 0, :results, : search.stops[-1], 0],
            f"{name}_final_scores": found.scores[-1, 0, :results],
        }  # fmt: skip
        for j, stop in enumerate(search.stops):
            outputs |= {
                f"{name}_beams_{j}": found.tokens[j, 0, :, :stop, 0], f"{name}_scores_{j}": found.scores[j, 0, :results]
            }  # fmt: skip
    scores, weights = jnp.asarray(io["ensemble_scores"]), np.float32(h["weights"])
    fixed(h, verifiers=len(scores), ensemble_candidates=scores.shape[1])
    return outputs | {"ensemble_rank": by_rank(scores, weights), "ensemble_weighted": by_score(scores, weights)}


CASES = {"token_search": toy}
