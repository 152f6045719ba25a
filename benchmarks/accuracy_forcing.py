"""Teacher forcing inside vLLM, as a logits processor for each of its model runners.

Log-probabilities that vLLM reports are those of before logits processors.  Tokens in the prompt
would not do: prefill is exact, and only tokens that are decoded read codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import (
    LogitsContext,
    LogitsProcessor,
    LogitsProcRequestState,
)

from benchmarks.accuracy_engines import FORCED

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MOST = 256
"""Tokens that can be forced in one request, on GPUs."""


class ForcedTokens(AdapterLogitsProcessor):
    """Makes a request generate given tokens, one a step, as in teacher forcing (V1, on CPUs)."""

    def is_argmax_invariant(self) -> bool:
        """It is not: it decides the token."""
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        """The function for a request, if it forces tokens."""
        tokens = (params.extra_args or {}).get(FORCED)
        if tokens is None:
            return None

        def force(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            if len(output) < len(tokens):
                only = logits[tokens[len(output)]].clone()
                logits.fill_(float("-inf"))
                logits[tokens[len(output)]] = only
            return logits

        return force


class ForcedTokensV2(LogitsProcessor):
    """The same for model runner V2, which works on the rows of a batch at once."""

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        n, device = req_states.max_num_reqs, req_states.device
        self.prompt_lens = req_states.prompt_len.np
        self.tokens = torch.full((n, MOST), -1, dtype=torch.int64, device=device)
        self.first = torch.zeros(n, dtype=torch.int64, device=device)
        """Position of the last prompt token, from which the first forced token comes."""

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Note the tokens of a request; False if it has none."""
        tokens = (sampling_params.extra_args or {}).get(FORCED) or []
        if len(tokens) > MOST:
            raise ValueError(f"{len(tokens)} tokens are more than the {MOST} that can be forced")
        padded = [*tokens, *[-1] * (MOST - len(tokens))]
        self.tokens[req_idx] = torch.tensor(padded, device=self.tokens.device)
        self.first[req_idx] = int(self.prompt_lens[req_idx]) - 1
        return bool(tokens)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Leave one token to every row that is to have one."""
        slot = ctx.expanded_idx_mapping.long()
        step = ctx.pos.long() - self.first[slot]
        token = self.tokens[slot, step.clamp(0, MOST - 1)]
        token = torch.where((step >= 0) & (step < MOST), token, -1)[:, None]
        others = torch.arange(logits.shape[1], device=logits.device) != token
        return logits.masked_fill_(others & (token >= 0), float("-inf"))
