"""From a learner's layout to that of engines: which rank sends which part of which tensor to which. Pure.

Every rank of the target receives exactly the elements of its parameters, each once, and over a link only those that no
rank on its own GPU has. A part comes from the same GPU if a rank there has it, otherwise from the same node, otherwise
from anywhere; among the ranks that could send it, the bytes are dealt equally.

Tensors that the same ranks have on both sides are planned once (`layouts.Kind`, `Group`), and single transfers are made
when they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import product

import numpy as np

from megatron_pbsd.boxes import Box, intersection, size
from megatron_pbsd.resharding.layouts import LAYER, Kind, Layout, Numbers, Place, Slot
from megatron_pbsd.resharding.manifest import ALIGNMENT
from megatron_pbsd.resharding.sources import deal
from megatron_pbsd.resharding.wire import FLOAT8, Wire, stored_dtype, whole_blocks, wire


class Link(IntEnum):
    """What lies between two GPUs."""

    DEVICE = 0
    """Nothing: they are the same one."""
    NODE = 1
    """NVLink, or the memory of a machine."""
    NETWORK = 2


@dataclass(frozen=True)
class Transfer:
    """target parameter[target_place.box] = source parameter[source_place.box], after the wire's transform.

    source, target: ranks of the two layouts. tensor: its name in checkpoints. box: of the tensor.
    nbytes: on the wire.
    """

    source: int
    target: int
    tensor: str
    box: Box
    source_place: Place
    target_place: Place
    wire: Wire
    nbytes: int


@dataclass(frozen=True)
class Cell:
    """tensor[box] of each tensor of a kind: what any source slot and a target slot have in common, or a part of that
    which fits into a bucket. sources: slots that have it, each on other ranks."""

    box: Box
    sources: tuple[Slot, ...]
    target: Slot
    wire: Wire
    nbytes: int

    @property
    def kind(self) -> Kind:
        return self.target.kind


@dataclass(frozen=True)
class Group:
    """Tensors of one kind that the same ranks have, of source and of target: those of each of `layers` and `experts`
    (0 where a kind has none), experts varying fastest."""

    layers: tuple[int, ...]
    experts: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.layers) * len(self.experts)

    def tensor(self, number: int) -> tuple[int, int]:
        """Layer and expert of the tensor with this number."""
        layer, expert = divmod(number, len(self.experts))
        return self.layers[layer], self.experts[expert]


@dataclass(frozen=True)
class Plan:
    """Transfers as a table of rows: `source` sends `target` the `cell` of the tensors `first` … `first` + `count` - 1
    of the `group`. Numbers are int64 arrays of one length, sorted by target, then by cell.

    bucket_bytes: no transfer has more, unless it is one row of a tensor or of blocks; whole multiples of `ALIGNMENT`.
    """

    source_layout: Layout
    target_layout: Layout
    cells: tuple[Cell, ...]
    groups: tuple[Group, ...]
    cell: Numbers
    group: Numbers
    source: Numbers
    target: Numbers
    first: Numbers
    count: Numbers
    devices_per_node: int
    bucket_bytes: int

    @cached_property
    def unit(self) -> Numbers:
        """Bytes of each transfer of a row."""
        return np.array([cell.nbytes for cell in self.cells], np.int64)[self.cell]

    @cached_property
    def nbytes(self) -> Numbers:
        """Bytes of each row."""
        return self.unit * self.count

    @cached_property
    def link(self) -> Numbers:
        """`Link` of each row."""
        source, target = self.source_layout.device[self.source], self.target_layout.device[self.target]
        return np.where(source == target, Link.DEVICE, np.where(
            source // self.devices_per_node == target // self.devices_per_node, Link.NODE, Link.NETWORK))

    @property
    def moved(self) -> int:
        """Bytes that leave a GPU."""
        return int(self.nbytes[self.link != Link.DEVICE].sum())

    @property
    def transfer_count(self) -> int:
        return int(self.count.sum())

    def sent(self, link: Link) -> Numbers:
        """Bytes that each source rank sends over such links."""
        return self._by_rank(self.source, self.source_layout.ranks, link)

    def received(self, link: Link) -> Numbers:
        """Bytes that each target rank receives over such links."""
        return self._by_rank(self.target, self.target_layout.ranks, link)

    def _by_rank(self, rank: Numbers, ranks: int, link: Link) -> Numbers:
        chosen = self.link == link
        return np.bincount(rank[chosen], self.nbytes[chosen], ranks).astype(np.int64)

    def transfers(self, source: int | None = None, target: int | None = None) -> Iterator[Transfer]:
        """Those of a source rank, of a target rank, of a pair, or all; by target, then kind, then layer."""
        rows = np.ones(len(self.cell), bool)
        if source is not None:
            rows &= self.source == source
        if target is not None:
            rows &= self.target == target
        for row in np.flatnonzero(rows):
            yield from self._row(int(row))

    def buckets(self, target: int, whole: bool = False) -> Iterator[list[Transfer]]:
        """What a target rank receives, a bucket at a time: as many transfers as fit, each with `aligned` bytes.

        whole: no tensor is in two buckets, so that one that is larger than a bucket has one of its own; layer by layer,
        after what belongs to none. Otherwise in the order of `transfers`.
        """
        bucket: list[Transfer] = []
        free = self.bucket_bytes
        for unit in self._tensors(target) if whole else ([transfer] for transfer in self.transfers(target=target)):
            needed = aligned(sum(transfer.nbytes for transfer in unit))
            if bucket and needed > free:
                yield bucket
                bucket, free = [], self.bucket_bytes
            bucket += unit
            free -= needed
        if bucket:
            yield bucket

    def _tensors(self, target: int) -> list[list[Transfer]]:
        """What a target rank receives, tensor by tensor."""
        found: dict[str, list[Transfer]] = {}
        for transfer in self.transfers(target=target):
            found.setdefault(transfer.tensor, []).append(transfer)
        return [found[name] for name in sorted(found, key=_layer)]

    def bucket_count(self, target: int) -> int:
        """How many `buckets` there are, without making their transfers."""
        buckets, free = 0, 0
        rows = self.target == target
        for unit, left in zip(aligned(self.unit[rows]).tolist(), self.count[rows].tolist(), strict=True):
            fitting = min(free // unit, left)
            free, left = free - fitting * unit, left - fitting
            if left:
                each = max(self.bucket_bytes // unit, 1)
                opened = -(-left // each)
                buckets += opened
                free = max(self.bucket_bytes - (left - (opened - 1) * each) * unit, 0)
        return buckets

    def _row(self, row: int) -> Iterator[Transfer]:
        cell, group = self.cells[self.cell[row]], self.groups[self.group[row]]
        source, target, first = int(self.source[row]), int(self.target[row]), int(self.first[row])
        layout = self.source_layout
        for number in range(first, first + int(self.count[row])):
            layer, expert = group.tensor(number)
            slot = next(slot for slot in cell.sources if layout.has(source, slot))
            yield Transfer(
                source, target, cell.kind.name.format(layer=layer, expert=expert), cell.box,
                layout.place(slot, cell.box, layer, expert),
                self.target_layout.place(cell.target, cell.box, layer, expert), cell.wire, cell.nbytes)


def _layer(tensor: str) -> int:
    layer = LAYER.search(tensor)
    return int(layer[1]) if layer else -1


def aligned(nbytes):
    """Bytes, or an array of them, rounded up so that what follows them in a bucket is aligned."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def make_plan(
    source: Layout, target: Layout, *, source_dtype: str, target_dtype: str, devices_per_node: int, bucket_bytes: int
) -> Plan:
    """source_dtype, target_dtype: of the two models, torch's names; `wire.stored_dtype` has the exceptions.

    ValueError when the layouts are not of one model.
    """
    cells = tuple(_cells(source, target, source_dtype, target_dtype, bucket_bytes))
    rows = _Rows(source, target, devices_per_node)
    for number, cell in enumerate(cells):
        rows.add(number, cell)
    wanted = np.concatenate(rows.table, axis=1)
    units = np.array([cell.nbytes for cell in cells], np.int64)[wanted[0]]
    row, sender, first, count = deal(rows.candidates, rows.links, wanted[3], units, wanted[4], source.ranks)
    cell, group, receiver = wanted[0][row], wanted[1][row], wanted[2][row]
    order = np.lexsort((first, group, cell, receiver))
    return Plan(source, target, cells, tuple(rows.groups), cell[order], group[order], sender[order], receiver[order],
                first[order], count[order], devices_per_node, bucket_bytes)


def _cells(source: Layout, target: Layout, held: str, wanted: str, bucket_bytes: int) -> Iterator[Cell]:
    """Of each target slot, what the distinct boxes of the source's slots have in common with it."""
    boxes: dict[Kind, dict[tuple[tuple[int, int], ...], list[Slot]]] = {}
    for slot in source.slots:
        boxes.setdefault(slot.kind, {}).setdefault(tuple((s.start, s.stop) for s in slot.box), []).append(slot)
    found: dict[Kind, list[tuple[Box, tuple[Slot, ...], Slot]]] = {}
    for slot in target.slots:
        parts = [(common, tuple(holders), slot) for key, holders in boxes.get(slot.kind, {}).items()
                 if (common := intersection(tuple(slice(*span) for span in key), slot.box))]
        have, need = sum(size(box) for box, _, _ in parts), size(slot.box)
        if have != need:
            raise ValueError(f"{slot.kind.name}: the source has {have} elements of the {need} in {slot.box} that "
                             f"{slot.parameter} of the target needs; both layouts must be of one model")
        found.setdefault(slot.kind, []).extend(parts)
    for kind, parts in found.items():
        dtypes = [stored_dtype(kind.name, kind.shape, dtype) for dtype in (held, wanted)]
        sent = wire(*dtypes, dtypes[1] == FLOAT8 and all(whole_blocks(box, kind.shape) for box, _, _ in parts))
        for box, holders, slot in parts:
            for part in _fitting(box, sent, bucket_bytes):
                yield Cell(part, holders, slot, sent, sent.nbytes(part))


def _fitting(box: Box, sent: Wire, bucket_bytes: int) -> Iterator[Box]:
    """The box in parts of rows that fit into a bucket."""
    rows, *rest = box
    step = sent.block[0] if sent.block else 1
    line = max(sent.nbytes((slice(rows.start, min(rows.start + step, rows.stop)), *rest)), 1)
    each = max(bucket_bytes // line, 1) * step
    for start in range(rows.start, rows.stop, each):
        yield slice(start, min(start + each, rows.stop)), *rest


class _Rows:
    """Which target ranks want a cell of which tensors, and which source ranks could send it.

    table:       arrays [5, N] of cell, group, target rank, candidates, and how many tensors.
    candidates:  distinct sets of source ranks that could send; links: over what.
    """

    def __init__(self, source: Layout, target: Layout, devices_per_node: int):
        self._source, self._target, self._each = source, target, devices_per_node
        layers, experts = range(len(source.layer_stage)), range(len(source.expert_part))
        self._layers = _alike(layers, source.layer_stage, target.layer_stage)
        self._experts = _alike(experts, source.expert_part, target.expert_part)
        self.table: list[Numbers] = []
        self.groups: list[Group] = []
        self.candidates: list[Numbers] = []
        self.links: list[Link] = []
        self._groups_of: dict[Kind, list[Group]] = {}
        self._group_numbers: dict[Group, int] = {}
        self._candidate_numbers: dict[tuple[Link, bytes], int] = {}
        self._nearest: dict[tuple[bytes, bytes], Numbers] = {}

    def add(self, number: int, cell: Cell) -> None:
        if cell.kind not in self._groups_of:
            self._groups_of[cell.kind] = self._split(cell.kind)
        for group in self._groups_of[cell.kind]:
            if group not in self._group_numbers:
                self._group_numbers[group] = len(self.groups)
                self.groups.append(group)
            layer, expert = group.tensor(0)
            targets = self._target.holders(cell.target, layer, expert)
            held = np.unique(np.concatenate([self._source.holders(slot, layer, expert) for slot in cell.sources]))
            nearest = self._candidates(held, targets)
            self.table.append(np.stack(np.broadcast_arrays(
                number, self._group_numbers[group], targets, nearest, group.count)))

    def _split(self, kind: Kind) -> list[Group]:
        own = set(kind.layers or ())
        layers = [(0,)] if kind.layers is None else [
            common for group in self._layers if (common := tuple(i for i in group if i in own))]
        experts = [(0,)] if kind.experts is None else self._experts
        return [Group(*parts) for parts in product(layers, experts)]

    def _candidates(self, held: Numbers, targets: Numbers) -> Numbers:
        """For each target the number of the set of ranks, of those that hold a cell, that are nearest to it."""
        key = held.tobytes(), targets.tobytes()
        if key not in self._nearest:
            devices = self._source.device[held]
            wanting = self._target.device[targets]
            same = devices[None] == wanting[:, None]
            near = devices[None] // self._each == wanting[:, None] // self._each
            found = []
            for on_device, on_node in zip(same, near, strict=True):
                link, chosen = ((Link.DEVICE, held[on_device]) if on_device.any() else
                                (Link.NODE, held[on_node]) if on_node.any() else (Link.NETWORK, held))
                found.append(self._number(link, chosen))
            self._nearest[key] = np.array(found, np.int64)
        return self._nearest[key]

    def _number(self, link: Link, chosen: Numbers) -> int:
        key = link, chosen.tobytes()
        if key not in self._candidate_numbers:
            self._candidate_numbers[key] = len(self.candidates)
            self.candidates.append(chosen)
            self.links.append(link)
        return self._candidate_numbers[key]


def _alike(numbers: Sequence[int], *owners: Numbers) -> list[tuple[int, ...]]:
    """Numbers that have the same owner on both sides, together; groups by their first number."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number in numbers:
        groups.setdefault(tuple(int(owner[number]) for owner in owners), []).append(number)
    return [tuple(group) for group in groups.values()]

