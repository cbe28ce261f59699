"""How well a tokenizer shows held-out images, and how every scale and every sub-code uses its codes.

    python tests/code_usage.py RUN

RUN is a run folder of train.py or a converted tokenizer. PSNR is the mean over the test images of the data it was
trained on; usage and perplexity are counted over the tokens of all its images. Not a pytest file: it needs a trained run.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.data import Data, batches, open_source
from ar_jax.files.images import to_float, to_uint8
from ar_jax.files.models import open_model
from ar_jax.tokenizers.quantize import count_codes, usage


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--limit", type=int, default=10000, help="images of a split, at most")
    arguments = parser.parse_args()
    model = open_model(arguments.run, "tokenizer")
    data, tokenizer, params = Data(**model.settings["data"]), model.module, {"params": model.params()}
    encode = jax.jit(functools.partial(tokenizer.apply, params, method="encode"))
    decode = jax.jit(functools.partial(tokenizer.apply, params, method="decode", key=jax.random.key(0)))

    def read(split):
        source = open_source(dataclasses.replace(data, split=split))
        images = next(batches(source, data, batch=min(len(source), arguments.limit), seed=0, train=False))["image"]
        return np.split(images, range(100, len(images), 100))

    errors = []
    for image in read("test"):
        shown = np.asarray(to_uint8(decode(encode(to_float(image)))), np.float32)
        errors += list(np.square((shown - image) / 255).reshape(len(image), -1).mean(1))
    print(f"PSNR: {np.mean(-10 * np.log10(errors)):.2f} dB, mean of {len(errors)} held-out images")

    spec, count, images = tokenizer.spec, 0, 0
    if not spec.codes:
        return
    for image in read("all"):
        count += count_codes(encode(to_float(image)), spec)
        images += len(image)
    figures = {name: float(value) for name, value in usage(jnp.asarray(count), spec.codes).items()}
    print(f"codes in use out of {' x '.join(map(str, spec.codes))}, over {images} images, and perplexity:")
    rows = {"": "all"}
    rows |= {f"/{i}": f"{height}x{width}" for i, (height, width) in enumerate(spec.scales)}
    rows |= {f"/code{k}": f"code {k}" for k in range(len(spec.codes))}
    for name, title in rows.items():
        if f"usage{name}" in figures:
            print(f"  {title:6s} {figures[f'usage{name}']:6.1%} {figures[f'code_perplexity{name}']:8.1f}")


if __name__ == "__main__":
    main()
