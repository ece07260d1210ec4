"""A speculative algorithm for SGLang: drafts come from what the members of a request's group have read and generated.

A plug-in of SGLang's, which finds it by the entry point beside this file: the folder is where the server's first script
is, and so on the path of all its processes. What is drafted and how is `megatron_pbsd.rollout.drafting`, of which the
modules that are needed here import numpy and numba alone, as SGLang does. SGLang's own worker for n-grams does the
rest: it verifies trees of drafts in one pass. Two things of it are others here:

- its store of n-grams is not built;
- tokens are sampled as they are without drafts. SGLang's rule accepts a draft with the right chance, but by random
  numbers of its own, and on CPUs it takes the likeliest token at any temperature. Here a token is sampled after each
  node of the tree, with the seed and the position that it has without drafts, and those nodes are kept that are what
  was sampled: the very tokens that would have come one by one.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path

ALGORITHM = "PBSD_GROUP"
WORKER = "sglang.srt.speculative.ngram_worker"


def register():
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
    from sglang.srt.speculative.spec_registry import CustomSpecAlgo

    class GroupDrafts(CustomSpecAlgo):
        """To the rest of SGLang it is its n-grams."""

        def is_ngram(self):
            return True

        def has_draft_kv(self):
            return False

        def handle_server_args(self, server_args):
            SpeculativeAlgorithm.NGRAM.handle_server_args(server_args)

        def __getattr__(self, name):
            # SGLang asks more of its algorithms than their base class for plug-ins answers.
            if name.startswith("__"):
                raise AttributeError(name)
            return getattr(SpeculativeAlgorithm.NGRAM, name)

    SpeculativeAlgorithm.register(ALGORITHM, supports_overlap=False, spec_class=GroupDrafts)(worker_class)


def worker_class(server_args):
    """In a process that computes: the only kind that needs more than the algorithm's name."""
    import numpy as np
    import torch
    from sglang.kernels.ops.speculative.spec_tree import verify_tree_greedy_func
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.speculative.ngram_worker import NGRAMWorker
    from sglang.srt.state_capturer.routed_experts import get_global_experts_capturer

    make_project_importable()
    from megatron_pbsd.rollout.drafting.draft_tree import NO_DRAFT
    from megatron_pbsd.rollout.drafting.request_drafts import RequestDrafts

    class GroupWorker(NGRAMWorker):
        def __init__(self, *arguments, **named):
            HookRegistry.register(f"{WORKER}.NgramCorpus", NoCorpus, HookType.REPLACE)
            HookRegistry.register(f"{WORKER}.eagle_sample", self._verify, HookType.AROUND)
            HookRegistry.apply_hooks()
            super().__init__(*arguments, **named)
            self._drafts = RequestDrafts(self.draft_token_num - 1)
            self._running = {}

        def forward_batch_generation(self, batch, *arguments, **named):
            self._take_in(batch.reqs)
            return super().forward_batch_generation(batch, *arguments, **named)

        def _take_in(self, requests):
            """What has ended is known to the end, before anything is drafted from it or told to follow it."""
            for rid in [rid for rid, request in self._running.items() if request.finished()]:
                self._remember(self._running.pop(rid))
            for request in requests:
                if said(request) and request.rid not in self._running:
                    self._running[request.rid] = request
                    self._drafts.learn(said(request))

        def _remember(self, request):
            self._drafts.remember(said(request), request.origin_input_ids_unpadded, request.output_ids_through_stop)

        def _prepare_draft_tokens(self, batch):
            slots = self.draft_token_num
            tokens = np.zeros((len(batch.reqs), slots), np.int64)
            masks = np.empty((len(batch.reqs), slots, slots), bool)
            for row, request in enumerate(batch.reqs):
                tree = self._tree(request)
                tokens[row, 0] = request.output_ids[-1]
                tokens[row, 1 : 1 + len(tree.tokens)] = tree.tokens
                masks[row] = tree.mask(slots)
            return tokens.ravel(), masks.ravel()

        def _tree(self, request):
            """The last token that there is room for comes without a draft."""
            room = request.sampling_params.max_new_tokens - len(request.output_ids) - 1
            if not said(request) or room < 1:
                return NO_DRAFT
            self._remember(request)
            return self._drafts.tree(said(request), room)

        def _update_ngram_corpus(self, batch):
            """Done when drafts are made."""

        def _verify(self, original, verify_input, batch, logits_output, *arguments, **named):
            if batch.sampling_info.is_all_greedy:
                verified = original(verify_input, batch, logits_output, *arguments, **named)
            else:
                verified = self._sampled(verify_input, batch, logits_output)
            _, lengths, index = verified
            self._move_experts(batch.out_cache_loc, lengths, index)
            return verified

        def _sampled(self, verify_input, batch, logits_output):
            """What `eagle_sample` returns: tokens by slot, how many of each request are kept (the one after its drafts
            included), and their slots [requests, slots], -1 after the last."""
            slots, requests, logits = self.draft_token_num, len(batch.reqs), logits_output.next_token_logits
            every = copy.copy(batch.sampling_info)
            for name in ("temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed"):
                if (values := getattr(every, name)) is not None:
                    setattr(every, name, values.repeat_interleave(slots, 0))
            # The sampler overwrites logits, of which log-probs are taken afterwards.
            logits_output.next_token_logits = logits.clone()
            sampled = self.model_runner.sampler(
                logits_output, every, False, [0] * len(logits), [None] * len(logits), verify_input.positions)
            logits_output.next_token_logits = logits
            tokens = torch.zeros(len(logits), dtype=torch.int32, device=logits.device)
            index = torch.full((requests, verify_input.max_tree_depth), -1, dtype=torch.int32, device=logits.device)
            kept = torch.empty(requests, dtype=torch.int32, device=logits.device)
            # It keeps what equals a prediction, which it calls greedy.
            tokens, index, kept = verify_tree_greedy_func(
                tokens, index, kept, verify_input.draft_token.reshape(requests, slots), verify_input.retrieve_index,
                verify_input.retrieve_next_token, verify_input.retrieve_next_sibling,
                sampled.long().reshape(requests, slots), verify_input.tree_topk)
            return tokens, kept + 1, index

        def _move_experts(self, places, lengths, index):
            """The KV of tokens that are kept moves to the front of a request's places; which experts read them is noted
            by place, and has to move too."""
            if (capturer := get_global_experts_capturer()) is None:
                return
            places, lengths, index = places.cpu().view(len(index), -1), lengths.cpu(), index.cpu()
            front = places[torch.arange(places.shape[1]) < lengths[:, None]]
            noted = capturer.host_cache.buffer
            noted[front] = noted[places.ravel()[index[index >= 0].long()]]

    return GroupWorker


class NoCorpus:
    """In the place of SGLang's store of n-grams, which would be compiled first."""

    def __init__(self, **_):
        pass

    def reset(self):
        pass

    def erase_match_state(self, rids):
        pass


def said(request):
    """What a request says of its group; nothing for those that only score."""
    return request.sampling_params.custom_params


def make_project_importable():
    """This project's packages by where they are, and nothing of what is installed beside them."""
    folder = Path(__file__).resolve().parents[4]
    spec = importlib.util.spec_from_file_location(
        folder.name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    sys.modules[folder.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
