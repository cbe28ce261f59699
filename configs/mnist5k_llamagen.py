"""Quickstart: LlamaGen's method on 5,000 real digits, sized for two CPU cores.

    python train.py configs/mnist5k_llamagen.py
    python sample.py runs/mnist5k_llamagen
"""

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
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
                size=(32, 32), features=16, mult=(1, 2, 4), res_blocks=1, latent=32, codes=256, code_features=8, groups=8,
                vq=VectorLoss(entropy=0.02),
            ),
            losses=Losses(lpips=0.0, adversarial=0.0),
            steps=1500, batch=64, optim=Optim(lr=1e-3, weight_decay=0.0, warmup=100, schedule="cosine"),
            preview_every=500, save_every=500,
        ),
        generator=GeneratorStage(
            module=Causal(Transformer(layers=4, width=192, heads=6, hidden=512, dropout=0.1), Label(192), dropout=0.1),
            steps=2000, batch=64, optim=Optim(lr=1e-3, warmup=100, schedule="cosine", ema=0.995),
            sampling=Sampling(guidance=2.0, top_k=0, top_p=1.0),
            preview_every=1000, save_every=1000,
        ),
    )  # fmt: skip
