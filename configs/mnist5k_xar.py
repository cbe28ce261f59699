"""xAR's method (arXiv:2502.20388) on 5,000 real digits, sized for two CPU cores.

python train.py configs/mnist5k_xar.py
python sample.py runs/mnist5k_xar

1,000 samples agree with their class for 95.5% (tests/agreement.py); the training took 12.5 minutes beside another one on
the same cores.
"""

from ar_jax.config import Experiment, GeneratorStage, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Interval
from ar_jax.generators.block_flow import BlockFlow
from ar_jax.nets.conditioning import Label
from ar_jax.nets.gated import EncoderDecoder
from ar_jax.orders import Cells
from ar_jax.tokenizers.patches import Patches
from ar_jax.train.optim import Optim


def get_config() -> Experiment:
    return Experiment(
        name="mnist5k_xar",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(module=Patches(size=(32, 32), patch=4, channels=1)),
        generator=GeneratorStage(
            module=BlockFlow(EncoderDecoder(layers=2, width=128, heads=4), Label(128, std=1.0), steps=25),
            order=Cells(4), steps=1200, batch=64,
            optim=Optim(lr=1e-3, betas=(0.9, 0.96), weight_decay=0.02, warmup=100, schedule="cosine", ema=0.995),
            sampling=Sampling(Interval(3.0)),
            log_every=50, preview_every=600, save_every=600,
        ),
    )  # fmt: skip
