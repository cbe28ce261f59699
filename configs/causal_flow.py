"""Next-token prediction of continuous tokens with a flow head.

    python train.py configs/causal_flow.py:VARIANT
    python sample.py runs/VARIANT_causal_flow

What ran here, pictures, and addresses of released weights: configs/README.md.

Small, for two CPU cores:

    mnist5k          5,000 real digits, patches of pixels; 10 minutes
"""

from ar_jax.config import Experiment, GeneratorStage, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.heads.flow import Flow
from ar_jax.nets.conditioning import Label
from ar_jax.nets.transformer import Transformer
from ar_jax.tokenizers.patches import Patches
from ar_jax.train.optim import Optim


def mnist5k() -> Experiment:
    return Experiment(
        name="mnist5k_causal_flow",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(module=Patches(size=(32, 32), patch=4, channels=1)),
        generator=GeneratorStage(
            module=Causal(
                Transformer(layers=4, width=128, heads=4, hidden=384), Label(128), Flow(width=128, depth=3, steps=16)
            ),
            steps=700, batch=64, optim=Optim(lr=1e-3, clip=3.0, warmup=50, schedule="cosine", ema=0.99),
            sampling=Sampling(Interval(3.0), Constant(0.9)),
            log_every=50, preview_every=350, save_every=350,
        ),
    )  # fmt: skip


VARIANTS = {"mnist5k": mnist5k}
