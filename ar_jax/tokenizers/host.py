"""Tokenizers that are codecs of the host: numpy functions, which no device computes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.files.images import to_float, to_uint8
from ar_jax.machine.sharding import Rules
from ar_jax.typing import Array, Batch, Float, Metrics, Params, PRNGKey, Tokens, UInt8


class OnHost:
    """Makes a tokenizer, as others are, of two numpy functions; for modules with

        size, spec                         see `tokenizers`
        host_encode(images) -> tokens      uint8 [b h w 3] -> int32 [b n k]
        host_decode(tokens) -> images      and back

    They are called outside compiled programs where much goes through them: in training by the threads that make batches
    ahead (`encoded`), in sampling once all tokens are drawn (`Sampling.images`). Inside a compiled program, as for pictures
    and figures during training, `encode` and `decode` call back to the host, at its end or beginning, not within loops. It
    has no parameters and is not trained.
    """

    channels = 3

    @property
    def rules(self) -> Rules:
        return ()

    def init_params(self, key: PRNGKey) -> Params:
        return {}

    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Tokens:
        """Tokens of images in [-1, 1]; `key` is unused."""
        like = jax.ShapeDtypeStruct((len(image), self.spec.n, len(self.spec.codes)), jnp.int32)
        return _called(self.host_encode, like, to_uint8(image))

    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        raise ValueError(f"tokens of {type(self).__name__} stand for no vectors; the generator has to learn its own")

    def decode(self, tokens: Tokens, *, key: PRNGKey | None = None) -> Float[Array, "b H W 3"]:
        """Images in [-1, 1]; `key` is unused."""
        like = jax.ShapeDtypeStruct((len(tokens), *self.size, 3), jnp.uint8)
        return to_float(_called(self.host_decode, like, tokens))

    def autoencode(
        self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None
    ) -> tuple[Float[Array, "b H W c"], Metrics, Metrics]:
        """What is left of the image; there is nothing to train."""
        tokens = self.encode(image)
        return self.decode(tokens), {}, {"tokens": tokens}


def on_host(tokenizer: Any) -> bool:
    """Whether a tokenizer is a codec of the host."""
    return hasattr(tokenizer, "host_encode")


def encoded(tokenizer: Any) -> Callable[[Batch], Batch]:
    """Batches with tokens in the place of images, for `data.batches`."""

    def then(batch):
        if "image" not in batch:
            return batch
        tokens = {"tokens": tokenizer.host_encode(np.asarray(batch["image"]))}
        return {name: value for name, value in batch.items() if name != "image"} | tokens

    return then


def _called(
    function: Callable[[np.ndarray], np.ndarray], like: jax.ShapeDtypeStruct, x: Array | UInt8[Array, "*b"]
) -> Array:
    """A numpy function of an array: at once, or called back from a compiled program."""
    if not isinstance(x, jax.core.Tracer):
        return jnp.asarray(function(np.asarray(x)))
    return jax.pure_callback(functools.partial(_with_numpy, function, x.ndim), like, x, vmap_method="expand_dims")


def _with_numpy(function, axes, x):
    """The function of an array that `vmap` may have given more axes before its own."""
    x = np.asarray(x)
    more = x.shape[: x.ndim - axes + 1]
    made = function(x.reshape(-1, *x.shape[len(more) :]))
    return made.reshape(*more, *made.shape[1:])
