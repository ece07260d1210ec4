"""Frequencies of rotary positions. Pure torch; the learner rotates with these, and they are those of transformers.

Plain: RoFormer, arXiv 2104.09864, section 3.2.2. llama3: `Llama3Scaling`.
"""

from __future__ import annotations

import math

import torch

from megatron_pbsd.models.decoder import Decoder, Llama3Scaling


def inverse_frequencies(decoder: Decoder) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair of rotated dimensions, float32 [rotated dimensions / 2], and what cosines and
    sines are multiplied by. NotImplementedError for a scaling that has no formula here."""
    dimensions = int(decoder.head_dim * decoder.rotary_factor)
    plain = 1.0 / decoder.rope_theta ** (torch.arange(0, dimensions, 2, dtype=torch.float32) / dimensions)
    match decoder.rope_scaling:
        case None:
            return plain, 1.0
        case Llama3Scaling() as scaling:
            return _llama3(plain, scaling), 1.0
        case other:
            raise NotImplementedError(f"rotary positions scaled by {type(other).__name__}")


def _llama3(plain: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Frequencies that turn fewer than low_freq_factor times within the original context are divided by `factor`, those
    that turn more than high_freq_factor times stay, and those between are blended by the number of their turns."""
    wavelength = 2 * math.pi / plain
    turns = scaling.original_max_position_embeddings / wavelength
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - share) * plain / scaling.factor + share * plain
    # By wavelength rather than by turns, and open or closed intervals as in transformers: equal to the last bit.
    longest = scaling.original_max_position_embeddings / scaling.low_freq_factor
    shortest = scaling.original_max_position_embeddings / scaling.high_freq_factor
    return torch.where(wavelength > longest, plain / scaling.factor, torch.where(wavelength < shortest, plain, blended))
