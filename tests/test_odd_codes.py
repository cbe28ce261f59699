"""The parity modules of codes on folders of other sizes than the fixtures', against closed forms and second paths."""

import numpy as np
from parity import flexvar, hmar, llamagen, rar, var
from parity.common import Case, Noted, loaded, made
from scipy.special import log_softmax

from ar_jax.convert import flexvar as flexvar_names
from ar_jax.convert import var as var_names
from ar_jax.convert.sources import export
from ar_jax.data import Info
from ar_jax.generators.causal import Causal
from ar_jax.generators.hmar import Hmar
from ar_jax.generators.inputs import NextScale, Upsampled
from ar_jax.generators.rar import Aimed, Placed, StartLabel
from ar_jax.heads.categorical import Categorical
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.conditioning import Label
from ar_jax.nets.resize import resize
from ar_jax.nets.transformer import Transformer
from ar_jax.tokenizers.maskgit_vqgan import MaskgitVQGAN
from ar_jax.tokenizers.vqgan import VQGAN
from ar_jax.tokens import TokenSpec, grid, pyramid

RNG = np.random.default_rng(0)


def random(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def weights_of(module, kind, family, scale=0.3):
    """Random weights under the published names."""
    return {key: scale * random(*shape) for key, shape in export(module, kind, family).keys.items()}


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def nearest(x, codebook):
    """Codes [...] of vectors [... c]."""
    return ((x[..., None, :] - codebook) ** 2).sum(-1).argmin(-1)


def close(got, want, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(got).reshape(np.shape(want)), want, rtol=tolerance, atol=tolerance)


def of_chosen(logits, tokens):
    return np.take_along_axis(log_softmax(np.asarray(logits, np.float64), -1), tokens[..., None], -1)[..., 0]


# LlamaGen --------------------------------------------------------------------------------------------------


def llama(w, h, rows):
    """Its transformer in numpy: rows [b q d] of the class and of codes -> logits [b q v]."""
    side, heads, size = round(h["block_size"] ** 0.5), h["n_head"], h["dim"] // h["n_head"]
    spin = h["rope_base"] ** -(np.arange(0, size // 2, 2) / (size // 2))
    places = np.arange(rows.shape[1] - 1)
    angles = np.concatenate([np.outer(places // side, spin), np.outer(places % side, spin)], axis=1)
    turn = np.concatenate([np.zeros((1, size // 2)), np.exp(1j * angles)])  # the class has no place
    norm = lambda x, g: x / np.sqrt((x**2).mean(-1, keepdims=True) + h["norm_eps"]) * g  # noqa: E731

    def turned(x):
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        both = (pairs[..., 0] + 1j * pairs[..., 1]) * turn[:, None]
        return np.stack([both.real, both.imag], -1).reshape(x.shape)

    x = np.asarray(rows, np.float64)
    for i in range(h["n_layer"]):
        part = lambda name: w[f"layers.{i}.{name}.weight"]  # noqa: B023, E731
        qkv = norm(x, part("attention_norm")) @ part("attention.wqkv").T
        q, k, v = (y.reshape(*y.shape[:-1], heads, size) for y in np.split(qkv, 3, -1))
        scores = np.einsum("bqhd,bkhd->bhqk", turned(q), turned(k)) / np.sqrt(size)
        scores = np.where(np.tri(x.shape[1], dtype=bool), scores, -np.inf)
        seen = np.einsum("bhqk,bkhd->bqhd", np.exp(log_softmax(scores, -1)), v).reshape(x.shape)
        x = x + seen @ part("attention.wo").T
        y = norm(x, part("ffn_norm"))
        gate = y @ part("feed_forward.w1").T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ part("feed_forward.w3").T)) @ part("feed_forward.w2").T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


def test_llamagen_of_sixteen_codes_is_its_formula():
    h = {
        "dim": 24, "n_layer": 1, "n_head": 3, "vocab_size": 23, "block_size": 16, "num_classes": 5, "cls_token_num": 1,
        "model_type": "c2i", "rope_base": 500, "norm_eps": 1e-3, "ffn_hidden": 20, "cfg_scale": 1.7, "cfg_interval": 5,
        "filter_top_k": 4, "filter_top_p": 0.7, "filter_both_top_k": 9, "filter_both_top_p": 0.8, "sample_temperature": 1.3,
    }  # fmt: skip
    spec, info, images = TokenSpec(grid(4, 4), codes=(23,)), Info(classes=5), 2
    net = Causal(Transformer(1, 24, 3, hidden=20), Label(24)).complete(spec, info)
    w = weights_of(net, "generator", "llamagen")
    tokens, labels, drop = RNG.integers(0, 23, (images, 16)), np.array([3, 0]), np.array([1, 0])
    io = {
        "tokens": tokens, "labels": labels, "force_drop": drop, "gen_labels": labels, "gen_tokens": tokens,
        "filter_logits": random(2, 23), "filter_logits_ties": random(2, 23),
    }  # fmt: skip
    folder = made("llamagen_gpt_c2i", h, w, io)
    out = llamagen.c2i(folder)
    assert not folder.unread()

    table, words = w["cls_embedding.embedding_table.weight"], w["tok_embeddings.weight"]
    rows = lambda labels, tokens: np.concatenate([table[labels][:, None], words[tokens]], 1)  # noqa: E731
    want = llama(w, h, rows(labels, tokens[:, :-1]))
    bare = llama(w, h, rows(np.full(images, 5), tokens[:, :-1]))
    close(out["tf_logits"], want)
    close(out["tf_loss"], -of_chosen(want, tokens).mean())
    close(out["label_embedding"], table[np.where(drop, 5, labels)])
    close(out["cached_logits"], np.concatenate([want, bare]))
    close(out["cached_cfg_logits"], bare + 1.7 * (want - bare))
    for name, last in ("greedy_tokens", np.inf), ("greedy_tokens_cfg_interval", 5), ("greedy_tokens_no_cfg", -1):
        drawn = np.zeros((images, 0), int)
        for i in range(16):
            with_, without = (llama(w, h, rows(k, drawn))[:, -1] for k in (labels, np.full(images, 5)))
            scale = 1.7 if i <= last else 1.0
            drawn = np.append(drawn, (without + scale * (with_ - without)).argmax(-1)[:, None], axis=1)
        np.testing.assert_array_equal(out[name], drawn, err_msg=name)


def test_llamagen_tokenizer_with_a_decoder_of_other_widths():
    h = {
        "base_channels": 4, "norm_num_groups": 2, "encoder_ch_mult": [1, 3], "decoder_ch_mult": [2, 1], "num_res_blocks": 1,
        "z_channels": 6, "codebook_size": 11, "codebook_embed_dim": 5, "codebook_l2_norm": True, "commit_loss_beta": 0.4,
        "entropy_loss_ratio": 0.3, "entropy_temperature": 0.2, "downsample": 2, "in_channels": 3, "out_channels": 3,
    }  # fmt: skip
    module = VQGAN((6, 10), 4, (1, 3), (2, 1), 1, latent=6, codes=11, code_features=5, groups=2)
    w = weights_of(module, "tokenizer", "llamagen")
    io = {
        "image": random(2, 3, 6, 10), "code_indices": RNG.integers(0, 11, 30), "loss_z": random(2, 5, 3, 5),
        "loss_readout": random(2, 5, 3, 5),
    }  # fmt: skip
    folder = made("llamagen_vq", h, w, io, image=(2, 3, 6, 10), code_entry=(2, 5, 3, 5))
    out = llamagen.vq(folder)
    assert not folder.unread()
    codebook = unit(w["quantize.embedding.weight"])
    of = lambda x: unit(np.moveaxis(np.asarray(x, np.float64), 1, -1))  # noqa: E731
    np.testing.assert_array_equal(np.ravel(out["indices"]), np.ravel(nearest(of(out["pre_quant"]), codebook)))
    close(np.moveaxis(np.asarray(out["quant"]), 1, -1), codebook[np.asarray(out["indices"]).reshape(2, 3, 5)])
    close(np.moveaxis(np.asarray(out["code_entry"]), 1, -1), codebook[io["code_indices"].reshape(2, 3, 5)])
    z = of(io["loss_z"])
    index = nearest(z, codebook)
    distance = ((z - codebook[index]) ** 2).mean()
    close(out["loss_vq"], distance)
    close(out["loss_commit"], 0.4 * distance)
    p = log_softmax((2 * z @ codebook.T - 2).reshape(-1, 11) / 0.2, -1)
    mean = np.exp(p).mean(0)
    close(out["loss_entropy"], 0.3 * ((mean * np.log(mean + 1e-5)).sum() - (np.exp(p) * p).sum(-1).mean()), 1e-3)


# Scales ----------------------------------------------------------------------------------------------------


def guided(raw, guidance, sizes):
    with_, without = np.split(np.asarray(raw), 2)
    return without + np.repeat(guidance, sizes)[:, None] * (with_ - without)


def residual_vae(scales, width, codes, smoothers=2):
    """Hyperparameters and weights of VAR's tokenizer."""
    h = {
        "vocab_size": codes, "z_channels": width, "base_channels": 4, "norm_num_groups": 2, "ch_mult": [1, 2],
        "num_res_blocks": 1, "patch_nums": scales, "quant_conv_kernel": 1, "quant_resi": 0.4,
        "share_quant_resi": smoothers, "beta": 0.3, "using_znorm": False, "downsample": 2,
    }  # fmt: skip
    module = var.residual_pyramid(h)
    return h, weights_of(module, "tokenizer", "var")


def test_var_tokenizer_of_oblong_scales_takes_what_is_left():
    scales, smoothers = [(1, 1), (2, 1), (2, 3), (3, 5)], 2
    h, w = residual_vae(scales, 6, 11)
    tokens, latent = RNG.integers(0, 11, (2, 24)), random(2, 6, 3, 5)
    io = {
        "image": random(2, 3, 6, 10), "code_indices": tokens, "loss_latent": latent, "loss_readout": random(2, 6, 3, 5),
        "resize_in": random(1, 2, 3, 4),
    }  # fmt: skip
    folder = made("var_vqvae", h, w, io, phi_choice=(4, 4))
    folder.arrays["phi_choice"]["meaning"] = "2 shared convs"
    folder.want = {}
    out = var.var_vqvae(folder)
    assert not folder.unread()

    codebook = w["quantize.embedding.weight"]

    def smoothed(x, level):
        name = f"quantize.quant_resi.qresi_ls.{var.choices(folder)[-1, level]}."
        kernel, pad = w[name + "weight"], np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        moved = sum(pad[:, i : i + 3, j : j + 5] @ kernel[:, :, i, j].T for i in range(3) for j in range(3))
        return 0.6 * x + 0.4 * (moved + w[name + "bias"])

    def quantised(latent):
        left, total, indices, sums = latent, np.zeros_like(latent), [], []
        for level, scale in enumerate(scales):
            small = np.asarray(resize(left, scale, "area")) if level < 3 else left
            index = nearest(small, codebook)
            found = smoothed(np.asarray(resize(codebook[index], scales[-1], "bicubic")), level)
            total, left = total + found, left - found
            indices.append(index.reshape(len(latent), -1))
            sums.append(total)
        return np.concatenate(indices, 1), sums

    index, sums = quantised(np.moveaxis(np.asarray(out["latent"]), 1, -1))
    np.testing.assert_array_equal(out["indices"], index)
    close(out["fhat_per_scale"], np.moveaxis(np.stack(sums, 1), -1, 2))
    target = np.moveaxis(latent, 1, -1)
    _, sums = quantised(target)
    close(out["loss_fhat"], np.moveaxis(sums[-1], -1, 1))
    close(out["loss_vq"], 1.3 * np.mean([((total - target) ** 2).mean() for total in sums]))
    assert out["phi_choice"].max() == smoothers - 1


def ramp(scale, levels):
    return 1 + scale * np.arange(levels) / (levels - 1)


def test_var_of_three_heads_and_a_gap_between_its_scales():
    scales = [1, 3, 4]
    vae, vae_weights = residual_vae(scales, 6, 11)
    h = {
        "depth": 1, "embed_dim": 24, "num_heads": 3, "mlp_ratio": 2.0, "num_classes": 4, "shared_aln": True,
        "attn_l2_norm": False, "norm_eps": 1e-6, "patch_nums": scales, "cfg": 2.1, "filter_top_k": 3, "filter_top_p": 0.6,
        "filter_both_top_k": 5, "filter_both_top_p": 0.8, "vae": vae,
    }  # fmt: skip
    net = AdaLN(1, 24, 3, hidden=48, shared=True, l2_norm=False)
    net = Causal(net, Label(24), Categorical(bias=True), NextScale(6)).complete(
        TokenSpec(pyramid(tuple(scales)), codes=(11,)), Info(classes=4)
    )
    labels = np.array([2, 0])
    io = {
        "tokens": RNG.integers(0, 11, (2, 26)), "labels": labels, "gen_labels": labels, "filter_logits": random(2, 11)
    }  # fmt: skip
    folder = made("var", h, weights_of(net, "generator", "next_scale"), io)
    folder.files["vae.safetensors"] = Noted(vae_weights)
    out = var.transformer(folder)
    assert not folder.unread()
    close(out["tf_loss"], -of_chosen(out["tf_logits"], io["tokens"]).mean())
    close(out["cfg_schedule"], ramp(2.1, 3) - 1)
    whole = guided(out["gen_raw_logits"], ramp(2.1, 3), [1, 9, 16])
    close(out["gen_cfg_logits"], whole)
    np.testing.assert_array_equal(out["gen_tokens"][..., 0], whole.argmax(-1))
    agrees_with_one_pass(folder, out["gen_raw_logits"], out["gen_tokens"], var.residual_pyramid(vae), var_names)


def agrees_with_one_pass(folder, raw, tokens, vae, names):
    """The conditional rows of cached steps are one pass over what they drew."""
    generator, params = var.build(folder, folder.weights)
    generator = generator.on(vae.spec)
    frozen, _ = loaded(vae, folder.files["vae.safetensors"], names)
    forced, _ = var.teacher_forced(generator, params, tokens[..., 0], folder.io["gen_labels"], vae, frozen)
    close(np.split(np.asarray(raw), 2)[0], forced, 1e-3)


def test_flexvar_tokenizer_with_a_decoder_of_other_widths():
    h = {
        "base_channels": 4, "norm_num_groups": 2, "encoder_ch_mult": [1, 3], "decoder_ch_mult": [2, 1], "num_res_blocks": 1,
        "z_channels": 6, "codebook_size": 11, "codebook_embed_dim": 5, "codebook_l2_norm": True, "downsample": 2,
        "patch_nums": [2, 3, 4],
    }  # fmt: skip
    w = weights_of(flexvar.independent_pyramid(h, (8, 8), (2, 3, 4)), "tokenizer", "flexvar")
    folder = made("flexvar_vq", h, w, {"image": random(2, 3, 8, 8)}, image=(2, 3, 8, 8))
    folder.want = {}
    out = flexvar.tokenizer(folder)
    assert not folder.unread()
    codebook = unit(w["quantize.embedding.weight"])
    latent, sides = np.moveaxis(np.asarray(out["continuous_latent"]), 1, -1), (2, 3, 4)
    index = [nearest(unit(np.asarray(resize(latent, (side, side), "area"))), codebook) for side in sides]
    np.testing.assert_array_equal(out["train_indices"], np.concatenate([x.reshape(2, -1) for x in index], axis=1))
    for side, codes in zip(sides, index):
        close(np.moveaxis(np.asarray(out[f"multi_scale_quant.{side}"]), 1, -1), codebook[codes])
    want = [resize(codebook[codes], (side, side), "bicubic") for side, codes in zip(sides[1:], index)]
    close(out["train_input"], np.concatenate([np.asarray(x).reshape(2, -1, 5) for x in want], axis=1))


def test_flexvar_on_scales_it_has_not_seen():
    vae = {
        "base_channels": 4, "norm_num_groups": 2, "encoder_ch_mult": [1, 2], "decoder_ch_mult": [2, 1], "num_res_blocks": 1,
        "z_channels": 6, "codebook_size": 13, "codebook_embed_dim": 32, "codebook_l2_norm": True, "downsample": 2,
    }  # fmt: skip
    h = {
        "depth": 1, "embed_dim": 24, "num_heads": 3, "mlp_ratio": 2.0, "num_classes": 4, "shared_aln": False,
        "attn_l2_norm": True, "norm_eps": 1e-6, "cond_drop_rate": 0.1, "patch_nums": [1, 2, 4], "other_patch_nums": [1, 3, 5],
        "max_pn_other": 2, "position_grid": 6, "cfg": 2.3, "vae": vae,
    }  # fmt: skip
    spec, labels = TokenSpec(pyramid((1, 2, 4)), codes=(13,)), np.array([2, 0])
    net = Causal(AdaLN(1, 24, 3, hidden=48, l2_norm=True), Label(24), Categorical(bias=True), Upsampled(32, side=6))
    io = {
        "labels": labels, "gen_labels": labels, "tokens_a": RNG.integers(0, 13, (2, 21)),
        "tokens_b": RNG.integers(0, 13, (2, 35)), "input_a": random(2, 20, 32), "input_b": random(2, 34, 32),
    }  # fmt: skip
    names = [f"gen_{part}_other_scales" for part in ("raw_logits", "cfg_logits", "tokens", "image")]
    case = Case(0, "FlexVAR.autoregressive_infer_cfg, scales other_patch_nums, max_pn as in the hyperparameters", ["gen_labels"], names, Noted({}))
    w = weights_of(net.complete(spec, Info(classes=4)), "generator", "next_scale")
    folder = made("flexvar", h, w, io, (case,), pos_init=(1, 24, 4, 4))
    tokenizer = flexvar.independent_pyramid(vae, (10, 10), (1, 3, 5))
    folder.files["vae.safetensors"] = Noted(weights_of(tokenizer, "tokenizer", "flexvar"))
    out = flexvar.transformer(folder)
    assert not folder.unread()
    for name in "ab":
        close(out[f"tf_loss_{name}"], -of_chosen(out[f"tf_logits_{name}"], io[f"tokens_{name}"]).mean())
    close(out["pos_a"][0, 0], out["pos_b"][0, 0])  # both begin with one token in the middle
    raw, tokens = (out[f"gen_{part}_other_scales"] for part in ("raw_logits", "tokens"))
    whole = guided(raw, [1, 3.3, 3.3], [1, 9, 25])  # both are larger than 2
    close(out["gen_cfg_logits_other_scales"], whole)
    np.testing.assert_array_equal(tokens[..., 0], whole.argmax(-1))
    agrees_with_one_pass(folder, raw, tokens, tokenizer, flexvar_names)


def test_hmar_of_three_scales_redraws_what_its_schedule_says():
    scales, sizes = [1, 2, 3], [1, 4, 9]
    vae, vae_weights = residual_vae(scales, 6, 11)
    h = {
        "depth": 2, "embed_dim": 24, "num_heads": 3, "mlp_ratio": 4.0, "num_classes": 4, "shared_aln": False,
        "attn_l2_norm": True, "norm_eps": 1e-6, "patch_nums": scales, "n_layers_train": 1, "mask_schedule": [[1], [4], [2, 7]],
        "mask_ratio": 0.6, "cfg": 1.4, "mask_refinement_cfg_ratio": 1e-6, "top_k": 11, "top_p": 1.0, "vae": vae,
    }  # fmt: skip
    spec, info, head = TokenSpec(pyramid(tuple(scales)), codes=(11,)), Info(classes=4), Categorical(bias=True)
    stack = lambda layers, **fields: AdaLN(layers, 24, 3, l2_norm=True, sees="step", **fields)  # noqa: E731
    alone = Causal(stack(2), Label(24), head, NextScale(6, True)).complete(spec, info)
    joint = Hmar(stack(1, final=False), Label(24), head, NextScale(6, True), tail=stack(1), masks=stack(1), mask_head=head)
    scales_alone, masks_alone = (weights_of(alone, "generator", "next_scale") for _ in range(2))
    masks_alone["word_embed_bias"] = masks_alone.pop("word_embed.bias")
    masks_alone["mask_embed.weight"] = random(1, 24)
    labels = np.array([2, 0])
    io = {
        "tokens": RNG.integers(0, 11, (2, 14)), "labels": labels, "gen_labels": labels, "mask_pick_1": np.array([0, 3]),
        "mask_pick_2": np.array([1, 2, 8]),
    }  # fmt: skip
    folder = made("hmar", h, weights_of(joint.complete(spec, info), "generator", "next_scale"), io)
    for name, weights in ("vae", vae_weights), ("nsp", scales_alone), ("mp", masks_alone):
        folder.files[f"{name}.safetensors"] = Noted(weights)
    out = hmar.hmar(folder)
    assert not folder.unread()
    np.testing.assert_array_equal(out["mask_positions"], [0, 3, 5, 6, 12])
    raw = guided(out["hmar_no_mask_ns_logits"], ramp(1.4, 3), sizes)
    np.testing.assert_array_equal(out["hmar_no_mask_tokens"][..., 0], raw.argmax(-1))
    agrees_with_one_pass(folder, out["hmar_no_mask_ns_logits"], out["hmar_no_mask_tokens"], var.residual_pyramid(vae), var_names)
    # only the last scale is drawn anew: two tokens stay, the seven least certain come from the other head
    first, again = (out[f"hmar_{end}tokens"][..., 0] for end in ("no_mask_", ""))
    np.testing.assert_array_equal(first[:, :5], again[:, :5])
    p = log_softmax(raw[:, 5:], -1).max(-1)
    redrawn = out["hmar_mask_logits"][:2, -9:].argmax(-1)
    for image in range(2):
        stay = np.argsort(-p[image])[:2]
        want = redrawn[image].copy()
        want[stay] = first[image, 5:][stay]
        np.testing.assert_array_equal(again[image, 5:], want)


# RAR -------------------------------------------------------------------------------------------------------


def test_rar_of_seven_codes_in_a_line():
    h = {
        "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20, "image_seq_len": 7,
        "codebook_size": 13, "condition_num_classes": 4, "norm_eps": 1e-6, "guidance_scale": 3.0, "guidance_scale_pow": 2.0,
        "randomize_temperature": 1.5,
    }  # fmt: skip
    net = Causal(
        Placed(1, 24, 3, hidden=20, eps=1e-6, rows=12), StartLabel(24), Categorical(bias=True, std=0.02), Aimed(rows=11)
    ).complete(TokenSpec(grid(1, 7), codes=(13,)), Info(classes=4))
    labels = np.array([3, 1])
    io = {
        "tokens": RNG.integers(0, 13, (2, 7)), "labels": labels, "drop": np.array([0, 1]), "gen_labels": labels,
        "orders": RNG.permuted(np.tile(np.arange(7), (2, 1)), axis=1),
    }  # fmt: skip
    folder = made("rar", h, weights_of(net, "generator", "rar"), io)
    out = rar.transformer(folder)
    assert not folder.unread()
    ranked = np.take_along_axis(io["tokens"], io["orders"], 1)
    np.testing.assert_array_equal(np.ravel(out["tf_labels"]), ranked.ravel())
    close(out["tf_loss"], -of_chosen(np.asarray(out["tf_logits"])[:, :7], ranked).mean())
    for end, power in ("", 2.0), ("_constant", 0.0):
        weight = 1 + 2 * (1 - np.cos((np.arange(7) / 7) ** power * np.pi)) / 2
        close(out[f"cfg_schedule{end}"], weight)
        whole = guided(out[f"gen_raw_logits{end}"], weight, [1] * 7)
        np.testing.assert_array_equal(out[f"gen_tokens{end}"][..., 0], whole.argmax(-1))
        close(out[f"gen_probs{end}"], np.exp(log_softmax(whole / 1.5, -1)))
    folder.io.entries |= {"tokens": out["gen_tokens"][..., 0], "drop": np.zeros(2, int)}
    close(np.split(out["gen_raw_logits"], 2)[0], np.asarray(rar.transformer(folder)["tf_logits_raster"])[:, :7], 1e-3)


def test_maskgit_tokenizer_of_oblong_images():
    h = {
        "hidden_channels": 4, "norm_num_groups": 2, "channel_mult": [1, 3], "num_res_blocks": 1, "z_channels": 5,
        "codebook_size": 11, "commitment_cost": 0.4, "downsample": 2, "num_channels": 3,
    }  # fmt: skip
    module = MaskgitVQGAN(size=(6, 10), features=4, mult=(1, 3), res_blocks=1, codes=11, code_features=5, groups=2)
    io = {
        "image": RNG.random((2, 3, 6, 10)).astype(np.float32), "codes": RNG.integers(0, 11, (2, 3, 5)),
        "loss_latent": random(2, 5, 3, 5), "loss_readout": random(2, 5, 3, 5),
    }  # fmt: skip
    w = weights_of(module, "tokenizer", "rar")
    folder = made("maskgit_vqgan", h, w, io, image=(2, 3, 6, 10))
    out = rar.vq(folder)
    assert not folder.unread()
    codebook = next(value for key, value in w.items() if key.endswith("embedding.weight"))
    last = lambda x: np.moveaxis(np.asarray(x, np.float64), 1, -1)  # noqa: E731
    index = nearest(last(out["latent"]), codebook)
    np.testing.assert_array_equal(np.ravel(out["indices"]), index.ravel())
    close(last(out["quant"]), codebook[index])
    close(last(out["code_quant"]), codebook[io["codes"]])
    z = last(io["loss_latent"])
    away = z - codebook[nearest(z, codebook)]
    close(out["loss"], 1.4 * (away**2).mean())
    # the code follows with the weight of the codebook's loss, the latent with the other's and straight through
    close(last(out["loss_grad_latent"]), 2 * away / away.size + last(io["loss_readout"]))
