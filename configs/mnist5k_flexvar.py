"""FlexVAR's method (arXiv:2502.20313) on 5,000 real digits, sized for two CPU cores.

python train.py configs/mnist5k_flexvar.py
python tests/code_usage.py runs/mnist5k_flexvar

FIGURES
"""

from ar_jax.config import Experiment, Losses, TokenizerStage
from ar_jax.data import Data
from ar_jax.tokenizers.pyramid import Pyramid
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.train.optim import Optim


def get_config() -> Experiment:
    return Experiment(
        name="mnist5k_flexvar",
        data=Data(name="mnist5k", size=32),
        tokenizer=TokenizerStage(
            module=Pyramid(
                size=(32, 32), scales=(1, 2, 3, 4, 6, 8), features=8, mult=(1, 2, 4), res_blocks=1, latent=32, codes=256,
                code_features=8, groups=4, vq=VectorLoss(entropy=0.02),
            ),
            losses=Losses(lpips=0.0, adversarial=0.0, reset_after=20),
            steps=600, batch=64, optim=Optim(lr=2e-3, weight_decay=0.0, warmup=40, schedule="cosine"),
            log_every=50, preview_every=300, save_every=300,
        ),
    )  # fmt: skip
