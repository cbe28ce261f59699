"""RAR: MaskGIT's tokenizer and the transformer."""

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import along, draws, fixed, loaded, logits, nchw, nhwc

from ar_jax.convert import rar as source
from ar_jax.data import Info
from ar_jax.decode.sampling import Sampling
from ar_jax.decode.temperature import Constant
from ar_jax.generators.causal import Causal
from ar_jax.generators.rar import Aimed, Placed, PowerCosine, StartLabel
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.attention import Rows
from ar_jax.nets.conditioning import fold
from ar_jax.orders import Order, raster, to_ranks
from ar_jax.tokenizers.maskgit_vqgan import MaskgitVQGAN
from ar_jax.tokenizers.quantize import VectorLoss
from ar_jax.tokens import TokenSpec, grid


def vq(folder):
    h, io = folder.h, folder.io
    tokenizer = MaskgitVQGAN(
        size=folder.shape("image")[2:], features=h["hidden_channels"], mult=tuple(h["channel_mult"]),
        res_blocks=h["num_res_blocks"], codes=h["codebook_size"], code_features=h["z_channels"],
        groups=h["norm_num_groups"], channels=h["num_channels"],
        vq=VectorLoss(codebook=h["commitment_cost"], commit=1.0),
    )  # fmt: skip
    fixed(h, downsample=tokenizer.downsample)
    params, _ = loaded(tokenizer, folder.weights, source)

    @jax.jit
    def run(params, image, z, readout, tokens):
        call = lambda *args, method: tokenizer.apply({"params": params}, *args, method=method)  # noqa: E731

        def codes(tokens):
            return nchw(call(tokens, method="embed").reshape(len(tokens), *tokenizer.grid, -1))

        def objective(params, z):
            quant, _, losses = tokenizer.apply({"params": params}, z, method="quantise")
            loss = sum(losses.values())
            return loss + (quant * readout).sum(), loss

        (grad_params, grad_z), loss = jax.grad(objective, argnums=(0, 1), has_aux=True)(params, z)
        shown = (call(tokens, method="decode") + 1) / 2
        indices = call(image, method="encode")
        return {
            "latent": nchw(call(image, method="latents")),
            "indices": indices,
            "quant": codes(indices),
            "recon": nchw(jnp.clip((call(indices, method="decode") + 1) / 2, 0, 1)),
            "code_quant": codes(tokens),
            "code_decoder_raw": nchw(shown),
            "code_image": nchw(jnp.clip(shown, 0, 1)),
            "loss": loss,
            "loss_grad_latent": nchw(grad_z),
            "loss_grad_codebook": grad_params["codebook"],
        }

    tokens = io["codes"].reshape(len(io["codes"]), -1, 1)
    return run(params, 2 * nhwc(io["image"]) - 1, nhwc(io["loss_latent"]), nhwc(io["loss_readout"]), tokens)


def build(folder):
    """The generator and its parameters; the tables have more rows than it uses."""
    h, weights = folder.h, folder.weights
    backbone = Placed(
        h["num_hidden_layers"], h["hidden_size"], h["num_attention_heads"], hidden=h["intermediate_size"],
        eps=h["norm_eps"], rows=weights["timesteps_embeddings"].shape[1],
    )  # fmt: skip
    head, inputs = Categorical(bias=True, std=0.02), Aimed(rows=weights["pos_embed"].shape[1] - 2)
    spec = TokenSpec(grid(1, h["image_seq_len"]), codes=(h["codebook_size"],))
    generator = Causal(backbone, StartLabel(h["hidden_size"]), head, inputs).complete(
        spec, Info(classes=h["condition_num_classes"])
    )
    return generator, loaded(generator, weights, source)[0]


def teacher_forced(generator, tokens, batch, drop, order):
    """Logits [b n+1 v], of which nothing looks at the last row; the mean loss; the conditions' vectors; of a bound generator."""
    cond, ranked, n = generator.condition(batch, drop), to_ranks(tokens, order), order.n
    loss, weight, _ = generator.loss(tokens, batch, order, drop=drop)
    # that row is never fed in training or sampling: the last token at its place, without an aim
    slot = jnp.asarray(order.slot)[:, -1:]
    last = generator.inputs.embed(ranked[:, -1:]) + generator.inputs.position[slot]
    x = jnp.concatenate([cond.rows[:, :1], generator.inputs(ranked, cond, order, None, 0, n)[0], last], axis=1)
    h, _ = generator.backbone(x, Rows(np.arange(n + 2)), mod=cond.mod)
    h = jnp.concatenate([generator.hidden(ranked, cond, order), h[:, -1:]], axis=1)
    return generator.head(h), (loss * weight).sum() / weight.sum(), cond.mod


def transformer(folder):
    h, io = folder.h, folder.io
    generator, params = build(folder)
    spec, tokens = generator.spec, jnp.asarray(io["tokens"])[..., None]
    batch, drop = {"label": jnp.asarray(io["labels"])}, jnp.asarray(io["drop"], bool)

    @jax.jit
    def forced(params, slot):
        order = Order(slot, (1,) * spec.n)
        out = generator.apply({"params": params}, tokens, batch, drop, order, method=teacher_forced)
        return *out, to_ranks(tokens, order)

    shown, loss, vectors, targets = forced(params, io["orders"])
    own_row = (np.asarray(vectors)[:, None] == folder.weights["embeddings.weight"]).all(-1)
    outputs = {
        "condition_ids": own_row.argmax(1),
        "tf_logits": shown,
        "tf_loss": loss,
        "tf_labels": targets,
        "tf_logits_raster": forced(params, np.tile(raster(spec).slot, (len(tokens), 1)))[0],
    }
    labels, order = {"label": jnp.asarray(io["gen_labels"])}, raster(spec)
    for end, power in (("", h["guidance_scale_pow"]), ("_constant", 0.0)):
        guidance = PowerCosine(h["guidance_scale"], power)
        greedy = Sampling(guidance, Constant(0.0)).knobs(order, spec)
        drawn = draws(generator, params, labels, raster, greedy, guided=True)
        raw = along(generator, params, labels, raster, drawn, logits)
        neighbours = np.stack(np.split(raw, 2), 1).reshape(raw.shape)
        warm = Constant(h["randomize_temperature"])(order, spec)[:, None]
        outputs |= {
            f"gen_tokens{end}": drawn,
            f"gen_raw_logits{end}": raw,
            f"gen_probs{end}": jax.nn.softmax(fold(neighbours, 2, greedy.guidance[:, None]) / warm),
            f"cfg_schedule{end}": greedy.guidance,
        }
    return outputs


CASES = {"maskgit_vqgan": vq, "rar": transformer}
