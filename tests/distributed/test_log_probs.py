"""Vocab-parallel statistics against log_softmax over the whole vocabulary in float64.

Hidden states and weights are multiples of 1/8: their products are exact in float32, and many logits are equal.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_pbsd.losses.log_probs import token_statistics, top_tokens

VOCABULARY, HIDDEN = 24, 16
ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


@dataclass(frozen=True)
class Case:
    tokens: int = 37
    rows: int = 8
    candidates: int = 0
    scale: int = 1
    dtype: torch.dtype = torch.float32
    padding: int = 0
    loss: tuple[str, ...] = ("log_probs", "entropy", "candidates")


class Problem:
    def __init__(self, case: Case):
        generator = torch.Generator().manual_seed(1)

        def eighths(*shape):
            return torch.randint(-8, 9, shape, generator=generator) / 8

        self.hidden = case.scale * eighths(case.tokens, HIDDEN)
        self.vocabulary = VOCABULARY - case.padding
        self.weight = eighths(VOCABULARY, HIDDEN)
        # Were they read, their logits would be the largest of all at about half of the positions.
        self.weight[self.vocabulary :] *= 1000
        self.targets = torch.randint(0, self.vocabulary, (case.tokens,), generator=generator)
        self.candidates = torch.randint(0, self.vocabulary, (case.tokens, case.candidates), generator=generator)
        if case.candidates > 2:
            self.candidates[:, 1] = self.targets
            self.candidates[:, 2] = self.candidates[:, 0]
        self.grads = {
            "log_probs": torch.randn(case.tokens, generator=generator),
            "entropy": torch.randn(case.tokens, generator=generator),
            "candidates": torch.randn(case.tokens, case.candidates, generator=generator)}
        self.elsewhere = eighths(VOCABULARY, HIDDEN)

    def loss(self, case: Case, found: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((found[name] * self.grads[name]).sum() for name in case.loss)


@contextmanager
def ranks_of(rendezvous, rank, world_size):
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        yield
        # Without tokens nothing is exchanged: a rank could be done before another has found it.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def local(rank, rendezvous, world_size, case):
    with ranks_of(rendezvous, rank, world_size):
        problem = Problem(case)
        hidden = problem.hidden.to(case.dtype).requires_grad_()
        weight, elsewhere = (
            whole.chunk(world_size)[rank].clone() for whole in (problem.weight, problem.elsewhere))
        weight = weight.to(case.dtype).requires_grad_()
        statistics = token_statistics(
            hidden, weight, problem.targets, dist.group.WORLD, rows=case.rows,
            vocabulary=problem.vocabulary if case.padding else None,
            candidates=problem.candidates if case.candidates else None)
        found = {"log_probs": statistics.log_probs, "entropy": statistics.entropy,
                 "candidates": statistics.candidate_log_probs}
        # A tied weight is also that of the embedding, whose gradient is added.
        (problem.loss(case, found) + (weight * elsewhere).sum()).backward()
        numbers = {name: value.detach().numpy() for name, value in found.items() if value is not None}
        return numbers, hidden.grad.float().numpy(), weight.grad.float().numpy()


def reference(case):
    problem = Problem(case)
    hidden, weight = problem.hidden.double().requires_grad_(), problem.weight.double().requires_grad_()
    p = (hidden @ weight[: problem.vocabulary].T).log_softmax(-1)
    found = {"log_probs": p.gather(-1, problem.targets[:, None])[:, 0], "entropy": -(p.exp() * p).sum(-1),
             "candidates": p.gather(-1, problem.candidates)}
    (problem.loss(case, found) + (weight * problem.elsewhere).sum()).backward()
    return {name: value.detach().numpy() for name, value in found.items()}, hidden.grad, weight.grad


CASES = {
    "kept": Case(rows=64, candidates=4),
    "kept, exactly": Case(rows=37, candidates=4),
    "chunks": Case(candidates=4),
    "chunks, exactly": Case(tokens=32, candidates=4),
    "one row at a time": Case(tokens=5, rows=1),
    "large": Case(candidates=4, scale=200),
    "large, kept": Case(rows=64, candidates=4, scale=200),
    "none": Case(tokens=0, candidates=2),
    "one candidate": Case(candidates=1),
    "log-probs alone": Case(loss=("log_probs",)),
    "entropy alone": Case(loss=("entropy",)),
    "candidates alone": Case(candidates=4, loss=("candidates",)),
    "padded": Case(candidates=4, padding=5),
    "padded, kept": Case(rows=64, candidates=4, padding=1),
}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(ranks, world_size, name):
    case = CASES[name]
    if not case.candidates:
        case = replace(case, loss=tuple(part for part in case.loss if part != "candidates"))
    values, hidden_grad, weight_grad = reference(case)
    results = ranks.run(local, world_size, world_size, case)
    for numbers, found_hidden, _ in results:
        assert set(numbers) == {"log_probs", "entropy"} | ({"candidates"} if case.candidates else set())
        for key, found in numbers.items():
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, values[key], rtol=1e-6, atol=3e-6, err_msg=key)
        np.testing.assert_allclose(found_hidden, hidden_grad, rtol=1e-4, atol=1e-5)
    found_weight = np.concatenate([weight for _, _, weight in results])
    np.testing.assert_allclose(found_weight, weight_grad, rtol=1e-4, atol=1e-5 * case.scale)


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("world_size", [1, 2])
def test_bfloat16_rounds_gradients_but_not_logits(ranks, world_size, rows):
    """Inputs are multiples of 1/8 up to 1, which bfloat16 has; of their logits it has only those below 4."""
    case = Case(rows=rows, candidates=4, dtype=torch.bfloat16)
    values, hidden_grad, weight_grad = reference(case)
    results = ranks.run(local, world_size, world_size, case)
    for numbers, found_hidden, _ in results:
        for key, found in numbers.items():
            np.testing.assert_allclose(found, values[key], rtol=1e-6, atol=3e-6, err_msg=key)
        assert np.linalg.norm(found_hidden - hidden_grad.numpy()) < 2 ** -7 * hidden_grad.norm()
    found_weight = np.concatenate([weight for _, _, weight in results])
    assert np.linalg.norm(found_weight - weight_grad.numpy()) < 2 ** -7 * weight_grad.norm()


def test_frozen_inputs_get_no_gradient():
    problem = Problem(Case())
    for frozen in ("hidden", "weight"):
        inputs = {name: getattr(problem, name).clone().requires_grad_(name != frozen) for name in ("hidden", "weight")}
        found = token_statistics(inputs["hidden"], inputs["weight"], problem.targets, ALONE, rows=8)
        found.log_probs.sum().backward()
        assert {name: value.grad is None for name, value in inputs.items()} == {
            "hidden": frozen == "hidden", "weight": frozen == "weight"}


def test_second_backward_pass_over_kept_logits_is_an_error():
    """The first has turned them into their gradient."""
    problem = Problem(Case())
    found = token_statistics(problem.hidden.requires_grad_(), problem.weight, problem.targets, ALONE, rows=64)
    found.log_probs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.log_probs.sum().backward()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


def test_logits_exist_for_one_chunk_at_a_time():
    tokens, vocabulary, hidden_size, rows = 64, 512, 4, 16
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    targets = torch.arange(tokens)
    with Largest() as largest:
        found = token_statistics(hidden, weight, targets, ALONE, rows=rows)
        (found.log_probs.sum() + found.entropy.sum()).backward()
        top_tokens(hidden, weight, 3, ALONE, rows=rows)
    assert largest.elements == rows * vocabulary


def best_tokens(logits, k):
    """By definition: sorted by log-probability, then by id."""
    log_probs = logits.double().log_softmax(-1)
    ids = torch.tensor([sorted(range(logits.shape[-1]), key=lambda i: (-row[i], i))[:k] for row in logits.tolist()])
    ids = ids.reshape(len(logits), k)
    return ids, log_probs.gather(-1, ids)


def local_top(rank, rendezvous, world_size, case, k):
    with ranks_of(rendezvous, rank, world_size):
        problem = Problem(case)
        weight = problem.weight.chunk(world_size)[rank].to(case.dtype)
        ids, values = top_tokens(problem.hidden.to(case.dtype), weight, k, dist.group.WORLD, rows=case.rows,
                                 vocabulary=problem.vocabulary)
        return ids.numpy(), values.numpy()


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("case", "k"), [
    (Case(), 1), (Case(), 5), (Case(rows=64, scale=200), 8), (Case(dtype=torch.bfloat16), VOCABULARY),
    (Case(tokens=0), 3), (Case(padding=5), VOCABULARY - 5), (Case(padding=2), 5)])
def test_top_tokens(ranks, world_size, case, k):
    problem = Problem(case)
    ids, values = best_tokens(problem.hidden @ problem.weight[: problem.vocabulary].T, k)
    for found_ids, found_values in ranks.run(local_top, world_size, world_size, case, k):
        assert (found_ids.dtype, found_values.dtype) == (np.int64, np.float32)
        np.testing.assert_array_equal(found_ids, ids)
        np.testing.assert_allclose(found_values, values, rtol=1e-6, atol=3e-6)


logit = st.floats(-(2.0 ** 100), 2.0 ** 100, width=32, allow_subnormal=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0])


@settings(deadline=None)
@given(st.lists(logit, min_size=1, max_size=12), st.data())
def test_order_of_top_tokens(logits, data):
    k = data.draw(st.integers(1, len(logits)))
    ids, _ = top_tokens(torch.ones(1, 1), torch.tensor(logits)[:, None], k, ALONE, rows=1)
    assert ids.tolist() == best_tokens(torch.tensor([logits]), k)[0].tolist()
