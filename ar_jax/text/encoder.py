"""Encoders of captions by name: MiniLM, or a folder with a released T5 or CLIP."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.files import words
from ar_jax.files.codec import read_json
from ar_jax.files.places import local, path_of
from ar_jax.files.weights import read_weights
from ar_jax.text import clip, minilm, t5
from ar_jax.text.batches import in_batches

FAMILIES = {"t5": t5.of_config, "clip": clip.of_config, "clip_text_model": clip.of_config}
PIECES = 256  # of a file, that are looked at to know it again


class Encoder(NamedTuple):
    """An encoder of captions.

    Attributes:
      name: what models that were trained on its features say of them.
      identity: what features depend on besides the caption.
      encode: captions, rows -> features float32 [N rows d] and mask [N rows], padded on the left (see `in_batches`).
    """

    name: str
    identity: str
    encode: Callable[[Sequence[str], int], tuple[np.ndarray, np.ndarray]]


def open_encoder(name: str) -> Encoder:
    """The encoder of a name.

    Args:
      name: `minilm`, or a folder as Hugging Face's hub has it, with config.json, tokenizer.json and safetensors of a T5
        (v1.0, v1.1, Flan) or a CLIP.
    Raises:
      ValueError: there is no such encoder, or its files are not of one network.
    """
    if name == "minilm":
        return Encoder(name, minilm.identity(), lambda captions, rows: minilm.encode(list(captions), rows))
    return _open_folder(str(local(path_of(name)).expanduser().resolve()))


@functools.lru_cache(1)
def _open_folder(name):
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is no folder of a text encoder: it has no config.json; give minilm, or a folder with config.json, "
            "tokenizer.json and .safetensors files of a T5 or a CLIP"
        )
    config = read_json(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in FAMILIES:
        raise ValueError(
            f"{folder / 'config.json'}: model_type is {words.shown(kind)}; it must be one of {(*FAMILIES,)}"
        )
    try:
        network = FAMILIES[kind](config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {words.reason(error)}") from error
    weights = _weights(folder, network)
    tokenizer = _tokenizer(folder)

    def encode(captions, rows):
        if not 2 <= rows <= network.longest:
            raise ValueError(f"data.text_rows must lie in 2..{network.longest} for {folder.name}, got {rows}")
        return in_batches(tokenizer, functools.partial(network.forward, weights), captions, rows, network.width)

    identity = f"{folder.name} {json.dumps(config, sort_keys=True)} {_fingerprint(folder)} {jax.default_backend()}"
    return Encoder(folder.name, identity, encode)


def _fingerprint(folder):
    """Of the words and the weights, which may have many gigabytes: a hash of sizes and of pieces of every file."""
    digest = hashlib.sha256()
    for path in sorted([folder / "tokenizer.json", *folder.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            for i in range(PIECES):
                file.seek(i * size // PIECES)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def _weights(folder, network):
    """What the network reads, float32."""
    files, found = sorted(folder.glob("*.safetensors")), {}
    for file in files:
        found |= read_weights(file)
    if "encoder.embed_tokens.weight" in found:  # of files of an encoder alone
        found.setdefault("shared.weight", found["encoder.embed_tokens.weight"])
    try:
        shapes = network.shapes(found)
        for key, shape in shapes.items():
            if found[key].shape != shape:
                raise ValueError(f"{folder}: {key} has shape {found[key].shape}, but config.json says {shape}")
    except KeyError as error:
        raise ValueError(f"{folder}: its {len(files)} .safetensors files lack {error.args[0]}") from error
    return {key: jnp.asarray(found[key], jnp.float32) for key in shapes}


def _tokenizer(folder):
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ValueError("text encoders need a tokenizer: pip install tokenizers") from error
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no tokenizer.json, which the package `tokenizers` reads; save one beside the weights"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises a plain Exception
        raise ValueError(f"{path} is no tokenizer: {words.reason(error)}") from error
