"""Which of the weights in a released file are meant, and what families call them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ar_jax.convert.sources import SOURCES, Found, identify, recognised, spelled
from ar_jax.files import words
from ar_jax.files.weights import WeightSets, open_weights

AVERAGE = re.compile(r"(^|[._])(ema|averaged?)([._]|$)", re.IGNORECASE)  # in the name of a set
_WRAPPED = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
WRAPPERS = re.compile(rf"^((module|{_WRAPPED})\.)+|(?<![^.])({_WRAPPED})\.")
WORDS = 8  # before all names, which are left out one after the other


def choose(path: Path, entry: str = "") -> tuple[str, dict[str, np.ndarray]]:
    """The weights of a file, and the entry they are taken from.

    Unless an entry is named, these are the usual ones (`WeightSets.usual`), or, where the family's authors evaluate the moving
    average (`AVERAGED` of a family) and the file has it, the average. If there are no usual ones, it is the only set that
    belongs to a known family. What was chosen, and what else there is, is printed.

    Raises:
      ValueError: no such entry, or several that could be meant.
    """
    sets, why = open_weights(path), ""
    if entry:
        name = entry
    else:
        name, why = _choice(sets)
    weights = sets.read(name)
    others = [other for other in sets.sets if other != name]
    if others or why or (name and not entry):
        said = f"{path}: takes {words.name(name) or 'the top level'}{why}"
        if others:
            said += (
                f"; also there: {', '.join(map(words.name, others[:8]))}{', ...' * (len(others) > 8)} (--entry NAME)"
            )
        print(said)
    if beside := sets.others[name]:
        print(f"{path}: passed over {_some(beside)}, which {'is' if len(beside) == 1 else 'are'} no tensors")
    plain = unwrapped(weights)
    if plain.keys() != weights.keys():
        found = next(match[0] for key in weights if (match := WRAPPERS.search(key)))
        print(f"{path}: names are read without {found}, which training put before them")
    return name, plain


def _choice(sets: WeightSets) -> tuple[str, str]:
    kinds = {name: recognised(unwrapped(_shapes(tensors))) for name, tensors in sets.sets.items()}
    try:
        name = sets.usual()
    except ValueError:
        known = [name for name, (_, kind) in kinds.items() if kind and not AVERAGE.search(name)]
        known = known or [name for name, (_, kind) in kinds.items() if kind]
        known = known or (list(sets.sets) if len(sets.sets) == 1 else [])
        if len(known) != 1:
            raise
        (name,) = known
    source, kind = kinds[name]
    if source and kind in getattr(source, "AVERAGED", ()):
        keys = unwrapped(sets.sets[name]).keys()
        for other, tensors in sets.sets.items():
            if AVERAGE.search(other) and other != name and unwrapped(tensors).keys() == keys:
                return other, ", the moving average, which its authors evaluate"
    return name, ""


def unwrapped(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Entries without what distributed and compiled training put before names."""
    plain = {WRAPPERS.sub("", key): value for key, value in weights.items()}
    return plain if len(plain) == len(weights) else dict(weights)


def identified(path: Path, weights: dict[str, np.ndarray], **known: Any) -> tuple[Found, dict[str, np.ndarray]]:
    """The network of weights, and these under the names that its family knows, without what is no part of it.

    A word before all names (`model.`), or before all that belong to a network (beside `loss.`), is left out if no family knows
    the names with it.

    Args:
      known: see `identify`.
    Raises:
      ValueError: the file is not known or is damaged.
    """
    refusal, before, apart, named = None, [], [], _network(path, weights)
    while True:
        named = spelled(named)
        try:
            found = identify(_shapes(named), **known)
            break
        except ValueError as error:
            # names that all begin alike say more without that; a word before some of them may be one of the network
            if refusal is None or (not apart and recognised(_shapes(named))[0]):
                refusal = error
            word = getattr(recognised(_shapes(named))[0], "BEFORE", None)
            whole = word is not None and all(key.startswith(word) for key in named)
            head = None if whole or len(before) == WORDS else _head(named)
            if head is None:
                raise refusal from None
            before.append(head)
            apart += [key for key in named if not key.startswith(head)]
            named = {key.removeprefix(head): value for key, value in named.items() if key.startswith(head)}
    if before:
        print(f"{path}: names are read without {words.name(''.join(before))}, which stands before them all")
    if apart:
        print(f"{path}: passed over {_some(apart)}, whose names begin with another word")
    if found.strays:
        print(f"{path}: passed over {_some(found.strays)}: numbers that are no part of the network")
    if narrowed := [key for key, value in named.items() if value.dtype == np.float64 and key not in found.strays]:
        print(f"{path}: narrowed to float32: {len(narrowed)} entries in float64, such as {words.name(narrowed[0])}")
    return found, {key: value for key, value in named.items() if key not in found.strays}


def _network(path: Path, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights without what the family says lies beside them; the average, where it lies there and its authors evaluate it.

    PyTorch Lightning keeps averages in the same set, as `model_ema.` and the name without its dots.
    """
    for family in SOURCES.values():
        if not (word := getattr(family, "BEFORE", "")) or any(key.startswith(word) for key in weights):
            continue
        longer = {word + key: value for key, value in weights.items()}
        if family.recognise(_shapes(longer)) == "generator":
            print(f"{path}: names are read with {word}, which stands before them all in released files")
            weights = longer
    source, kind = recognised(_shapes(weights))
    if not (beside := getattr(source, "BESIDE", ())):
        return weights
    network = {key: value for key, value in weights.items() if not key.startswith(beside)}
    if len(network) < len(weights):
        print(
            f"{path}: passed over {_some([key for key in weights if key not in network])}, which lie beside the network"
        )
    average = {key: f"model_ema.{key.replace('.', '')}" for key in network}
    if kind in getattr(source, "AVERAGED", ()) and weights.keys() >= set(average.values()):
        print(f"{path}: takes model_ema, the moving average, which its authors evaluate")
        return {key: weights[name] for key, name in average.items()}
    return network


def _head(weights: Mapping[str, Any]) -> str | None:
    """The first word, with its dot, of all names of tensors, or of the only ones that a family knows without it."""
    heads = {key.partition(".")[0] + "." for key, value in weights.items() if value.shape and "." in key}
    if len(heads) > 1 and len(heads) <= WORDS:
        inner = {head: {k.removeprefix(head): v for k, v in weights.items() if k.startswith(head)} for head in heads}
        heads = {head for head, some in inner.items() if recognised(_shapes(some))[0]}
    elif any(value.shape and "." not in key for key, value in weights.items()):
        return None
    return heads.pop() if len(heads) == 1 else None


def _shapes(weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: value.shape for key, value in weights.items()}


def _some(names):
    return ", ".join(map(words.name, list(names)[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
