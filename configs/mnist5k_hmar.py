"""HMAR's method (arXiv:2506.04421) on 5,000 real digits, sized for two CPU cores.

python train.py configs/mnist5k_hmar.py
python sample.py runs/mnist5k_hmar
python tests/code_usage.py runs/mnist5k_hmar

The tokenizer is that of mnist5k_var.py. Both branches are trained at once. Redrawing may be changed while sampling:
--refine "1 1,3 1,1,2,5" draws anew in 2x2 and 3x3, --refine "" nowhere.
"""

from ar_jax.config import Experiment, GeneratorStage, Losses, Sampling, TokenizerStage
from ar_jax.data import Data
from ar_jax.decode.guidance import Ramp
from ar_jax.decode.logits import Filter
from ar_jax.generators.hmar import Hmar
from ar_jax.generators.inputs import NextScale
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.conditioning import Label
from ar_jax.orders import scales
from ar_jax.tokenizers.residual_pyramid import ResidualPyramid
from ar_jax.train.optim import Optim


def net(layers: int, final: bool = True) -> AdaLN:
    return AdaLN(layers, width=128, heads=4, sees="step", final=final, depth=4)


def get_config() -> Experiment:
    head = Categorical(bias=True, std=0.001)
    return Experiment(
        name="mnist5k_hmar",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=ResidualPyramid(
                size=(32, 32), scales=(1, 2, 3, 4, 6, 8), features=8, mult=(1, 2, 4), res_blocks=1, codes=256,
                code_features=8, groups=4,
            ),
            losses=Losses(lpips=0.0, adversarial=0.0, reset_after=20),
            steps=600, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine"),
            log_every=50, preview_every=300, save_every=300,
        ),
        generator=GeneratorStage(
            module=Hmar(
                net(2, final=False), Label(128, std=0.05), head, NextScale(channels=8), emphasis="lognorm", tail=net(2),
                masks=net(2), mask_head=head, refine=((1,), (1, 3), (1, 1, 2, 5), (4, 4, 8)),
            ),
            order=scales, steps=500, batch=64, optim=Optim(lr=2e-3, warmup=50, schedule="cosine", clip=2.0, ema=0.99),
            sampling=Sampling(Ramp(1.5), filter=Filter(100, top_p=0.96)),
            log_every=50, preview_every=250, save_every=250,
        ),
    )  # fmt: skip
