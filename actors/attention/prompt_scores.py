"""Log-probabilities of prompt tokens, for the requests that want them: a slice of rows at a time, so that the logits of
a long prompt are never there all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from isotherm.cluster.engine.sequence import Chunk, Form
from isotherm.cluster.messages.requests import TokenLogprobs

SLICE_ROWS = 32  # × 129,280 tokens of DeepSeek-V3's vocabulary: 17 MB of logits


def score_prompts(
    chunks: Sequence[Chunk], x_TD: Tensor, logits: Callable[[Tensor], Tensor]
) -> dict[str, list[TokenLogprobs]]:
    """By request what its chunk's rows say of the prompt tokens in `chunk.scores`. x_TD: the model's output for the
    step's rows, in the order of the chunks; `logits`: its head, [N, D] → float32 [N, V]."""
    out: dict[str, list[TokenLogprobs]] = {}
    if chunks[-1].form is Form.DECODE:
        return out  # prompts are computed in the other form, and their chunks come last
    row = 0
    for chunk in chunks:
        if tokens := chunk.scores:
            request, first = chunk.sequence.request, row + tokens.start - 1 - chunk.start
            assert request.params.prompt_logprobs is not None
            scores = out[request.id] = []
            for begin in range(0, len(tokens), SLICE_ROWS):
                here = tokens[begin : begin + SLICE_ROWS]
                rows = slice(first + begin, first + begin + len(here))
                prompt = request.prompt[here.start : here.stop]
                scores += row_scores(logits(x_TD[rows]), prompt, request.params.prompt_logprobs)
        row += chunk.count
    return out


@torch.inference_mode()
def row_scores(logits_NV: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """What each row says of its token: its log-probability and rank, and the `top` most likely ones."""
    logprobs_NV = logits_NV.log_softmax(-1)
    chosen_N1 = logprobs_NV.gather(1, torch.tensor(tokens, device=logits_NV.device)[:, None])
    ranks = (logprobs_NV > chosen_N1).sum(-1) + 1
    values, ids = logprobs_NV.topk(top)
    return [
        TokenLogprobs(chosen, tuple(zip(top_ids, top_values, strict=True)), rank)
        for chosen, top_ids, top_values, rank in zip(
            chosen_N1[:, 0].tolist(), ids.tolist(), values.tolist(), ranks.tolist(), strict=True
        )
    ]
