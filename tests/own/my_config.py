"""The toy method on 5,000 digits.

python train.py tests/own/my_config.py
python sample.py runs/mine --trust tests/own/my_method.py
"""

from my_method import Bounded, FrontLoaded, Late, Smoothed, Twice, backwards

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.train.optim import Optim


def get_config() -> Experiment:
    return Experiment(
        name="mine",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=Bounded((32, 32), features=8, mult=(1, 2, 4), res_blocks=1, latent=32, codes=256, groups=4),
            losses=Losses(lpips=0.0, adversarial=0.0),
            steps=250, batch=64, optim=Optim(lr=2e-3),
        ),
        generator=GeneratorStage(
            module=FrontLoaded(Transformer(layers=4, width=128, heads=4, hidden=384), Label(128), Smoothed()),
            order=backwards, sampling=Sampling(Late(1.5), decoder=Twice()),
            steps=500, batch=64, optim=Optim(lr=2e-3, ema=0.99),
        ),
    )  # fmt: skip
