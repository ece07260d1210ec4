"""What `pbsd plan` says of published runs: which fit, how fast they are, and which of them is the best one.

`mfu_error`, `mfu_bias`: means of |predicted - measured| and of predicted - measured over layouts that ran. `rank`:
Spearman's correlation of the two. `chosen`, `best`: measured MFU of the layout that is predicted to be the fastest, and
of the fastest. `gb`: of the fullest GPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np

from launcher.published_runs import RECIPES, Recipe, Run, decoder_of, hagemann, korthikanti, narayanan
from megatron_pbsd.config import ModelConfig, RunConfig
from megatron_pbsd.errors import UsageError
from megatron_pbsd.planning.hardware import RESERVED, Cluster, gpu
from megatron_pbsd.planning.memory import learner_bytes
from megatron_pbsd.planning.search import Question, search
from megatron_pbsd.planning.step_time import Work, learner_seconds, micro_batches, operations

TOKENS_PER_GPU = 2**17
"""Of a step, for which recipes are ranked."""


def run(overrides: Sequence[str] = ()) -> dict[str, Any]:
    if overrides:
        raise UsageError(f"the bench 'planning' reads no configuration, so {overrides[0]} means nothing to it")
    return {"layouts": layouts(), "megatron": megatron(), "recipes": [
        row | ranking(one) for row, one in zip(recipes(), RECIPES, strict=True)]}


def needed_gb(run: Run) -> float:
    """Of the fullest GPU, with a process's context."""
    work = Work(run.batch * run.length, run.length)
    ranks = learner_bytes(run.decoder, run.layout, run.numerics, micro_batches(run.layout, work), length=run.length)
    return (max(sum(rank.values()) for rank in ranks) + RESERVED) / 1e9


def seconds(run: Run) -> float:
    """Of an optimizer step."""
    cluster = Cluster(gpu(run.gpu), run.layout.parallel.world_size)
    work = Work(run.batch * run.length, run.length)
    return sum(learner_seconds(run.decoder, run.layout, run.numerics, cluster, work).values())


def mfu(run: Run) -> float:
    """Attention counts as if it had no causal mask, as those who measured count it; so do embeddings, as if they were
    products, where what is computed again does not."""
    decoder, tokens = run.decoder, run.batch * run.length
    attention = 12.0 * decoder.num_hidden_layers * decoder.hidden_size * run.length
    done = operations(decoder, Work(tokens, 0)) / tokens + attention
    done = done * 4 / 3 if run.again else done + 6.0 * decoder.vocab_size * decoder.hidden_size
    peak = run.layout.parallel.world_size * gpu(run.gpu).flops
    return done * tokens / seconds(run) / peak


def layouts() -> list[dict[str, Any]]:
    """Hagemann et al., by model and recomputation."""
    groups = defaultdict(list)
    for one in hagemann():
        groups[one.source, one.layout.recompute].append(one)
    rows = []
    for (source, recompute), runs in groups.items():
        room = Cluster(gpu(runs[0].gpu), 1).available / 1e9
        said = [needed_gb(one) <= room for one in runs]
        ran = [one for one in runs if one.fits]
        predicted, measured = [mfu(one) for one in ran], [one.mfu for one in ran]
        order = sorted(zip(predicted, measured), reverse=True)
        rows.append({
            "model": source, "recompute": recompute, "layouts": len(runs), "ran": len(ran),
            "said_to_fit_did_not": sum(fits and not one.fits for fits, one in zip(said, runs)),
            "said_not_to_fit_did": sum(bool(one.fits) and not fits for fits, one in zip(said, runs)),
            "mfu_error": fmean(abs(p - m) for p, m in zip(predicted, measured)),
            "mfu_bias": fmean(p - m for p, m in zip(predicted, measured)),
            "rank": float(np.corrcoef(_ranks(predicted), _ranks(measured))[0, 1]),
            "chosen": order[0][1], "best": max(measured)})
    return rows


def _ranks(values: Sequence[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))


def megatron() -> list[dict[str, Any]]:
    rows = [{"source": "2104.04473, table 1", "model": one.source, "gpus": one.layout.parallel.world_size,
             "measured": one.mfu, "predicted": mfu(one), "gb": needed_gb(one)} for one in narayanan()]
    rows += [{"source": "2205.05198, table 5", "model": one.source, "gpus": one.layout.parallel.world_size,
              "recompute": one.layout.recompute, "measured_s": one.seconds, "predicted_s": seconds(one),
              "gb": needed_gb(one)} for one in korthikanti()]
    return rows


def ranking(recipe: Recipe) -> dict[str, Any]:
    """How a peer's layout stands among those that fit for the same tokens, by our times of the learner."""
    gpus = recipe.layout.parallel.world_size
    question = Question(
        RunConfig(name="plan", steps=1, model=ModelConfig(path="-")), decoder_of(recipe),
        Cluster(gpu("h100-80g"), gpus), recipe.numerics, Work(gpus * TOKENS_PER_GPU, recipe.length), None, False,
        recipe.length)
    fitting = [one for one in search(question) if one.fits]
    own = sum(learner_seconds(question.decoder, recipe.layout, recipe.numerics, question.cluster,
                              question.work).values())
    best = fitting[0].layout
    return {"slower_than_recommended": own / fitting[0].seconds, "fitting": len(fitting),
            "faster": sum(one.seconds < own for one in fitting),
            "recommended": {name: size for name in ("tp", "pp", "vpp", "cp", "ep", "etp")
                            if (size := getattr(best.parallel, name)) > 1} | {
                "tokens": best.micro_batch_tokens, "recompute": best.recompute}}


def recipes() -> list[dict[str, Any]]:
    rows = []
    for recipe in RECIPES:
        one = Run(recipe.name, decoder_of(recipe), "h100-80g", recipe.layout, recipe.numerics, recipe.length,
                  recipe.layout.parallel.dp * 64)
        rows.append({"recipe": recipe.name, "gpus": recipe.layout.parallel.world_size, "gb": needed_gb(one),
                     "room_gb": Cluster(gpu("h100-80g"), 1).available / 1e9,
                     "gb_with_optimizer": needed_gb(replace(one, numerics=replace(one.numerics, offloaded=False)))})
    return rows
