"""GIVT's Gaussian mixtures (arXiv:2312.02116) on 5,000 real digits, sized for two CPU cores.

python train.py configs/mnist5k_givt.py
python sample.py runs/mnist5k_givt
"""

from mnist5k_mar import get_config as mar

from ar_jax.config import Experiment, GeneratorStage, Sampling
from ar_jax.decode.guidance import Interval
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.heads.gaussian_mixture import GaussianMixture
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.train.optim import Optim


def get_config() -> Experiment:
    return Experiment(
        name="mnist5k_givt",
        data=mar().data,
        tokenizer=mar().tokenizer,
        generator=GeneratorStage(
            module=Causal(Transformer(layers=4, width=128, heads=4, hidden=384), Label(128), GaussianMixture(8)),
            steps=700, batch=64, optim=Optim(lr=1e-3, clip=3.0, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(1.4), Constant(0.95)),
            log_every=50, preview_every=350, save_every=350,
        ),
    )  # fmt: skip
