"""BM25 of texts to wanted words: a ranking that needs no model. Does not know layouts, pairs or labels.

Shapes: N texts, V wanted words.
"""

import re
from array import array
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

MAX_WORDS = 20_000_000
"""Of all texts together; an evaluation of more has no BM25."""

_WORD = re.compile(r"\w+")


def words_of(text: str) -> Iterator[str]:
    """Runs of letters, digits and underscores, in lower case."""
    return (found.group() for found in _WORD.finditer(text.lower()))


def bm25(texts: Iterable[str], weight_of: Mapping[str, float]) -> NDArray[np.float64] | None:
    """Σ over the wanted words of weight · BM25 of the word in the text: float64 [N]. None: more than MAX_WORDS words.

    Lucene's formula, with k1 = 1.5 and b = 0.75. BM25 is a sum over the words of a query, so the mean over many queries is one
    query whose words have weights. Words that are not wanted count in the length of a text alone.
    """
    import bm25s  # here: only an evaluation needs it

    number_of = {word: number for number, word in enumerate(weight_of)}
    unwanted, num_words = len(number_of), 0
    documents: list[array[int]] = []
    for text in texts:
        documents.append(array("i", (number_of.get(word, unwanted) for word in words_of(text))))
        num_words += len(documents[-1])
        if num_words > MAX_WORDS:
            return None
    if not num_words:
        return np.zeros(len(documents))
    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene", dtype="float64")
    index.index((documents, {**number_of, "": unwanted}), create_empty_token=False, show_progress=False)
    of_word_in_text, start_V = index.scores["data"], index.scores["indptr"]
    weight_V = np.array([*weight_of.values(), 0.0])
    weighted = of_word_in_text * np.repeat(weight_V, np.diff(start_V))
    # numpy's stub says intp; with weights it is float64.
    return np.bincount(index.scores["indices"], weighted, len(documents)).astype(np.float64, copy=False)
