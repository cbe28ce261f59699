"""FlowAR's method (arXiv:2412.15205) on 5,000 real digits, sized for two CPU cores.

python train.py configs/mnist5k_flowar.py
python sample.py runs/mnist5k_flowar
"""

from ar_jax.config import Experiment, GeneratorStage, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.generators.causal import Causal
from ar_jax.generators.inputs import NextLatent
from ar_jax.heads.joint_flow import JointFlow
from ar_jax.nets.conditioning import Label
from ar_jax.nets.gated import EncoderDecoder
from ar_jax.orders import scales
from ar_jax.tokenizers.latent_pyramid import LatentPyramid
from ar_jax.tokenizers.patches import Patches
from ar_jax.train.optim import Optim


def get_config() -> Experiment:
    return Experiment(
        name="mnist5k_flowar",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=LatentPyramid(Patches(size=(32, 32), patch=4, channels=1), scales=(1, 2, 4, 8))
        ),
        generator=GeneratorStage(
            module=Causal(
                EncoderDecoder(layers=2, width=96, heads=4, span=8, last_positions=True),
                Label(96),
                JointFlow(width=96, depth=2, heads=4, span=8, steps=16),
                NextLatent(channels=16),
            ),
            order=scales, steps=1200, batch=64,
            optim=Optim(lr=1e-3, weight_decay=0.02, clip=3.0, warmup=100, schedule="cosine", ema=0.995),
            sampling=Sampling(guidance=1.5, guidance_rule="ramp"),
            log_every=50, preview_every=500, save_every=500,
        ),
    )  # fmt: skip
