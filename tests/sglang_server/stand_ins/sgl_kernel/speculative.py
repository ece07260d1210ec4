"""Trees of drafts: who follows whom."""

import torch


def reconstruct_indices_from_tree_mask(
    mask, lengths, positions, places, first_children, next_siblings, requests, nodes
):
    """mask [requests · nodes · nodes]: row i marks what node i attends to. Of every node, written in place: its
    position, its number in the batch, its first child and its parent's next child, -1 where there is none."""
    order = torch.arange(nodes)
    before = mask.view(requests, nodes, nodes) & (order < order[:, None])
    positions.copy_((before.sum(-1) + lengths[:, None]).ravel())
    places.copy_(torch.arange(requests * nodes).view(requests, nodes))
    parents = torch.where(before, order, -1).amax(-1)
    for request in range(requests):
        children = {}
        for node, parent in enumerate(parents[request].tolist()):
            children.setdefault(parent, []).append(node)
        first_children[request] = torch.tensor([children.get(node, [-1])[0] for node in range(nodes)])
        next_siblings[request] = -1
        for parent, family in children.items():
            if parent >= 0:
                next_siblings[request, family[:-1]] = torch.tensor(family[1:], dtype=torch.int64)
