"""DQ-VAE: the tokenizer with two densities, and the transformers of places and contents."""

import jax
import jax.numpy as jnp
import numpy as np
from parity.common import fixed, loaded, nchw, nhwc

from ar_jax.convert import dqvae as source
from ar_jax.convert.names import to_weights
from ar_jax.data import Info
from ar_jax.generators.dq_transformer import DQTransformer, StartClass, grids
from ar_jax.nets.vit import Successive
from ar_jax.orders import raster
from ar_jax.tokenizers.dqvae import DQVAE, budget_loss, patch_entropy
from ar_jax.tokenizers.quantize_averaged import centres, followed, restarted
from ar_jax.tokens import TokenSpec, pyramid


def vq(folder):
    h, io, weights = folder.h, folder.io, folder.weights
    levels = len(h["encoder_ch_mult"])
    sides = [h["resolution"] // 2**level for level in range(levels)]
    tokenizer = DQVAE(
        size=folder.shape("image")[2:], features=h["base_channels"], mult=tuple(h["encoder_ch_mult"]),
        decoder_mult=tuple(h["decoder_ch_mult"]), res_blocks=h["num_res_blocks"], latent=h["z_channels"],
        codes=h["codebook_size"], code_features=h["codebook_dim"], groups=h["norm_num_groups"],
        attention=tuple(level for level, side in enumerate(sides) if side in h["attn_resolutions"]),
        ratio=h["target_ratio"], budget=h["budget_gamma"], commit=h["commitment_beta"],
        threshold=h["entropy_threshold"], router_groups=h["router_num_groups"],
    )  # fmt: skip
    fixed(
        h, norm_eps=1e-6, coarse_size=tokenizer.grid[0],
        fine_size=tokenizer.fine_grid[0], coarse_loss_weight=0.25, entropy_patch=tokenizer.downsample,
    )  # fmt: skip
    params, _ = loaded(tokenizer, weights, source)
    average = tokenizer.codebooks[0].average
    fixed(h, ema_decay=average.decay, ema_eps=average.eps)
    sizes, sums = (jnp.asarray(weights[f"quantize.codebook.{name}"]) for name in ("cluster_size_ema", "embed_ema"))

    def whole(tokenizer, image, gumbel=None):
        found = tokenizer.mixed(image, gumbel)
        z = tokenizer.quant(found.latents)
        codes, index, losses = tokenizer.quantise(z, found.fine)
        return found, z, codes, index, sum(losses.values()), tokenizer.pixels(codes)

    def objective(params, image, gumbel):
        found, z, _, index, quant, recon = tokenizer.apply({"params": params}, image, gumbel, method=whole)
        budget = tokenizer.budget * budget_loss(found.gate, tokenizer.ratio)
        return jnp.abs(image - recon).mean() + quant + budget, (found, z, index, quant, budget)

    @jax.jit
    def run(params, image, gumbel, permutation, entropy_image, codes, gate):
        call = lambda *args, method: tokenizer.apply({"params": params}, *args, method=method)  # noqa: E731
        found, _, quantised, index, quant, recon = call(image, method=whole)
        coarse = jnp.full((len(codes), *tokenizer.grid), tokenizer.codes)
        tokens = jnp.concatenate([x.reshape(len(x), -1, 1) for x in (coarse, codes)], axis=1)
        grads, (drawn, z, chosen, own, budget) = jax.grad(objective, has_aux=True)(params, image, gumbel)
        loss = objective(params, image, gumbel)[0]
        vectors = z.reshape(-1, z.shape[-1])
        after = followed(sizes, sums, vectors, chosen.reshape(-1), average.decay)
        after = restarted(*after, vectors[permutation][: len(sizes)], average.rare)
        table = jnp.concatenate([centres(*after, average.eps), params["nothing"]])
        entropy = patch_entropy(entropy_image, tokenizer.downsample)
        routed = tokenizer.clone(router="entropy").apply(
            {"params": {name: tree for name, tree in params.items() if name != "gate"}}, entropy_image, method="mixed"
        )
        tree = grads["encoder"]
        return {
            "gate_logits": nchw(found.gate),
            "grain": found.fine.astype(jnp.int32),
            "mixed": nchw(found.latents),
            "quantized": nchw(quantised),
            "indices": index,
            "quant_loss": quant,
            "recon": nchw(recon),
            "code_image": nchw(call(tokens, method="decode")),
            "train_gate": nchw(drawn.gate),
            "train_grain": drawn.fine.astype(jnp.int32),
            "train_quant_loss": own,
            "train_budget": budget,
            "train_loss": loss,
            "train_loss.grad.encoder.router.gate.0.weight": grads["gate"]["hidden"]["kernel"].T,
            "train_loss.grad.encoder.router.feature_norm_fine.weight": grads["gate"]["norm_fine"]["scale"],
            "train_loss.grad.encoder.conv_out_coarse.weight": tree["conv_out_coarse"]["kernel"].transpose(3, 2, 0, 1),
            "train_loss.grad.encoder.mid_fine.block_1.conv1.weight": tree["mid_fine_0"]["conv1"]["kernel"].transpose(
                3, 2, 0, 1
            ),
            "train_loss.grad.decoder.position_bias_fourier.lff.ffm.conv.weight": grads["place"]["fourier"]["kernel"].T,
            "train_loss.grad.quant_conv.weight": grads["quant"]["kernel"].T,
            "new_cluster_size": after[0],
            "new_embed_sum": after[1],
            "new_codebook": table,
            "budget": tokenizer.budget * budget_loss(gate, tokenizer.ratio),
            "entropy": entropy,
            "entropy_gate": routed.gate.astype(jnp.int32),
        }

    outputs = run(
        params,
        nhwc(io["image"]),
        io["gumbel"],
        io["restart_perm"],
        nhwc(io["entropy_image"]),
        io["codes"],
        nhwc(io["gate"]),
    )
    return {name: np.asarray(value) for name, value in outputs.items()}


def transformer(folder):
    h, io = folder.h, folder.io
    side, width, classes = h["coarse_hw"], h["width"], h["num_classes"]
    nets = [Successive(h[f"{part}_layers"], width, h["heads"]) for part in ("position", "content")]
    spec = TokenSpec(pyramid((side, 2 * side)), codes=(h["codebook_size"] + 1,))
    grain, codes = jnp.asarray(io["grain"]) > 0, jnp.asarray(io["codes"])
    room = int((~np.asarray(grain)).sum((1, 2)).max()) + 1  # its batches are padded to their longest
    rows = max(h["block_size"], 4 * side**2 + room + 2)  # its table would not do for the longest sequence
    outputs = {}

    def built(**fields):
        return DQTransformer(*nets, StartClass(width), room=room, rows=rows, **fields).complete(
            spec, Info(classes=classes)
        )

    forms = {"nosos": built(again=False), "sos": built(again=True)}
    (cells, places), k = grids(spec), forms["sos"].codes
    fixed(
        h, fine_hw=2 * side, content_pad=k, content_eos=k + 1, class_offset_content=k + 2, coarse_pad=cells,
        coarse_eos=cells + 1, class_offset_coarse=cells + 2, fine_pad=places, fine_eos=places + 1,
        class_offset_fine=places + 2,
    )  # fmt: skip
    weights = {f"transformer.{key}": folder.weights[key] for key in folder.weights}
    order = weights["transformer.pos_emb"]
    weights["transformer.pos_emb"] = np.pad(order, ((0, 0), (0, rows - order.shape[1]), (0, 0)))
    params, _ = loaded(forms["sos"], weights, source)
    small = DQVAE(size=(2 * side, 2 * side), mult=(1, 1), codes=k)
    tokens = small.tokens(codes, grain)
    batch, drop = {"label": jnp.asarray(io["labels"])}, jnp.zeros(len(codes), bool)
    for name, regions in (("region", True), ("row", False)):
        generator = built(again=False, regions=regions)
        items = generator.sequence(tokens)
        restored = generator.restored(items)[..., 0]
        coarse, fine = small.split(restored)
        outputs[f"{name}_restored"] = jnp.where(fine == k, coarse.repeat(2, 1).repeat(2, 2), fine)
        # of the coarse part without its start; of the fine one as much as the longest has
        for part, start, end in (("coarse", 1, 1 + room), ("fine", 1 + room, None)):
            length = folder.shape(f"{name}_{part}_content")[1]
            outputs[f"{name}_{part}_content"] = items.content[:, start:end][:, :length]
            outputs[f"{name}_{part}_position"] = items.place[:, start:end][:, :length]

    def whole(generator):
        items, cond = generator.sequence(tokens), generator.condition(batch, drop)
        forced = generator.forced(items, cond)
        content, coarse, fine, weight, later = generator.errors(items, batch, drop, *forced)
        parts = (content, weight), (coarse, weight * ~later), (fine, weight * later)
        return *forced, jnp.stack([(x * w).sum() / w.sum() for x, w in parts])

    def loss(params, generator):
        each, weight, _ = generator.apply({"params": params}, tokens, batch, raster(spec), drop=drop, method="loss")
        return (each * weight).sum() / weight.sum()

    for name, generator in forms.items():
        run = jax.jit(lambda params, generator=generator: generator.apply({"params": params}, method=whole))
        length = folder.shape(f"{name}_position_logits")[1]
        of_places, of_contents, losses = run(params)
        outputs |= {
            f"{name}_position_logits": of_places[:, :length],
            f"{name}_content_logits": of_contents[:, :length],
            f"{name}_losses": losses,
        }
    grads = jax.jit(lambda params: jax.grad(loss)(params, forms["nosos"]))(params)
    named = to_weights(grads, source.rules(forms["nosos"]))
    named["transformer.pos_emb"] = named["transformer.pos_emb"][:, : h["block_size"]]
    grads = folder.outputs("loss.grad.")
    return outputs | {f"loss.grad.{key}": named[f"transformer.{key}"] for key in grads}


CASES = {"dqvae": vq, "dq_transformer": transformer}
