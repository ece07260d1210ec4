"""What the learner asks of a model family, answered from its reading of config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_pbsd.config import LearnerConfig, ParallelConfig
from megatron_pbsd.models import decoder as decoders, gpt_config, layout, mapping, rope
from megatron_pbsd.models.decoder import Decoder
from megatron_pbsd.models.errors import ModelError
from megatron_pbsd.models.parameters import ParameterMap, RankCoordinates

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """check_fields: ModelError naming every field that is missing, unknown, or has a value not implemented.
    decoder: the model that a config.json which passed describes; ModelError where fields contradict each other."""

    check_fields: Callable[[Config], None]
    decoder: Callable[[Config], Decoder]

    def check_config(self, hf: Config) -> None:
        """ModelError naming everything in config.json that this family, or Megatron-core, does not implement."""
        self.check_fields(hf)
        if problems := gpt_config.problems(self.decoder(hf)):
            raise ModelError("config.json: " + "; ".join(problems))

    def transformer_config(self, hf: Config) -> dict[str, Any]:
        """TransformerConfig fields; the activation (SiLU) goes by its torch.nn.functional name."""
        return gpt_config.transformer_config(self.decoder(hf))

    def gpt_model(self, hf: Config, parallel: ParallelConfig) -> dict[str, Any]:
        """GPTModel arguments besides its TransformerConfig; the vocabulary is padded for `parallel.tp` ranks."""
        return gpt_config.gpt_model(self.decoder(hf), parallel)

    def pipeline_layout(self, hf: Config, parallel: ParallelConfig) -> list[list[str]] | None:
        """TransformerConfig's pipeline_model_parallel_layout: what each stage holds; None without a pipeline."""
        return gpt_config.pipeline_layout(self.decoder(hf).num_hidden_layers, parallel)

    def inverse_frequencies(self, hf: Config) -> torch.Tensor:
        """Of rotary positions, float32 [rotated dimensions / 2]; see `rope.py`."""
        return rope.inverse_frequencies(self.decoder(hf))[0]

    def hf_tensors(self, hf: Config) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor, in the order of the model; a tied lm_head is not a tensor of its own."""
        return decoders.hf_tensors(self.decoder(hf))

    def ignored_tensor(self, hf: Config, name: str) -> bool:
        """Whether a checkpoint may hold this tensor although `hf_tensors` does not name it."""
        return decoders.ignored_tensor(self.decoder(hf), name)

    def layout_problems(self, hf: Config, parallel: ParallelConfig) -> list[str]:
        """One sentence for each way in which the model cannot be divided like this; empty when it can."""
        return layout.layout_problems(self.decoder(hf), parallel)

    def learner_problems(self, hf: Config, learner: LearnerConfig) -> list[str]:
        """`layout_problems`, and one sentence for each key of `learner` that this model cannot heed."""
        return layout.learner_problems(self.decoder(hf), learner)

    def pieces(self, hf: Config, parallel: ParallelConfig, at: RankCoordinates, chunk: int) -> ParameterMap:
        """Parameters and stored buffers of model chunk `chunk`, 0 … vpp - 1, of the rank at `at`; see `mapping.py`."""
        return mapping.pieces(self.decoder(hf), parallel, at, chunk)
