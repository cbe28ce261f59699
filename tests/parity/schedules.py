"""Learning rates, weight decay and loss weights over time."""

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.generators.causal import lognorm
from ar_jax.generators.rar import Annealed
from ar_jax.tokens import TokenSpec, pyramid
from ar_jax.train.optim import Optim, decay_schedule, schedule

HOLDS = {"lin0": 0.05, "lin": 0.15}  # VAR's linear schedules by name: the part before the fall


def training_schedules(folder):
    h, steps = folder.h, jnp.asarray(folder.io["iterations"])
    v, c = h["var"], h["cosine"]
    common = {"lr": v["peak_lr"], "warmup": v["warmup"], "warmup_start": v["warmup_start_ratio"], "last": True,
              "end_lr": v["end_ratio"] * v["peak_lr"]}  # fmt: skip

    def rates(total, **settings):
        return jax.vmap(schedule(Optim(**settings), total))(steps)

    decay = Optim(weight_decay=v["weight_decay"], weight_decay_end=v["weight_decay_end"])
    spec = TokenSpec(pyramid(tuple(h["patch_nums"])))
    return {
        **{f"var_lr_{name}": rates(v["total"], schedule="linear", hold=hold, **common) for name, hold in HOLDS.items()},
        "var_lr_cos": rates(v["total"], schedule="cosine", **common),
        "var_weight_decay": jax.vmap(decay_schedule(decay, v["total"]))(steps),
        "cosine_lr": rates(c["total"], lr=c["base_lr"], warmup=c["warmup"], schedule="cosine", end_lr=c["end_lr"]),
        "rar_random_ratio": jax.vmap(Annealed(**h["rar_random_ratio"]).random)(steps),
        "hmar_loss_weight_lognorm": lognorm(spec),
        "hmar_loss_weight_equal": np.concatenate([np.full(h * w, 1 / (h * w)) for h, w in spec.scales]),
    }


CASES = {"training_schedules": training_schedules}
