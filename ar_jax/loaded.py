"""Models in Python: `ar_jax.load(RUN)` gives one to draw from, to encode and decode with, and to build on."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.data import Info
from ar_jax.decode.sampling import Sampling, adjustable
from ar_jax.decode.sequential import Account
from ar_jax.files.images import to_float, to_uint8
from ar_jax.files.models import holds, open_model
from ar_jax.machine.flops import with_fields
from ar_jax.machine.seeds import key_of
from ar_jax.options import SHORT, Sampler, replaced
from ar_jax.orders import OrderFn
from ar_jax.sampler import condition_table, image_keys, open_drawer
from ar_jax.tokenizers.conditioned import said_of
from ar_jax.tokenizers.host import encoded, on_host
from ar_jax.train.recipes import generator_loss
from ar_jax.typing import Array, Batch, Params, PRNGKey


class Functions(NamedTuple):
    """Pure functions of a model, to be jitted; `params` are `Loaded.params`, or a tree like it.

    Attributes:
      sample: params, conditions (first axis b), keys [b] of images and of orders (see `sampler.image_keys`) -> images
        float32 [b h w 3], about [-1, 1], and an `Account`.
      encode: params, images float32 [b h w 3] in [-1, 1] -> tokens [b n k].
      decode: params, tokens [b n k] -> images float32 [b h w 3]; of tokenizers that decode with captions, with a batch after them.
      loss: params, batch with "tokens" or "image" (uint8) and conditions, key -> mean loss and metrics.
    """

    sample: Callable[[Params, Batch, Array, Array], tuple[Array, Account]]
    encode: Callable[[Params, Array], Array]
    decode: Callable[[Params, Array], Array]
    loss: Callable[[Params, Batch, PRNGKey], tuple[Array, dict[str, Array]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
    """A tokenizer and, unless the folder holds a tokenizer only, its generator, with their parameters.

    Attributes:
      tokenizer, generator: the networks, Linen modules.
      params: plain trees of arrays, {"tokenizer": ..., "generator": ...}.
      info: of the data: classes and their names, captions.
      sampling: how the model is drawn from, unless told otherwise.
      order: of generation.
    """

    tokenizer: nn.Module
    generator: nn.Module | None
    params: dict[str, Params]
    info: Info
    sampling: Sampling = Sampling()
    order: OrderFn | None = None
    _programs: dict = dataclasses.field(default_factory=dict, repr=False)

    def sample(
        self,
        labels: Sequence[int | str] = (),
        *,
        captions: Sequence[str] = (),
        text_encoder: str | os.PathLike = "",
        count: int = 0,
        seed: int = 0,
        **changes: Any,
    ) -> np.ndarray:
        """Draws images, the same as `sample.py` with these options.

        Args:
          labels: classes by name or number, used in turn; all classes if left out.
          captions: for models that take them.
          text_encoder: folder of the T5 or CLIP that the model was trained with; MiniLM needs none.
          count: number of images; 0 draws one for each label or caption.
          seed: of all images; number i depends on it and on i only.
          changes: of `sampling`, by the names of sample.py's options (guidance=3.0, top_k=100, steps=32), or whole parts
            (decoder=Jacobi(16)).
        Returns:
          uint8 [count h w 3].
        Raises:
          ValueError: conditions or changes that this model does not have.
        """
        self._need_generator()
        names, table = condition_table(
            self.info, Sampler(captions=tuple(captions), text_encoder=str(text_encoder)), tuple(map(str, labels))
        )
        ids = np.arange(count or len(names), dtype=np.uint32)
        batch = {name: jnp.asarray(rows)[ids % len(names)] for name, rows in table.items()}
        sampling = self.changed(**changes)
        draw = self._jitted(sampling, lambda *arguments: to_uint8(self.sampler(sampling)(*arguments)[0]))
        extra = sampling.weights()
        params = self.params if extra is None else {**self.params, "decoder": extra}
        return _rgb(draw(params, batch, *image_keys(seed, ids)))

    def changed(self, **changes: Any) -> Sampling:
        """Its way to be drawn from with other settings; see `sample`.

        Raises:
          ValueError: a setting that this model does not have.
        """
        sampling = self.sampling
        free = adjustable(generator=self.generator, tokenizer=self.tokenizer, order=self.order)
        for name, value in changes.items():
            if name == "soft" or (name in ("guidance", "temperature", "filter", "decoder") and callable(value)):
                sampling = dataclasses.replace(sampling, **{name: value})
                continue
            paths = [path.replace("-", "_") for path in SHORT.get(name.replace("_", "-"), (name,))]
            if path := next((path for path in paths if path in free), None):
                sampling = dataclasses.replace(sampling, fields=(*sampling.fields, (path, value)))
            else:
                sampling = replaced(sampling, paths[0], value)
        return sampling

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Tokens [n slots k] of images, uint8 [n h w 3]: int32 codes, or float32 of unit variance."""
        if on_host(self.tokenizer):
            return self.tokenizer.host_encode(np.asarray(images))
        encode = self._jitted("encode", lambda params, images: self.functions.encode(params, to_float(images)))
        return np.asarray(encode(self.params, jnp.asarray(images)))

    def decode(self, tokens: np.ndarray, **batch: np.ndarray) -> np.ndarray:
        """Images, uint8 [n h w 3], of tokens [n slots k]; of tokenizers that decode with captions, with `text` and `text_mask`."""
        if on_host(self.tokenizer):
            return self.tokenizer.host_decode(np.asarray(tokens))
        decode = self._jitted("decode", lambda *arguments: to_uint8(self.functions.decode(*arguments)))
        return _rgb(decode(self.params, jnp.asarray(tokens), *[batch] * bool(batch)))

    def loss(self, images: np.ndarray, labels: Sequence[int] = (), *, seed: int = 0, **batch: np.ndarray) -> float:
        """Mean loss of the generator over the tokens of images, uint8 [n h w 3], in nats for codes.

        Args:
          labels: of the images, for models of classes.
          seed: of orders and noise, where the model draws them.
          batch: further conditions, such as `text` and `text_mask`.
        """
        self._need_generator()
        given = {
            "image": jnp.asarray(images),
            **({"label": np.asarray(labels, np.int32)} if len(labels) else {}),
            **batch,
        }
        given = encoded(self.tokenizer)(given) if on_host(self.tokenizer) else given
        return float(self._jitted("loss", self.functions.loss)(self.params, given, key_of(seed))[0])

    @functools.cached_property
    def functions(self) -> Functions:
        """Pure functions to jit."""

        def tokenizer(params, x, batch=None, *, method):
            said = said_of(self.tokenizer, batch) if method == "decode" else {}
            return self.tokenizer.apply({"params": params["tokenizer"]}, x, **said, method=method)

        def loss(params, batch, key):
            self._need_generator()
            loss_fn = generator_loss(self.generator, self.tokenizer, self.order, 0.0, train=False)
            return loss_fn(params["generator"], params["tokenizer"], batch, key, 0)

        encode, decode = (functools.partial(tokenizer, method=method) for method in ("encode", "decode"))
        return Functions(self.sampler(self.sampling), encode, decode, loss)

    def sampler(self, sampling: Sampling) -> Callable[[Params, Batch, Array, Array], tuple[Array, Account]]:
        """`Functions.sample` for another way to be drawn from."""

        def sample(params, batch, keys, order_keys):
            self._need_generator()
            generator, decoder, order_fn = sampling.adapted(self.generator, self.tokenizer, self.order)
            order, own = order_fn(generator.spec, order_keys, len(keys), 0), params["generator"]
            if order.by_token:
                generator, own = generator.unrolled(own)
            return sampling.images(
                generator, decoder, own, params["tokenizer"], batch, order, keys=keys, extra=params.get("decoder")
            )  # fmt: skip

        return sample

    def _jitted(self, name, function):
        return self._programs.setdefault(name, jax.jit(function))

    def _need_generator(self):
        if self.generator is None:
            raise ValueError("this folder holds a tokenizer only; load that of a generator")


def load(
    folder: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike = "",
    checkpoint: str = "newest",
    average: bool = True,
    dtype: str = "float32",
) -> Loaded:
    """The model of a run folder of train.py, or of converted folders.

    Args:
      folder: of the run, of a converted generator, or of a tokenizer.
      tokenizer: its folder, for converted generators; a run knows its own.
      checkpoint: of the generator: "newest", "best", or a step.
      average: take the moving average of the weights, if the checkpoint has one.
      dtype: of the generator's matrix products, kernels and embeddings.
    Raises:
      ValueError: no such models, or they do not fit each other.
    """
    if not holds(folder, "generator") and holds(folder, "tokenizer"):
        alone = open_model(folder, "tokenizer", checkpoint)
        return Loaded(alone.module, None, {"tokenizer": alone.params(average=average)}, alone.info)
    drawer = open_drawer(str(folder), Sampler(tokenizer=str(tokenizer), checkpoint=checkpoint))
    model, kind = drawer.model, jnp.dtype(dtype).type
    params = {"tokenizer": drawer.tokenizer.params(average=average), "generator": model.params(kind, average)}
    generator = with_fields(model.module, dtype=kind)
    return Loaded(drawer.tokenizer.module, generator, params, model.info, drawer.sampling, model.order)


def _rgb(images: Array) -> np.ndarray:
    return np.asarray(np.broadcast_to(images, (*images.shape[:3], 3)))
