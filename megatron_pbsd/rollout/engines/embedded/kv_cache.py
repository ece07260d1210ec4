"""Keys and values of many requests in a fixed number of slots."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
import torch


class SlotTable:
    """Which request owns which slot. A slot is free, held by a running request, or keeps the KV of an ended one.

    evicting: called with a request, its slot and the tokens whose KV is there before another request gets it.
    """

    def __init__(self, slots: int, evicting: Callable[[str, int, list[int]], None] = lambda *evicted: None) -> None:
        self._free = list(range(slots))
        self._evicting = evicting
        # Insertion order is the order of retirement: the first entry is the least recently used.
        self._kept: dict[str, tuple[int, list[int]]] = {}

    def __len__(self) -> int:
        """Number of ended requests whose KV is kept."""
        return len(self._kept)

    @property
    def all_run(self) -> bool:
        return not self._free and not self._kept

    def acquire(self, request_id: str, tokens: list[int], wanted: Collection[str]) -> tuple[int, int] | None:
        """A slot for a request, and how many of its tokens have their KV in it; None when all slots run.

        Takes the slot kept for the request, else a free one, else evicts the least recently used, sparing the requests
        in `wanted` as long as there is another. At least the last token is left to compute: its logits are needed.
        """
        if request_id in self._kept:
            slot, computed = self._kept.pop(request_id)
            return slot, min(common_prefix(computed, tokens), len(tokens) - 1)
        if self._free:
            slot = min(self._free)
            self._free.remove(slot)
            return slot, 0
        if not self._kept:
            return None
        victim = next((name for name in self._kept if name not in wanted), next(iter(self._kept)))
        slot, computed = self._kept.pop(victim)
        self._evicting(victim, slot, computed)
        return slot, 0

    def kept(self, request_id: str) -> tuple[int, list[int]] | None:
        """Slot of an ended request, and the tokens whose KV is in it."""
        return self._kept.get(request_id)

    def retire(self, request_id: str, slot: int, computed: list[int]) -> None:
        """Keep the slot of a request that has ended, or was aborted, with the KV of `computed` tokens in it."""
        self._kept[request_id] = (slot, computed)

    def release(self, request_id: str) -> None:
        if request_id in self._kept:
            self._free.append(self._kept.pop(request_id)[0])

    def clear(self) -> None:
        """Forget every kept request; running ones hold on to their slots."""
        for request_id in list(self._kept):
            self.release(request_id)


def common_prefix(a: list[int], b: list[int]) -> int:
    same, most = 0, min(len(a), len(b))
    while same < most:
        # Slices are compared by compiled code.
        middle = (same + most + 1) // 2
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            most = middle - 1
    return same


class SlotCache:
    """Per layer keys [slots + 1, kv_heads, length, head_dim] and values alike, allocated at the layer's first update.

    `update` stores the packed tokens of a step at the places given to `place`, and hands back the layer's slots. The
    last slot, `scratch`, takes what padding tokens write. Kept are the keys and values that attention meets, not what
    transformers would cache: of latent attention those are latents, from which the keys and values of whole contexts
    would be computed anew at every token. experts: int16 [slots + 1, length, MoE layers, top-k], which experts the
    tokens were read by, once `keep_experts` has been called.
    """

    def __init__(self, slots: int, length: int) -> None:
        self.scratch = slots
        self.length = length
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.experts: torch.Tensor | None = None
        self._given: list[tuple[torch.UntypedStorage, int]] = []

    def place(self, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Slot and position in it [T] of each token of the next step."""
        self._slots, self._positions = slots, positions

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """key, value [1, kv_heads, T, head_dim]."""
        if layer == len(self.keys):
            for store, states in ((self.keys, key), (self.values, value)):
                _, heads, _, size = states.shape
                store.append(states.new_zeros(self.scratch + 1, heads, self.length, size))
        keys, values = self.keys[layer], self.values[layer]
        keys[self._slots, :, self._positions] = key[0].transpose(0, 1)
        values[self._slots, :, self._positions] = value[0].transpose(0, 1)
        return keys, values

    def keep_experts(self, experts: torch.Tensor) -> None:
        """experts int16 [T, MoE layers, top-k] of the step's tokens."""
        if self.experts is None:
            self.experts = experts.new_zeros(self.scratch + 1, self.length, *experts.shape[1:])
        self.experts[self._slots, self._positions] = experts

    def move(self, slots: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Per moved token [n] its slot, and from which position to which all that is kept of it goes; no two of a slot
        to the same."""
        for tensor in (*self.keys, *self.values):
            tensor[slots, :, targets] = tensor[slots, :, sources]
        if self.experts is not None:
            self.experts[slots, targets] = self.experts[slots, sources]

    def experts_of(self, slot: int, tokens: slice) -> np.ndarray | None:
        """int16 [n, MoE layers, top-k], a copy; None if none are kept."""
        return None if self.experts is None else self.experts[slot, tokens].to("cpu", copy=True).numpy()

    @property
    def row_bytes(self) -> int:
        """What `rows` holds of one token."""
        return sum(part[0].numel() * part.element_size() for part in self._parts(self.scratch, 0, 1))

    def _parts(self, slot: int, start: int, end: int) -> Iterator[torch.Tensor]:
        """Views [end - start, …] of all that is kept of these tokens."""
        for keys, values in zip(self.keys, self.values):
            yield keys[slot, :, start:end].transpose(0, 1)
            yield values[slot, :, start:end].transpose(0, 1)
        if self.experts is not None:
            yield self.experts[slot, start:end]

    def rows(self, slot: int, start: int, end: int) -> np.ndarray:
        """uint8 [end - start, row_bytes]: all that is kept of these tokens, a copy."""
        flat = [part.reshape(end - start, -1).contiguous().view(torch.uint8) for part in self._parts(slot, start, end)]
        return torch.cat(flat, dim=1).cpu().numpy()

    def restore(self, slot: int, start: int, rows: np.ndarray) -> None:
        """The reverse of `rows`."""
        # A copy is aligned, whatever the rows were cut from.
        flat = torch.from_numpy(np.ascontiguousarray(rows))
        offset = 0
        for part in self._parts(slot, start, start + len(rows)):
            nbytes = part[0].numel() * part.element_size()
            part.copy_(flat[:, offset : offset + nbytes].contiguous().view(part.dtype).view(part.shape))
            offset += nbytes

    def copy(self, source: int, target: int, count: int) -> None:
        """The first `count` tokens of one slot into another."""
        for theirs, ours in zip(self._parts(source, 0, count), self._parts(target, 0, count)):
            ours.copy_(theirs)

    def give_away(self) -> None:
        """Keep the tensors without their memory: nothing may be read or written until `take_back`."""
        self._given = [(tensor.untyped_storage(), tensor.untyped_storage().nbytes()) for tensor in self._tensors()]
        for storage, _ in self._given:
            storage.resize_(0)

    def take_back(self) -> None:
        """Memory for the same tensors, all zero."""
        for storage, nbytes in self._given:
            storage.resize_(nbytes)
        self._given = []
        for tensor in self._tensors():
            tensor.zero_()

    @property
    def nbytes(self) -> int:
        """Memory that it holds now."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._tensors())

    def _tensors(self) -> list[torch.Tensor]:
        return [*self.keys, *self.values, *([] if self.experts is None else [self.experts])]

    def wipe(self) -> None:
        """Zero every slot: a NaN left by bad weights would pass through the attention mask."""
        for tensor in (*self.keys, *self.values):
            tensor.zero_()
