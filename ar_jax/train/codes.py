"""What training watches of a tokenizer's codes: how often each is used, since when not, and what may replace dead ones."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.tokenizers.quantize import Codebook, count_codes, usage
from ar_jax.tokenizers.quantize_averaged import centres, followed, restarted
from ar_jax.train.state import TrainState
from ar_jax.typing import Metrics, Params, PRNGKey

MEMORY = 0.99  # decay of the code frequencies behind the logged perplexity and the usage by level and sub-code
RARE = 0.08  # less than this part of an even share is no use of a code there, as VAR counts it


def codebooks(tokenizer: Any) -> tuple[Codebook, ...]:
    """Of a tokenizer; one that names none has learned none, and a set of codes for each of its sub-codes."""
    named = getattr(tokenizer, "codebooks", ())
    return named or tuple(Codebook(sub_codes=(k,)) for k in range(len(tokenizer.spec.codes)))


def check_reset(tokenizer: Any, after: int) -> None:
    """Refuses to renew codes where there are none, or none that are learned."""
    name = type(tokenizer).__name__
    if after and not tokenizer.spec.codes:
        raise ValueError(f"losses.reset_after is {after}, but {name} has no codes; give 0")
    if after and not any(book.path for book in codebooks(tokenizer)):
        raise ValueError(
            f"losses.reset_after is {after}, but {name} has no learned codebook: its codes are fixed, and a dead one "
            "cannot become another; give 0"
        )
    if after and averaged(tokenizer):
        raise ValueError(
            f"losses.reset_after is {after}, but the codes of {name} are averages of vectors, of which rare ones begin anew by "
            "themselves; give 0"
        )


def averaged(tokenizer: Any) -> list[Codebook]:
    """Codebooks that follow averages of vectors."""
    return [book for book in codebooks(tokenizer) if book.average]


def begin(tokenizer: Any, params: Params, reset: bool) -> Params:
    """What is watched, before the first update: a part of `TrainState.extra`, {} for continuous tokens.

    "age" int32 [codes of all codebooks], updates since a code was used; "frequency" [levels, codes of all sub-codes];
    with `reset` for each learned codebook "latents" (of the second one "latents_1"), in the shape of its parameter;
    "averages" of those that follow some, by path: "sizes" [v], "sums" [v c], and "fresh" [v c], vectors of the last batch.

    Raises:
      ValueError: the tokenizer names a codebook that has another shape.
    """
    spec, books = tokenizer.spec, codebooks(tokenizer)
    if not spec.codes:
        return {}
    extra = {
        "age": jnp.zeros(sum(_size(spec, book) for book in books), jnp.int32),
        "frequency": jnp.zeros((len(spec.scales), sum(spec.codes))),
    }
    for i, book in enumerate(books):
        if book.path and reset:
            table = _get(params, book.path.split("/"))
            if len(table) != _size(spec, book):
                raise ValueError(
                    f"{type(tokenizer).__name__}.codebooks says that {book.path} holds sub-code {book.sub_codes[0]} of "
                    f"{_size(spec, book)} codes, but it has shape {table.shape}"
                )
            extra[_latents(i)] = jnp.zeros(table.shape)
    tables = {book.path: _get(params, book.path.split("/")) for book in averaged(tokenizer)}
    if tables:
        extra["averages"] = {
            path: {"sizes": table[:, 0] * 0, "sums": table * 0, "fresh": table * 0} for path, table in tables.items()
        }
    return extra


def track(extra: Params, seen: Metrics, tokenizer: Any) -> tuple[Params, Metrics]:
    """What is watched after one more batch, and its figures: see `usage`, but "usage" itself is the mean over codebooks of
    the share of codes that occurred within the updates in which evenly used ones would all but surely occur.

    Args:
      extra: of `begin`, or of the batch before.
      seen: what `autoencode` shows.
    """
    spec, books = tokenizer.spec, codebooks(tokenizer)
    tokens, level = seen["tokens"], spec.coords[:, 0]
    count = count_codes(tokens, spec)
    used = jnp.concatenate([_uses(spec, book, count) for book in books])
    extra = extra | {
        "age": jnp.where(used > 0, 0, extra["age"] + 1),
        "frequency": MEMORY * extra["frequency"] + (1 - MEMORY) * count / tokens[..., 0].size,
    }
    latents = seen.get("latents")
    latents = latents if isinstance(latents, tuple) else (latents,)
    if _resets(extra) and len(latents) != len(books):
        raise ValueError(
            f'{type(tokenizer).__name__}.autoencode shows "latents" of {len(latents)} codebooks, but `codebooks` names '
            f"{len(books)}; dead codes can only be replaced if it shows a tuple with latents for each"
        )
    shares = []
    for i, (book, age) in enumerate(zip(books, _ages(spec, books, extra["age"]))):
        places = np.repeat(level[np.isin(level, book.levels or level)], len(book.sub_codes))
        if _latents(i) in extra:
            rows = latents[i].reshape(-1, latents[i].shape[-1])
            extra |= {_latents(i): rows[_candidates(places, len(tokens), len(age))]}
        shares.append((age < _window(len(age), len(tokens) * len(places))).mean())
    for book in averaged(tokenizer):
        (vectors, index), averages = seen["members"][book.path], extra["averages"]
        before = averages[book.path]
        sizes, sums = followed(before["sizes"], before["sums"], vectors, index, book.average.decay)
        some = np.resize(np.random.default_rng(0).permutation(len(vectors)), len(sizes))
        extra |= {"averages": averages | {book.path: {"sizes": sizes, "sums": sums, "fresh": vectors[some]}}}
    return extra, usage(extra["frequency"], spec.codes, RARE) | {"usage": sum(shares) / len(shares)}


def renew(state: TrainState, key: PRNGKey, tokenizer: Any, after: int) -> TrainState:
    """Puts random latents of the current batch in the place of codes unused for `after` updates (0: of none), and averages in
    that of the codes which follow them."""
    spec, books = tokenizer.spec, codebooks(tokenizer)
    model, average, ages = state.params["model"], state.ema, []
    for i, (book, age) in enumerate(zip(books, _ages(spec, books, state.extra["age"]))):
        if book.average or not book.path or not after:
            ages.append(age)
            continue
        dead = age >= after
        chosen = jax.random.permutation(jax.random.fold_in(key, i) if i else key, state.extra[_latents(i)])

        def put(table, dead=dead, chosen=chosen):
            return jnp.where(dead[:, None], chosen, table)

        model = _set(model, book.path.split("/"), put)
        average = None if average is None else _set(average, book.path.split("/"), put)
        ages.append(jnp.where(dead, 0, age))
    extra = state.extra | {"age": jnp.concatenate(ages)}
    for book in averaged(tokenizer):
        now = extra["averages"][book.path]
        fresh = jax.random.permutation(key, now["fresh"])
        sizes, sums = restarted(now["sizes"], now["sums"], fresh, book.average.rare)
        extra |= {"averages": extra["averages"] | {book.path: now | {"sizes": sizes, "sums": sums}}}
        table = centres(sizes, sums, book.average.eps)
        model = _set(model, book.path.split("/"), lambda _, table=table: table)
        average = None if average is None else _set(average, book.path.split("/"), lambda _, table=table: table)
    return state.replace(params=state.params | {"model": model}, ema=average, extra=extra)


def _resets(extra):
    return any(name.startswith("latents") for name in extra)


def _latents(i):
    return f"latents_{i}" if i else "latents"


def _size(spec, book):
    return spec.codes[book.sub_codes[0]]


def _ages(spec, books, age):
    return jnp.split(age, np.cumsum([_size(spec, book) for book in books])[:-1])


def _uses(spec, book, count):
    """How often a codebook's codes were used, int [v]."""
    each = jnp.split(count, np.cumsum(spec.codes)[:-1], axis=1)
    levels = np.array(book.levels or range(len(count)))
    return sum(each[k][levels].sum(0) for k in book.sub_codes)


def _window(codes, tokens):
    """Updates within which evenly used codes would all but surely occur: 65,536 ids as in LlamaGen, at least 4 a code."""
    return max(1, max(65536, 4 * codes) // tokens)


def _candidates(level, images, codes):
    """Which latents of a batch may take a dead code's place, int [codes]: of all levels equally many, at random."""
    random, places = np.random.default_rng(0), np.arange(images * len(level))
    some = [random.permutation(places[np.tile(level == i, images)]) for i in np.unique(level)]
    return np.stack([np.resize(one, codes) for one in some], axis=1).reshape(-1)[:codes]


def _get(tree, path):
    for name in path:
        tree = tree[name] if isinstance(tree, Mapping) else tree[int(name)]
    return tree


def _set(tree, path, change):
    """The same tree with another array at a path (see `Codebook.path`)."""
    if not path:
        return change(tree)
    name, *rest = path
    if isinstance(tree, Mapping):
        return {**tree, name: _set(tree[name], rest, change)}
    return tree.at[int(name)].set(_set(tree[int(name)], rest, change))
