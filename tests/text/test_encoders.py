"""T5 and CLIP beside the `transformers` package, with small random weights (a test-only package, with CPU torch)."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from ar_jax.data import Info
from ar_jax.options import Sampler
from ar_jax.sampler import condition_table
from ar_jax.text import encoder as encoders
from ar_jax.text import t5
from ar_jax.text.encoder import open_encoder

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "cat", "on", "the", "sofa", "very"]
CAPTIONS = ["a red cat", "the cat on the red sofa", "", *(f"{'very ' * i}red" for i in range(12))]
T5_SIZES = {
    "model_type": "t5", "d_model": 24, "num_heads": 3, "d_kv": 10, "num_layers": 2, "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 11, "layer_norm_epsilon": 1e-4,
}  # fmt: skip
CLIP_SIZES = {
    "model_type": "clip_text_model", "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2,
    "intermediate_size": 40, "max_position_embeddings": 20, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-3,
}  # fmt: skip


def folder_of(place, sizes, **changes):
    """A released folder of a small encoder: sizes, a tokenizer of ten words, random weights."""
    tokenizers = pytest.importorskip("tokenizers")
    place.mkdir()
    sizes = sizes | changes
    (place / "config.json").write_text(json.dumps(sizes))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(place / "tokenizer.json"))
    random, weights = np.random.default_rng(0), Sizes(sizes)
    network = (t5.of_config if sizes["model_type"] == "t5" else clip_of)(sizes)
    shapes = network.shapes(weights)
    save_file({key: random.normal(0, 0.5, shape).astype("f4") for key, shape in shapes.items()}, place / "model.safetensors")
    return place


def clip_of(sizes):
    from ar_jax.text import clip

    return clip.of_config(sizes)


class Sizes(dict):
    """Weights of which only free sizes are asked: ten words, forty hidden units."""

    def __init__(self, sizes):
        hidden = np.zeros((24, 40), "f4")
        table = np.zeros((len(WORDS), 24), "f4")
        super().__init__(
            {
                "encoder.block.0.layer.1.DenseReluDense.wo.weight": hidden,
                "shared.weight": table,
                "text_model.embeddings.token_embedding.weight": table,
            }
        )


@pytest.mark.parametrize("sizes", [T5_SIZES, T5_SIZES | {"feed_forward_proj": "relu"}, CLIP_SIZES], ids=["t5", "t5-relu", "clip"])
def test_hidden_rows_are_those_of_transformers(tmp_path, sizes):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    place = folder_of(tmp_path / "small", sizes)
    features, mask = open_encoder(str(place)).encode(CAPTIONS, 16)
    rest = {"vocab_size": len(WORDS)} | {key: value for key, value in sizes.items() if key != "model_type"}
    if sizes["model_type"] == "t5":
        theirs = transformers.T5EncoderModel(transformers.T5Config(d_ff=40, dropout_rate=0.0, **rest))
    else:
        rest |= {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0}
        theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(attention_dropout=0.0, **rest))
    from safetensors.torch import load_file

    lacks = theirs.load_state_dict(load_file(place / "model.safetensors"), strict=False)
    assert not lacks.unexpected_keys
    assert not [key for key in lacks.missing_keys if "embed_tokens" not in key and "position_ids" not in key]
    for i, caption in enumerate(CAPTIONS):
        ids = [WORDS.index(word) for word in caption.split()] + [1]
        with torch.no_grad():
            want = theirs.eval()(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(features[i, -len(ids) :], want, atol=2e-5)
        assert mask[i].tolist() == [False] * (16 - len(ids)) + [True] * len(ids)


@pytest.mark.parametrize(
    ("sizes", "row"),
    [
        (T5_SIZES, [0.1787, 0.0066, -0.9008, -0.3063]),
        (T5_SIZES | {"feed_forward_proj": "relu"}, [0.7948, 0.0473, -1.2044, -0.2196]),
        (CLIP_SIZES, [0.1485, 0.0884, 0.2713, 0.4021]),
    ],
    ids=["t5", "t5-relu", "clip"],
)
def test_hidden_rows_are_those_that_were_compared(tmp_path, sizes, row):
    """Where there is no `transformers`: numbers that agreed with it (4.57.1, torch 2.13.0) to 2e-5 by the test above."""
    features, _ = open_encoder(str(folder_of(tmp_path / "small", sizes))).encode(CAPTIONS, 16)
    np.testing.assert_allclose(features[1, -3, :4], row, atol=2e-4)


@pytest.mark.parametrize("sizes", [T5_SIZES, CLIP_SIZES], ids=["t5", "clip"])
def test_captions_do_not_influence_each_other(tmp_path, sizes):
    encoder = open_encoder(str(folder_of(tmp_path / "small", sizes)))
    assert encoder.name == "small"
    together, _ = encoder.encode(CAPTIONS, 16)
    for i in (0, 2, 14):
        np.testing.assert_allclose(together[i], encoder.encode([CAPTIONS[i]], 16)[0][0], atol=1e-5)
    with pytest.raises(ValueError, match=r"rows must lie in 2..(512|20) for small, got 1000"):
        encoder.encode(["a"], 1000)


def test_t5_tells_distances_apart_as_published():
    """32 buckets: one for each distance up to 7, then wider ones up to 128; keys that follow have the upper half."""
    found = t5.T5(1, 1, 1, 1).buckets(300)
    assert found[0, :8].tolist() == [0, 17, 18, 19, 20, 21, 22, 23]
    assert found[:8, 0].tolist() == list(range(8))
    assert [found[i, 0] for i in (8, 11, 12, 15, 16, 22, 23, 31, 32, 45, 46, 63, 64, 90, 91, 127, 128, 299)] == [
        *(8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 15, 15)
    ]


def test_a_model_draws_from_words_by_the_encoder_it_was_trained_with(tmp_path):
    place = folder_of(tmp_path / "flan-small", T5_SIZES)
    info = Info(captions=True, text="flan-small", text_rows=5, text_width=24)
    names, table = condition_table(info, Sampler(captions=("a red cat",), text_encoder=str(place)))
    assert names == ["a red cat"]
    assert table["text"].shape == (1, 5, 24)
    assert table["text_mask"].tolist() == [[False, True, True, True, True]]
    with pytest.raises(ValueError, match=r"trained on features of 'flan-small'; give its folder .* with --text-encoder"):
        condition_table(info, Sampler(captions=("a red cat",)))
    wide = Info(captions=True, text="flan-t5-xl", text_rows=5, text_width=2048)
    with pytest.raises(ValueError, match=r"the text encoder makes shapes \(1, 5, 24\) .* the model needs \[N 5 2048\]"):
        condition_table(wide, Sampler(captions=("a red cat",), text_encoder=str(place)))


def test_folders_that_are_no_encoder_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none is no folder of a text encoder: it has no config\.json"):
        open_encoder(str(tmp_path / "none"))
    place = folder_of(tmp_path / "bad", T5_SIZES)
    for change, match in (
        ({"model_type": "bert"}, r"config\.json: model_type is 'bert'; it must be one of"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'; it must be relu or gated-gelu"),
        ({"num_layers": 3}, r"\.safetensors files lack encoder\.block\.2\.layer\.0\."),
        ({"num_heads": 2}, r"relative_attention_bias\.weight has shape \(8, 3\), but config\.json says \(8, 2\)"),
    ):
        (place / "config.json").write_text(json.dumps(T5_SIZES | change))
        with pytest.raises(ValueError, match=match):
            open_encoder(str(place))
    (place / "config.json").write_text(json.dumps(T5_SIZES))
    (place / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        open_encoder(str(place))


def test_features_are_not_taken_for_those_of_other_weights(tmp_path):
    weights = np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32)
    (tmp_path / "tokenizer.json").write_text("{}")

    def fingerprint(weights):
        save_file({"w": weights}, tmp_path / "model.safetensors")
        return encoders._fingerprint(tmp_path)

    assert fingerprint(weights) == fingerprint(weights.copy()) != fingerprint(weights * 1.001)
