"""Which words a site's reports hold, read from its update alone: the rows of the word embedding that moved.

Only words that were read have a gradient, so after any number of steps the other rows lie where weight decay alone took
them: on a line through where they were. What is left beside that line gives the bag of words away. Whoever sees one site's
update can do this; a secure sum hides the site among others, frozen embeddings hide the words, noise of differential privacy
blurs them.

Shapes: V vocabulary, D width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom
from sklearn.metrics import average_precision_score

from fedmix.errors import DataError
from fedmix.evaluation.features import Report

STILL = 1e-5  # of the largest change: rounding leaves a decayed row of float32 as much, and so it counts as not moved


def row_changes(delta_VD: NDArray[np.floating], base_VD: NDArray[np.floating]) -> NDArray[np.float64]:
    """Length [V] of each row's change that is not along the row itself, which is where weight decay moves it."""
    delta, base = delta_VD.astype(np.float64), base_VD.astype(np.float64)
    square = (base**2).sum(axis=1)
    share = np.divide((delta * base).sum(axis=1), square, out=np.zeros(len(base)), where=square > 0)
    changes: NDArray[np.float64] = np.linalg.norm(delta - share[:, None] * base, axis=1)
    return changes


def recovered_words(changes: NDArray[np.floating]) -> NDArray[np.int64]:
    """Word ids whose rows lie above the widest gap, in logarithms, between the lengths of neighbouring changes."""
    if not len(changes) or changes.max() <= 0:
        return np.zeros(0, np.int64)
    lengths = np.log(np.maximum(changes / changes.max(), STILL))
    order = np.argsort(lengths, kind="stable")
    first = int(np.argmax(np.diff(lengths[order], prepend=np.log(STILL))))
    return np.sort(order[first:]).astype(np.int64)


def recovery_report(
    delta_VD: NDArray[np.floating],
    base_VD: NDArray[np.floating],
    seen: NDArray[np.integer],
    special_ids: frozenset[int],
) -> Report:
    """How much of a site's bag of words its update gives away; special ids count for nothing.

    ``seen``: word ids that the site's reports hold, in any order. ``average_precision`` is of the rows in order of their
    change and needs no threshold; ``chance`` is the share of the vocabulary that the site used, and ``p_value`` that of as
    many words right among as many that were drawn blindly.
    """
    if delta_VD.shape != base_VD.shape:
        raise DataError(f"the embedding's change is {delta_VD.shape} and the embedding {base_VD.shape}; give the same rows")
    is_word = np.ones(len(delta_VD), bool)
    is_word[sorted(special_ids)] = False
    is_seen = np.isin(np.arange(len(delta_VD)), seen) & is_word
    if not is_seen.any():
        raise DataError("the site's reports hold no word of the vocabulary; there is nothing to recover")
    changes = np.where(is_word, row_changes(delta_VD, base_VD), 0.0)
    found = recovered_words(changes)
    num_right = int(is_seen[found].sum())
    return {
        "precision": num_right / len(found) if len(found) else None,
        "recall": num_right / int(is_seen.sum()),
        "average_precision": float(average_precision_score(is_seen[is_word], changes[is_word])),
        "chance": float(is_seen.sum() / is_word.sum()),
        "p_value": float(hypergeom.sf(num_right - 1, is_word.sum(), is_seen.sum(), len(found))),
        "num_recovered": len(found),
        "num_seen": int(is_seen.sum()),
    }
