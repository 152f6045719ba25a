"""Teacher forcing inside vLLM, as a logits processor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from benchmarks.accuracy_engines import FORCED


class ForcedTokens(AdapterLogitsProcessor):
    """Makes a request generate given tokens, one a step, as in teacher forcing.

    Log-probabilities that vLLM reports are those of before logits processors.  Tokens in the prompt
    would not do: prefill is exact, and only tokens that are decoded read codes.
    """

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
