"""The similarity of class texts: TF-IDF as scikit-learn computes it, on our tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from fastdiffclip.model.text import load_tokenizer
from fastdiffclip.model.text_similarity import text_similarity

TEXTS = ["Healthy grass: a watered lawn", "Stressed grass: a dry lawn", "Water: dark and flat", "Parking lot: asphalt"]


def tokens(text: str) -> list[str]:
    ids, end = load_tokenizer().encode_batch([text.lower()])
    return [str(token) for token in ids[0, 1 : int(end[0])].tolist()]


def test_it_is_what_scikit_learn_computes() -> None:
    vectorizer = TfidfVectorizer(analyzer=tokens, sublinear_tf=True)
    rows = vectorizer.fit_transform(TEXTS).toarray()
    np.testing.assert_allclose(text_similarity(TEXTS), rows @ rows.T, atol=1e-12)


def test_what_shares_words_is_more_alike() -> None:
    found = text_similarity(TEXTS)
    assert found[0, 1] > 2 * max(found[0, 2], found[0, 3])
    assert np.array_equal(found, text_similarity([text.upper() for text in TEXTS]))


def test_others_are_compared_by_the_weights_of_the_first() -> None:
    found = text_similarity(TEXTS, [TEXTS[2], "zebra"])
    assert found.shape == (2, 4)
    np.testing.assert_allclose(found[0], text_similarity(TEXTS)[2], atol=1e-12)
    assert text_similarity(TEXTS, []).shape == (0, 4)


@given(st.lists(st.text(max_size=30), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_any_texts_give_a_covariance(texts: list[str]) -> None:
    encodable = [text.encode("utf-8", "ignore").decode() for text in texts]
    found = text_similarity(encodable)
    assert found.min() >= 0 and found.max() <= 1 and np.array_equal(found.diagonal(), np.ones(len(texts)))
    assert np.linalg.eigvalsh(0.1 * np.eye(len(texts)) + 0.9 * found).min() > 0.09
