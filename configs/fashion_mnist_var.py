"""VAR's method on Fashion-MNIST (60,000 pictures of clothes; Debian's package dataset-fashion-mnist).

python train.py configs/fashion_mnist_var.py
python sample.py runs/fashion_mnist_var

The networks of mnist5k_var.py, trained for longer. No figures have been measured.
"""

import dataclasses

import mnist5k_var

from ar_jax.config import Experiment
from ar_jax.data import Data


def get_config() -> Experiment:
    base = mnist5k_var.get_config()
    return dataclasses.replace(
        base,
        name="fashion_mnist_var",
        data=Data(name="idx", size=32),
        tokenizer=dataclasses.replace(base.tokenizer, steps=1500),
        generator=dataclasses.replace(base.generator, steps=2000),
    )
