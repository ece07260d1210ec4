"""The model's parameters under their Hugging Face checkpoint names, and updates of them in place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, SplitModulelist, WeightConverter, WeightRenaming, apply_renamings

from megatron_pbsd.resharding.manifest import WeightsManifest
from megatron_pbsd.resharding.shared_memory import attach
from megatron_pbsd.resharding.stream import Described


def checkpoint_views(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Checkpoint name → view of the model's own memory; a tied tensor appears once.

    transformers fuses some parameters as it loads them (experts above all); each part is given back as a view.
    ValueError names a parameter that was stored in a way that no view can undo.
    """
    # A model that was loaded knows what its loading did; one built from its configuration did what loading would do.
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    inverse = [conversion.reverse_transform() for conversion in reversed(conversions)]
    renamings = [c for c in inverse if isinstance(c, WeightRenaming)]
    converters = [c for c in inverse if isinstance(c, WeightConverter)]
    views: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        for part, part_view in _split(name, tensor, converters).items():
            views[apply_renamings(part, renamings)] = part_view
    return views


def _split(name: str, tensor: torch.Tensor, converters: list[WeightConverter]) -> dict[str, torch.Tensor]:
    for converter in converters:
        pattern = converter.source_patterns[0]
        if not name.endswith(pattern):
            continue
        prefix = name.removesuffix(pattern)
        parts = {pattern: tensor}
        for operation in converter.operations:
            if isinstance(operation, Chunk) and len(parts) == 1:
                pieces = tensor.chunk(len(converter.target_patterns), dim=operation.dim)
                parts = dict(zip(converter.target_patterns, pieces))
            elif isinstance(operation, SplitModulelist):
                names = converter.target_patterns
                parts = {
                    target.replace("*", str(i)): piece
                    for target, whole in zip(names, parts.values())
                    for i, piece in enumerate(whole.unbind(operation.dim))
                }
            else:
                raise ValueError(f"{name}: cannot be updated in place through {type(operation).__name__}")
        return {prefix + part: piece for part, piece in parts.items()}
    return {name: tensor}


def check_tensors(published: Described, parameters: Mapping[str, torch.Tensor]) -> None:
    """ValueError naming the first tensor that is missing, unexpected, or of another dtype or shape."""
    unknown = [name for name in published if name not in parameters]
    for name in parameters:
        if name not in published:
            raise ValueError(f"tensor {name!r} is missing from the manifest{_nearest(name, unknown)}")
    if unknown:
        raise ValueError(f"tensor {unknown[0]!r} is not a parameter of the model{_nearest(unknown[0], parameters)}")
    for name, (dtype, shape) in published.items():
        expected = (str(parameters[name].dtype).removeprefix("torch."), tuple(parameters[name].shape))
        if (dtype, tuple(shape)) != expected:
            raise ValueError(f"tensor {name!r} is {dtype}{list(shape)}, expected {expected[0]}{list(expected[1])}")


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; the nearest name there is {close[0]!r}" if close else ""


def copy_into(tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors, any of those that `check_tensors` has let pass."""
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def copy_held(parameters: Mapping[str, torch.Tensor], manifest: WeightsManifest) -> None:
    """Copy the parameters into the segment. ValueError when they are not its tensors, or it is gone or too short."""
    check_tensors(manifest.described, parameters)
    for name, tensor in attach(manifest).items():
        tensor.copy_(parameters[name])
