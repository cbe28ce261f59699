"""The networks of tokenizer training: LPIPS and PatchGAN."""

import jax
from parity.common import fixed, nchw, nhwc

from ar_jax.nets import lpips as lpips_net
from ar_jax.nets import patchgan as gan


def all_of(weights, params, others=()):
    """Every key of a file is a parameter, or one of others."""
    assert len(jax.tree.leaves(params)) + len(others) == len(weights)


def lpips(folder):
    h, io = folder.h, folder.io
    model = lpips_net.Lpips(tuple(h["stage_channels"]), tuple(h["convs_per_stage"]))
    params = lpips_net.lpips_params(folder.weights)
    all_of(folder.weights, params, ("scaling_layer.shift", "scaling_layer.scale"))

    @jax.jit
    def run(params, a, b):
        features = model.apply(params, a, method="features")
        return {
            "distance": model.apply(params, a, b),
            "grad_a": nchw(jax.grad(lambda a: model.apply(params, a, b).mean())(a)),
            **{f"feature_{i}": nchw(x) for i, x in enumerate(features)},
        }

    return run(params, nhwc(io["a"]), nhwc(io["b"]))


def patchgan(folder):
    h, io = folder.h, folder.io
    fixed(h, in_channels=3)
    model = gan.PatchGan(**{name: h[name] for name in h if name != "in_channels"})
    params, stats = gan.patchgan_params(folder.weights)
    counters = [key for key in folder.weights if key.endswith(".num_batches_tracked")]
    all_of(folder.weights, (params, stats), counters)

    @jax.jit
    def run(params, stats, real, fake):
        def logits(x, train=True):
            return model.apply(params, x, stats, train)[0]

        judged_real, judged_fake = logits(real), logits(fake)
        return {
            "train_logits_real": nchw(judged_real),
            "train_logits_fake": nchw(judged_fake),
            "eval_logits_fake": nchw(logits(fake, train=False)),
            "hinge_d": gan.hinge_discriminator(judged_real, judged_fake),
            "vanilla_d": gan.vanilla_discriminator(judged_real, judged_fake),
            "non_saturating_d": gan.non_saturating_discriminator(judged_real, judged_fake),
            "hinge_g": gan.hinge_generator(judged_fake),
            "non_saturating_g": gan.non_saturating_generator(judged_fake),
            "hinge_g_grad_fake": nchw(jax.grad(lambda x: gan.hinge_generator(logits(x)))(fake)),
        }

    return run(params, stats, nhwc(io["real"]), nhwc(io["fake"]))


CASES = {"lpips": lpips, "patchgan": patchgan}
