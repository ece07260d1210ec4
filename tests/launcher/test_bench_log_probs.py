from __future__ import annotations

from functools import partial

import torch

from launcher.bench.log_probs import chunked, measured, naive


def test_peak_is_what_the_call_holds_at_a_time():
    """64 MB of ones, to the batches in which Linux counts pages; the 256 MB that `prepare` made do not count."""
    cost = measured(partial(_prepare, 16_000_000))
    assert 60e6 < cost.peak_bytes < 72e6


def _prepare(elements):
    torch.ones(4 * elements)
    return partial(torch.ones, elements)


def test_variants_compute_the_same():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(7, 8), torch.randn(20, 8), torch.randint(20, (7,))
    for rows in (3, 7):
        for ours, theirs in zip(chunked(hidden, weight, targets, rows), naive(hidden, weight, targets)):
            torch.testing.assert_close(ours, theirs)
