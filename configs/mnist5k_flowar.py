"""FlowAR's method (arXiv:2412.15205) on 5,000 real digits, sized for two CPU cores.

python train.py configs/mnist5k_flowar.py
python sample.py runs/mnist5k_flowar

1,000 samples agree with their class for 99.2% (tests/agreement.py); tokenizer and generator took 20 minutes beside another
training on the same cores.
"""

import dataclasses

from mnist5k_mar import get_config as mar

from ar_jax.config import Experiment, GeneratorStage, Sampling
from ar_jax.decode.guidance import Ramp
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import NextLatent
from ar_jax.heads.joint_flow import JointFlow
from ar_jax.nets.conditioning import Label
from ar_jax.nets.gated import EncoderDecoder
from ar_jax.orders import scales
from ar_jax.tokenizers.latent_pyramid import LatentPyramid
from ar_jax.train.optim import Optim


def get_config() -> Experiment:
    tokenizer = mar().tokenizer
    return Experiment(
        name="mnist5k_flowar",
        data=mar().data,
        tokenizer=dataclasses.replace(tokenizer, module=LatentPyramid(tokenizer.module, scales=(1, 2, 4, 8))),
        generator=GeneratorStage(
            module=Causal(
                EncoderDecoder(layers=2, width=96, heads=4, span=8, last_positions=True),
                Label(96),
                JointFlow(width=96, depth=2, heads=4, span=8, steps=16),
                NextLatent(channels=tokenizer.module.latent),
            ),
            order=scales, steps=1000, batch=64,
            optim=Optim(lr=1e-3, weight_decay=0.02, clip=3.0, warmup=100, schedule="cosine", ema=0.99),
            sampling=Sampling(Ramp(2.0)),
            log_every=50, preview_every=500, save_every=500,
        ),
    )  # fmt: skip
