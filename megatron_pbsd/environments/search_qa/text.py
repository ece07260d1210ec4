"""Text cleaning shared by the corpus and the verifier: everything the policy reads or writes is plain ASCII."""

from __future__ import annotations

import html
import re
import unicodedata

# Letters and signs that have no canonical decomposition into ASCII.
_SUBSTITUTES = str.maketrans({
    "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D", "ħ": "h", "Ħ": "H", "ı": "i", "ß": "ss",
    "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "þ": "th", "Þ": "Th", "ð": "d", "ə": "a", "Ə": "A",
    "‘": "'", "’": "'", "ʻ": "'", "ʼ": "'", "`": "'",
    "“": '"', "”": '"', "–": "-", "—": "-", "…": "...",
})  # fmt: skip


def fold(text: str) -> str:
    """ASCII form of `text`: accents removed, typographic signs replaced, other characters dropped."""
    decomposed = unicodedata.normalize("NFKD", text.translate(_SUBSTITUTES))
    return decomposed.encode("ascii", "ignore").decode("ascii")


def plain(markup: str) -> str:
    """HTML fragment to one line of ASCII text; line breaks become '; '."""
    text = re.sub(r"(?:\s*<br\s*/?>\s*)+", "; ", html.unescape(markup))
    text = fold(re.sub(r"</?[a-zA-Z][^>]*>", "", text))
    return re.sub(r"\s+", " ", text).strip(" ;")


def cut(text: str, words: int) -> str:
    """The first `words` words, without a dangling separator."""
    parts = text.split()
    return " ".join(parts[:words]).rstrip(",;:(-") if len(parts) > words else text


def without_parentheses(text: str) -> str:
    """Drop (nested) round brackets and what they hold."""
    while (shorter := re.sub(r"\s*\([^()]*\)", "", text)) != text:
        text = shorter
    return text
