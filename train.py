"""Trains the tokenizer and the generator of a config: `python train.py CONFIG`.

    python train.py configs/llamagen.py                the variants of a family
    python train.py configs/llamagen.py:mnist5k
    python train.py CONFIG --help                      all settings and their values

The way to the loss: `train` in ar_jax/train/__main__.py makes a recipe (`generator_recipe` in ar_jax/train/recipes.py),
`fit` in ar_jax/train/loop.py runs it, and the recipe's loss is the method `loss` of the generator's module.
"""

import sys

from ar_jax.machine.huge_pages import use_huge_pages
from ar_jax.train.__main__ import main

if __name__ == "__main__":
    use_huge_pages()
    main(sys.argv[1:])
