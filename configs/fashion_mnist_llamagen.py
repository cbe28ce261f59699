"""The quickstart on Fashion-MNIST (60,000 pictures of clothes; Debian's package dataset-fashion-mnist).

python train.py configs/fashion_mnist_llamagen.py
python sample.py runs/fashion_mnist_llamagen
"""

import dataclasses

import mnist5k_llamagen

from ar_jax.config import Experiment
from ar_jax.data import Data


def get_config() -> Experiment:
    base = mnist5k_llamagen.get_config()
    return dataclasses.replace(base, name="fashion_mnist_llamagen", data=Data(name="idx", size=32))
