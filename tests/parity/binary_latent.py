"""Binary Latent Diffusion: the Bernoulli autoencoder, and the diffusion of its bits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import constant_knobs, fixed, guided_rows, nchw, nhwc

from ar_jax.convert import binary_latent as source
from ar_jax.convert.names import to_params, to_weights
from ar_jax.convert.sources import param_shapes
from ar_jax.data import Info
from ar_jax.generators.base import Setting, Step
from ar_jax.generators.binary_diffusion import BinaryDiffusion, Denoised, Scaled, Shown, kept_bits, step_factors
from ar_jax.tokenizers.binary_autoencoder import BinaryAutoencoder, penalty


class GivenTosses(BinaryDiffusion):
    """Takes uniform numbers of a table [1+steps b n k]."""

    table: Any = None

    def tosses(self, now, shape):
        table = jnp.asarray(self.table)
        return table[0], table[jnp.minimum(now.i + 1, len(table) - 1)]


def autoencoder(h, **fields):
    levels = [h["img_size"] // 2**i for i in range(len(h["ch_mult"]))]
    return BinaryAutoencoder(
        size=(h["img_size"],) * 2, features=h["nf"], mult=tuple(h["ch_mult"]), res_blocks=h["res_blocks"],
        latent=h["emb_dim"], norm_first=h["norm_first"], code_weight=0.1,
        attention=tuple(i for i, side in enumerate(levels) if side in h["attn_resolutions"]), **fields,
    )  # fmt: skip


def of_bld(h):
    return autoencoder(h, bits=h["codebook_size"], groups=h["norm_num_groups"])


def split(folder, prefix):
    weights = folder.weights
    return {key: np.asarray(weights[key]) for key in weights if key.startswith(prefix)}


def of_images(folder):
    io = folder.io
    tokenizer = of_bld(folder.h)
    weights, rules = split(folder, "ae."), source.tokenizer_rules(tokenizer)
    unused = [key for key in weights if key.endswith(("conv_out.weight", "conv_out.bias"))]
    params = jax.tree.map(jnp.asarray, to_params(weights, param_shapes(tokenizer), rules, unused))

    @jax.jit
    def run(params, image, uniform, code):
        call = functools.partial(tokenizer.apply, {"params": params})
        p = call(image, method="probabilities")
        likelier, drawn = call(p, None, method="drawn_bits"), (uniform < p).astype(jnp.float32)

        def objective(params):
            def run(self):
                p = self.probabilities(image)
                recon = self.pixels(self.summed(drawn + p - jax.lax.stop_gradient(p)))
                return jnp.abs(recon - image).mean() + self.code_weight * penalty(p), recon

            return tokenizer.apply({"params": params}, method=run)

        (loss, recon), grads = jax.value_and_grad(objective, has_aux=True)(params)
        tokens = code.reshape(len(code), -1, tokenizer.bits).astype(jnp.int32)
        return grads, {
            "encoder_out": nchw(call(image, method="latents")),
            "bit_probabilities": nchw(p),
            "bits_deterministic": nchw(likelier),
            "recon_deterministic": nchw(call(image, method="autoencode")[0]),
            "bits_sampled": nchw(drawn),
            "recon_sampled": nchw(recon),
            "penalty": penalty(p),
            "ae_loss": loss,
            "code_image": nchw(call(tokens, method="decode")),
        }

    grads, outputs = run(params, *(nhwc(io[name]) for name in ("image", "code_uniform", "code")))
    return outputs | {f"ae_loss.grad.{k.removeprefix('ae.')}": v for k, v in to_weights(grads, rules).items()}


def denoiser(folder):
    h = folder.h
    fixed(h, norm_eps=1e-6, p_flip=True)
    generator = GivenTosses(
        Scaled(h["layers"], h["width"], h["heads"]), Shown(h["width"]), times=h["total_steps"], rule=h["beta_type"]
    ).complete(of_bld(h).spec, Info(classes=h["num_classes"]))
    assert generator.spec.n == h["grid"] ** 2
    rules = source.generator_rules(generator, "sampler.")
    params = to_params(split(folder, "sampler."), param_shapes(generator), rules)
    return generator, jax.tree.map(jnp.asarray, params), rules


def of_bits(folder):
    h, io = folder.h, folder.io
    generator, params, rules = denoiser(folder)
    x0, xt, t = (jnp.asarray(io[name], jnp.int32) for name in ("x0", "xt", "t"))
    labels, uniform = {"label": jnp.asarray(io["labels"], jnp.int32)}, jnp.asarray(io["noise_uniform"])
    outputs = {}
    for rule in ("linear", "cos", "sigmoid"):
        kept = kept_bits(h["total_steps"], rule)
        outputs |= {f"k_{rule}": kept, f"step_{rule}": step_factors(kept)}

    def logits(self, noisy, drop):
        return self.logits(noisy, t, self.condition(labels, jnp.full(len(noisy), drop)))

    @jax.jit
    def shown(params):
        call = functools.partial(generator.apply, {"params": params})
        return {
            "denoiser_logits": call(xt, False, method=logits),
            "denoiser_logits_null": call(xt, True, method=logits),
            "q_prob": call(x0, t, method="likely"),
        }

    outputs |= shown(params)
    for case in folder.of("diffusion loss"):
        name = case.outputs[0].removeprefix("loss_")
        focal, aux = {
            "balanced": (0.0, 0.0), "bce_weighted": (-1.0, 0.0), "focal_aux": (float(h["focal_gamma"]), h["aux_weight"])
        }[name]  # fmt: skip
        variant = generator.clone(focal=focal, fading=name != "balanced", aux=aux)

        def objective(params, variant=variant):
            def run(self):
                noisy = (uniform < self.likely(x0, t)).astype(jnp.int32)
                loss, aux = self.errors(x0, noisy, t, logits(self, noisy, False))
                return loss.mean(), aux

            return variant.apply({"params": params}, method=run)

        (loss, aux), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
        outputs |= {f"loss_{name}": loss, f"aux_{name}": aux}
        outputs |= {
            f"loss_{name}.grad.{key.removeprefix('sampler._denoise_fn.')}": value
            for key, value in to_weights(grads, rules).items()
        }
    return outputs | sampled(folder, generator, params)


def sampled(folder, generator, params):
    h, io = folder.h, folder.io
    table = jnp.asarray(io["sample_uniform"])
    images, outputs = table.shape[1], {}
    labels = {"label": jnp.full(images, int(io["sample_label"]), jnp.int32)}
    for name, steps, temperature, weight in (
        ("sample_full", h["total_steps"], 1.0, 1.0),
        ("sample_skip", h["sample_steps"], h["temperature"], 1.0),
        ("sample_guided", h["sample_steps"], h["temperature"], 1 + h["guidance"]),
    ):
        order = Denoised(steps)(generator.spec)
        given, knobs = generator.clone(table=table), constant_knobs(np.full(steps, weight), temperature)

        @jax.jit
        def run(params, given=given, order=order, knobs=knobs, steps=steps, guided=weight != 1):
            setting = Setting(guided_rows(given, params, labels, guided), order, knobs)
            call = functools.partial(given.apply, {"params": params})
            keys = jax.random.split(jax.random.key(0), (images, order.n))

            def step(state, i):
                state = call(state, Step(i, i, keys), setting, method="step")
                return state, state.tokens

            state = call(setting, images, method="begin")
            return jax.lax.scan(step, state, jnp.arange(steps))[1]

        first = (table[:1] < 0.5).astype(jnp.int32)
        outputs[name] = np.concatenate([first, run(params)])
    return outputs


def both(folder):
    return of_images(folder) | of_bits(folder)


def elm(folder):
    """ELM's tokenizer: the same network, on images in [0, 1]."""
    h, io = folder.h, folder.io
    fixed(h, norm_eps=1e-6)
    tokenizer = autoencoder(h, bits=h["code_bits"], groups=h["norm_groups"], unit=True)
    rules = source.tokenizer_rules(tokenizer)
    weights = {f"ae.{key}": np.asarray(folder.weights[key]) for key in folder.weights}
    unused = [key for key in weights if key.endswith(("conv_out.weight", "conv_out.bias"))]
    params = jax.tree.map(jnp.asarray, to_params(weights, param_shapes(tokenizer), rules, unused))

    @jax.jit
    def run(params, image, uniform):
        call = functools.partial(tokenizer.apply, {"params": params})
        p = call(2 * image - 1, method="probabilities")
        likelier, drawn = call(p, None, method="drawn_bits"), (uniform < p).astype(jnp.float32)

        def objective(params):
            def run(self):
                p = self.probabilities(2 * image - 1)
                recon = (self.pixels(self.summed(drawn + p - jax.lax.stop_gradient(p))) + 1) / 2
                return jnp.abs(recon - image).mean(), recon

            return tokenizer.apply({"params": params}, method=run)

        (_, recon), grads = jax.value_and_grad(objective, has_aux=True)(params)
        tokens = likelier.reshape(len(image), -1, tokenizer.bits).astype(jnp.int32)
        return grads, {
            "encoder_features": nchw(call(2 * image - 1, method="latents")),
            "bit_probabilities": nchw(p),
            "bits_deterministic": nchw(likelier),
            "bits_drawn": nchw(drawn),
            "reconstruction": nchw(recon),
            "code_loss": penalty(p),
            "decoded": nchw((call(tokens, method="decode") + 1) / 2),
        }

    grads, outputs = run(params, *(nhwc(io[name]) for name in ("image", "uniforms")))
    (case,) = folder.of("decode")
    assert case.arguments["bits"] == "bits_deterministic"
    named = {key.removeprefix("ae."): value for key, value in to_weights(grads, rules).items()}
    return outputs | {f"grad.{key}": named[key] for key in h["grads"]}


CASES = {"binary_latent": both, "elm_bae": elm}
