"""Parity of the small networks: each function computes its fixture's outputs from the inputs alone, NCHW."""

import jax
import numpy as np

from ar_jax.nets import lpips as lpips_net
from ar_jax.nets import patchgan as gan


def lpips(meta: dict, weights: dict[str, np.ndarray], io: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    sizes = meta["hyperparameters"]
    model = lpips_net.Lpips(tuple(sizes["stage_channels"]), tuple(sizes["convs_per_stage"]))
    params = lpips_net.lpips_params(weights)
    a, b = _nhwc(io["a"]), _nhwc(io["b"])
    features = model.apply(params, a, method="features")
    return {
        "distance": model.apply(params, a, b)[:, None, None, None],
        "grad_a": _nchw(jax.grad(lambda a: model.apply(params, a, b).mean())(a)),
        **{f"feature_{i}": _nchw(x) for i, x in enumerate(features)},
    }


def patchgan(meta: dict, weights: dict[str, np.ndarray], io: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    sizes = dict(meta["hyperparameters"])
    assert sizes.pop("in_channels") == 3
    model = gan.PatchGan(**sizes)
    params, stats = gan.patchgan_params(weights)

    def logits(x, train=True):
        return model.apply(params, x, stats, train)[0]

    real, fake = logits(_nhwc(io["real"])), logits(_nhwc(io["fake"]))
    return {
        "train_logits_real": _nchw(real),
        "train_logits_fake": _nchw(fake),
        "eval_logits_fake": _nchw(logits(_nhwc(io["fake"]), train=False)),
        "hinge_d": gan.hinge_discriminator(real, fake),
        "vanilla_d": gan.vanilla_discriminator(real, fake),
        "non_saturating_d": gan.non_saturating_discriminator(real, fake),
        "hinge_g": gan.hinge_generator(fake),
        "non_saturating_g": gan.non_saturating_generator(fake),
        "hinge_g_grad_fake": _nchw(jax.grad(lambda x: gan.hinge_generator(logits(x)))(_nhwc(io["fake"]))),
    }


def _nhwc(x):
    return np.transpose(x, (0, 2, 3, 1))


def _nchw(x):
    return np.transpose(x, (0, 3, 1, 2))


CASES = {"lpips": lpips, "patchgan": patchgan}
