"""Codes of a trained tokenizer and the clusters that they lie in: every place of an image has a coarse token and a fine one."""

from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.tokenizers.continuous import Around
from ar_jax.tokens import TokenSpec
from ar_jax.typing import Array, Bool, Float, Having, Int, Key, Params, PRNGKey, Tokens, Within, typed


class Clustered(Around, nn.Module):
    """A tokenizer of codes whose tokens are, for all places, the cluster that the code lies in, and then the code itself.

    Its parameters are those of the tokenizer it is made of, and `cluster`, that of every code, which `python -m ar_jax.codebook`
    finds by k-means. Nothing is trained.

    Attributes:
      base: the tokenizer (`VQGAN`), with one code for each place of one grid.
      clusters: how many; at most as many as codes, each with at least one.
    Source: coarse-to-fine token prediction (arXiv:2503.16194).
    """

    base: Annotated[nn.Module, Having("grid", "encode", "embed", "decode")]
    clusters: Annotated[int, Within(1, 2**24)] = 512

    MEASURED = ()  # codes have no spread

    @property
    def spec(self) -> TokenSpec:
        spec = self.base.spec
        if len(spec.codes) != 1 or len(spec.scales) != 1 or not spec.placed or spec.grammar:
            raise ValueError(
                f"tokenizer.base is {type(self.base).__name__}, but codes are clustered of tokenizers with one code for each "
                "place of one grid, such as VQGAN"
            )
        if self.clusters > spec.codes[0]:
            raise ValueError(
                f"tokenizer.clusters is {self.clusters}, but there are {spec.codes[0]} codes; give as many or fewer"
            )
        return TokenSpec(np.concatenate([spec.coords, spec.coords + np.array([1, 0, 0], np.int32)]), codes=spec.codes)

    def setup(self):
        super().setup()
        codes = self.spec.codes[0]
        self.cluster = self.param("cluster", lambda key: jnp.arange(codes, dtype=jnp.int32) * self.clusters // codes)

    def init_params(self, key: PRNGKey) -> Params:
        """Neighbouring codes are one cluster until they are clustered."""
        own = self.init(key, jnp.zeros((1, self.base.spec.n, 1), jnp.int32), method="coarse")["params"]
        return {**self.base.init_params(key), **own}

    @typed
    def encode(self, image: Float[Array, "b H W c"], *, key: PRNGKey | None = None) -> Int[Array, "b n 1"]:
        """Tokens of images in [-1, 1]; `key` as in the base."""
        fine = self.base.encode(image, key=key)
        return jnp.concatenate([self.coarse(fine), fine], axis=1)

    @typed
    def coarse(self, codes: Int[Array, "b m 1"]) -> Int[Array, "b m 1"]:
        """Clusters of codes."""
        return self.cluster[codes]

    @typed
    def members(self) -> Bool[Array, "m v"]:
        """Which codes lie in every cluster."""
        return self.cluster == jnp.arange(self.clusters)[:, None]

    @typed
    def centres(self) -> Float[Array, "m c"]:
        """Mean of what the codes of every cluster stand for."""
        each = self.base.embed(jnp.arange(len(self.cluster), dtype=jnp.int32)[None, :, None])[0].astype(jnp.float32)
        total, count = (jax.ops.segment_sum(x, self.cluster, self.clusters) for x in (each, jnp.ones((len(each), 1))))
        return total / jnp.maximum(count, 1)

    @typed
    def embed(self, tokens: Tokens) -> Float[Array, "b n c"]:
        """What all tokens of images stand for, coarse ones for their centre; vectors in their place stay as they are."""
        if jnp.issubdtype(tokens.dtype, jnp.floating):
            return tokens
        coarse, fine = jnp.split(tokens, 2, axis=1)
        return jnp.concatenate([self.centres()[coarse[..., 0]], self.base.embed(fine)], axis=1)

    @typed
    def decode(self, tokens: Tokens, *, key: PRNGKey | Key[Array, "b"] | None = None) -> Float[Array, "b H W c"]:
        """Images of the fine tokens, about [-1, 1] but not clipped; `key` as in the base."""
        return self.base.decode(tokens[:, tokens.shape[1] // 2 :], key=key)

    @typed
    def partly(
        self, tokens: Int[Array, "b n 1"], known: Bool[Array, "b n"], *, key: PRNGKey | Key[Array, "b"] | None = None
    ) -> Float[Array, "b H W c"]:
        """What known tokens of images show: codes, or the centres of clusters where these are all that is known, and grey where
        nothing is."""
        coarse, fine = jnp.split(known, 2, axis=1)
        centres, codes = jnp.split(self.embed(tokens), 2, axis=1)
        images = self.base.decode(jnp.where(fine[..., None], codes, centres), **({"key": key} if self.generative else {}))
        known = (coarse | fine).reshape(-1, *self.grid)
        for axis, cells in enumerate(self.grid, 1):
            known = known.repeat(images.shape[axis] // cells, axis)
        return jnp.where(known[..., None], images, 0.0)
