"""Answer verification as in SQuAD (Rajpurkar et al. 2016): normalised exact match and token F1, best over aliases."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

from megatron_pbsd.environments.search_qa.text import fold

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without accents, punctuation, articles and extra white space."""
    text = fold(text).lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(prediction: str, answers: Iterable[str]) -> bool:
    """Whether `prediction` equals one of `answers` after normalisation. An empty prediction never matches."""
    normalised = normalise(prediction)
    return bool(normalised) and any(normalised == normalise(answer) for answer in answers)


def f1(prediction: str, answers: Iterable[str]) -> float:
    """Harmonic mean of token precision and recall, the largest over `answers`; in [0, 1]."""
    return max((_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers), default=0.0)


def _f1(predicted: list[str], expected: list[str]) -> float:
    common = (Counter(predicted) & Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0
