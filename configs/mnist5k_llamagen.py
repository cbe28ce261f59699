"""Quickstart: LlamaGen's method (arXiv:2406.06525) on 5,000 real digits, sized for two CPU cores.

python train.py configs/mnist5k_llamagen.py
python sample.py runs/mnist5k_llamagen
"""

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.train.optim import Optim


def get_config() -> Experiment:
    return Experiment(
        name="mnist5k_llamagen",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=VQGAN(
                size=(32, 32), features=8, mult=(1, 2, 4), res_blocks=1, latent=32, codes=256, groups=4,
                vq=VectorLoss(entropy=0.02),
            ),
            losses=Losses(lpips=0.0, adversarial=0.0),
            steps=250, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine"),
            log_every=50, preview_every=125, save_every=125,
        ),
        generator=GeneratorStage(
            module=Causal(Transformer(layers=4, width=128, heads=4, hidden=384), Label(128)),
            steps=500, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(2.5), Constant(0.9)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip
