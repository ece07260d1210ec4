"""Megatron-core on a CPU with gloo.

Megatron-core 0.16.1 says 'cuda' in many places that would work on any device. `running()` stands in for those
calls while Megatron code runs and takes the stand-ins away afterwards. Every patched symbol is checked first, so
that another version of Megatron-core or torch fails here with its name, not later with wrong numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from megatron_pbsd.errors import PbsdError
from megatron_pbsd.platform.gloo import gather_uneven, reduce_scatter_uneven
from megatron_pbsd.platform.usage import MemoryUse, of_process

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

MEGATRON_VERSION = "0.16.1"
CPU = torch.device("cpu")


class PlatformError(PbsdError):
    """The installed Megatron-core is not the one these stand-ins were written for."""

    component = "platform"


def require_symbols(owner: Any, names: tuple[str, ...]) -> None:
    """PlatformError naming the first symbol that is missing from `owner`."""
    for name in names:
        if not hasattr(owner, name):
            raise PlatformError(
                f"{owner.__name__}.{name} does not exist; the CPU platform replaces it and was written for "
                f"megatron-core {MEGATRON_VERSION}")


def _is_cuda(device: object) -> bool:
    return str(device).startswith("cuda") if isinstance(device, str | torch.device) else False


def _on_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Tensors asked for on 'cuda' are made on the CPU; pinned memory, which needs a GPU driver, is ordinary memory."""

    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return make(*args, **kwargs)

    return made


# A TorchFunctionMode would catch all functions there are, at a cost of 1 to 2 microseconds for each call of any.
_FACTORIES = {name: _on_cpu(getattr(torch, name)) for name in (
    "arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like", "tensor", "zeros", "zeros_like")}


def _type(tensor: torch.Tensor, *args: Any, original: Callable[..., Any] = torch.Tensor.type, **kwargs: Any) -> Any:
    """Megatron's optimizer and clipping compare Tensor.type() with 'torch.cuda.FloatTensor'."""
    found = original(tensor, *args, **kwargs)
    return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) else found


_METHODS = {"cuda": lambda tensor, *args, **kwargs: tensor, "type": _type}


class _Event:
    """A point in the work of such a stream."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, *args: Any) -> None:
        pass

    def wait(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Stream:
    """A stream on a device whose work is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def record_event(self) -> _Event:
        return _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


_CUDA_STAND_INS = {
    "current_device": lambda: CPU,
    "synchronize": lambda *args, **kwargs: None,
    "Stream": _Stream,
    "Event": _Event,
    "stream": lambda stream: contextlib.nullcontext(),
    "current_stream": _Stream,
    "default_stream": _Stream,
    "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
    "manual_seed": torch.manual_seed,
}
_STAND_INS = ((torch.cuda, _CUDA_STAND_INS), (torch, _FACTORIES), (torch.Tensor, _METHODS))


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron-core's takes only GPU tensors to the host, and hands all_to_all the split sizes as a tensor."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


_UNEVEN = {"_gather_along_first_dim": gather_uneven, "_reduce_scatter_along_first_dim": reduce_scatter_uneven}


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


class Cpu:
    name = "cpu"
    backend = "gloo"
    distributed_optimizer = False
    # Works, but gloo emulates reduce-scatter: a tenth slower, to save memory that a CPU has.
    sequence_parallel = False
    # Gloo still reads an output while the interleaved schedule would already free it: silently wrong.
    frees_pipeline_outputs = False
    transformer_engine = False

    def dtype(self, precision: str) -> torch.dtype:
        return torch.bfloat16 if precision == "bfloat16" else torch.float32

    def device(self, rank: int) -> torch.device:
        return CPU

    def prepare(self, rank: int) -> None:
        installed = version("megatron-core")
        if installed != MEGATRON_VERSION:
            raise PlatformError(f"megatron-core {installed} is installed; the CPU platform needs {MEGATRON_VERSION}")
        from megatron.core.extensions.transformer_engine import HAVE_TE
        from megatron.core.models.common.embeddings import rope_utils
        from megatron.core.tensor_parallel import mappings, random
        from megatron.core.transformer import multi_latent_attention
        from megatron.core.transformer.moe import moe_utils, token_dispatcher

        from megatron_pbsd.platform.cpu_modules import rotate_packed

        for owner, names in _STAND_INS:
            require_symbols(owner, tuple(names))
        for owner, replaced in (
            (random, {"_get_cuda_rng_state": _CUDA_STAND_INS["get_rng_state"], "_set_cuda_rng_state": _set_rng_state}),
            (token_dispatcher, {"maybe_move_tensor_to_cpu": _on_host}),
            (rope_utils, {"_apply_rotary_pos_emb_thd": rotate_packed}),
        ):
            require_symbols(owner, tuple(replaced))
            for name, stand_in in replaced.items():
                setattr(owner, name, stand_in)
        require_symbols(mappings, tuple(_UNEVEN))
        for name, wrapper in _UNEVEN.items():
            if getattr(mappings, name).__module__ == mappings.__name__:
                setattr(mappings, name, wrapper(getattr(mappings, name)))
        # Without Transformer Engine 0.16.1 leaves this name unbound, and the router reads it.
        if not hasattr(moe_utils, "te_general_gemm"):
            moe_utils.te_general_gemm = None
        # Without it 0.16.1's latent attention takes the mocks of Transformer Engine's classes for classes.
        require_symbols(multi_latent_attention, ("HAVE_TE",))
        multi_latent_attention.HAVE_TE = HAVE_TE

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        kept = [(owner, name, getattr(owner, name)) for owner, names in _STAND_INS for name in names]
        for owner, names in _STAND_INS:
            for name, stand_in in names.items():
                setattr(owner, name, stand_in)
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for owner, name, original in kept:
                setattr(owner, name, original)

    def transformer_flags(self) -> dict[str, Any]:
        return {
            "use_cpu_initialization": True,
            "gradient_accumulation_fusion": False,
            "bias_dropout_fusion": False,
            "bias_activation_fusion": False,
            "masked_softmax_fusion": False,
            "apply_rope_fusion": False,
            "persist_layer_norm": False,
            "moe_grouped_gemm": False,
            "moe_permute_fusion": False,
            "moe_router_fusion": False,
        }

    def layer_specs(self, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
        from megatron_pbsd.platform.cpu_modules import layer_specs

        return layer_specs(config, vp_stage)

    def memory_use(self, device: torch.device, held: Mapping[str, int], waiting: Mapping[str, int]) -> MemoryUse:
        return of_process({name: held.get(name, 0) + waiting.get(name, 0) for name in {**held, **waiting}})

    def seed(self, seed: int) -> None:
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)

    def rng_state(self) -> dict[str, Any]:
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        return {"torch": torch.get_rng_state(), "model_parallel": get_cuda_rng_tracker().get_states()}

    def set_rng_state(self, state: dict[str, Any]) -> None:
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        torch.set_rng_state(state["torch"])
        get_cuda_rng_tracker().set_states(state["model_parallel"])
