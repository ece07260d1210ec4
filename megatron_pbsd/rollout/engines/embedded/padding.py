"""How many queries and keys attention is given.

The order in which CPU kernels (torch's flash attention over MKL) add up a token's attention depends on how many queries
and keys they are given. Within the bounds below it does not, so that a token has the same bits however its sequence was
cut and whatever ran beside it. Only nodes of a draft that are not on its first path may have others: between the keys
of their ancestors lie some that are hidden from them.
"""

from __future__ import annotations

QUERY_MULTIPLE = 16
LONGEST_SEGMENT = 128
KEY_MULTIPLE = 32
KEY_BLOCK = 512


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def padded_keys(n: int) -> int:
    """Number of keys to attend over when the longest context is n.

    Keys are taken in blocks of 512, whose products are summed in halves of 256: only the last block may be shorter,
    and only down to what fits into one half.
    """
    blocks, rest = divmod(n, KEY_BLOCK)
    return blocks * KEY_BLOCK + (round_up(rest, KEY_MULTIPLE) if 2 * rest <= KEY_BLOCK else KEY_BLOCK)
