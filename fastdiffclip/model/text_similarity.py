"""How alike class texts are: cosine of their token counts, rare tokens weighted up (TF-IDF); nothing is learnt.

Salton and Buckley 1988, as scikit-learn weighs it: (1 + log count) (1 + log((1 + K) / (1 + K_t))), where K_t of the K
texts hold token t. Tokens are those of the prompts' tokenizer, upper and lower case made one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fastdiffclip.model.text import PromptTokenizer, load_tokenizer


def text_similarity(
    texts: Sequence[str], others: Sequence[str] | None = None, tokenizer: PromptTokenizer | None = None
) -> np.ndarray:
    """Similarity ``(len(others), len(texts))`` float64 in 0 to 1 of ``others``, or of ``texts`` themselves.

    Tokens are weighed by ``texts``. A text without tokens is like nothing but itself.
    """
    tokenizer = tokenizer or load_tokenizer()
    counts = [_counts(text, tokenizer) for text in texts]
    asked = counts if others is None else [_counts(text, tokenizer) for text in others]
    vocabulary = {token: place for place, token in enumerate(sorted({t for c in (*counts, *asked) for t in c}))}
    held = np.zeros(len(vocabulary))
    for count in counts:
        held[[vocabulary[token] for token in count]] += 1.0
    rarity = 1.0 + np.log((1.0 + len(texts)) / (1.0 + held))
    rows, columns = (_rows(part, vocabulary, rarity) for part in (asked, counts))
    similarity = rows @ columns.T
    if others is None:
        np.fill_diagonal(similarity, 1.0)
    return np.clip(similarity, 0.0, 1.0)


def _counts(text: str, tokenizer: PromptTokenizer) -> Counter[int]:
    tokens, end = tokenizer.encode_batch([text.lower()])
    return Counter(tokens[0, 1 : int(end[0])].tolist())


def _rows(counts: Sequence[Counter[int]], vocabulary: dict[int, int], rarity: np.ndarray) -> np.ndarray:
    rows = np.zeros((len(counts), len(vocabulary)))
    for row, count in zip(rows, counts, strict=True):
        for token, number in count.items():
            row[vocabulary[token]] = (1.0 + np.log(number)) * rarity[vocabulary[token]]
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
