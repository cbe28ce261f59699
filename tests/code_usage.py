"""How well a tokenizer shows held-out images, and how every scale uses the codebook.

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
    encode, decode = (jax.jit(functools.partial(tokenizer.apply, params, method=name)) for name in ("encode", "decode"))

    def read(split):
        source = open_source(dataclasses.replace(data, split=split))
        images = next(batches(source, data, batch=min(len(source), arguments.limit), seed=0, train=False))["image"]
        return np.split(images, range(100, len(images), 100))

    errors = []
    for image in read("test"):
        shown = np.asarray(to_uint8(decode(encode(to_float(image)))), np.float32)
        errors += list(np.square((shown - image) / 255).reshape(len(image), -1).mean(1))
    print(f"PSNR: {np.mean(-10 * np.log10(errors)):.2f} dB, mean of {len(errors)} held-out images")

    level, count, images = tokenizer.spec.coords[:, 0], 0, 0
    for image in read("all"):
        count += count_codes(encode(to_float(image)), tokenizer.codes, level)
        images += len(image)
    figures = {name: float(value) for name, value in usage(jnp.asarray(count)).items()}
    print(f"codes in use out of {tokenizer.codes}, over {images} images, and perplexity:")
    print(f"  all    {figures['usage']:6.1%} {figures['code_perplexity']:8.1f}")
    for i, (height, width) in enumerate(tokenizer.spec.scales if level.any() else ()):
        print(f"  {f'{height}x{width}':6s} {figures[f'usage/{i}']:6.1%} {figures[f'code_perplexity/{i}']:8.1f}")


if __name__ == "__main__":
    main()
