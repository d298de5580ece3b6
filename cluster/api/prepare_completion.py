"""From the prompts of a completion, as text or token ids, to the engine's requests."""

from __future__ import annotations

from functools import partial

from isotherm.cluster.api.bodies.completion import CompletionBody
from isotherm.cluster.api.choices import LogprobForm
from isotherm.cluster.api.openai_replies import OpenAIReply
from isotherm.cluster.api.parse import parse_body
from isotherm.cluster.api.prepare import Prepared, Served, check_chars, check_model, generation_requests, told_prompts
from isotherm.cluster.api.structure import output_constraint
from isotherm.cluster.text.output_parsers import make_parser


def prepare_completion(raw: bytes, reply_id: str, served: Served) -> Prepared:
    """The requests for a body of /v1/completions. Raises ReplyError."""
    body, tokenizer = parse_body(CompletionBody, raw), served.tokenizer
    check_model(body.model, served.names)
    prompts, params = body.prompts, [body.prompt_param(i) for i in range(len(body.prompts))]
    ids: list[list[int]] = []
    for prompt, param in zip(prompts, params, strict=True):
        if isinstance(prompt, str):
            check_chars(len(prompt), served.limits, param)
            ids.append(tokenizer.encode_prompt(prompt, body.add_special_tokens is not False))
        else:
            ids.append(list(prompt))
    constraint = output_constraint(body, tokenizer, served.limits.vocab_size)
    requests = generation_requests(body, ids, params, reply_id, served, constraint)
    texts = (
        [
            prompt if isinstance(prompt, str) else tokenizer.decode(prompt, body.skip_special_tokens is not False)
            for prompt in prompts
        ]
        if body.echo
        else [""] * len(prompts)
    )
    echo = tuple(text for text in texts for _ in range(body.samples))
    new_reply = partial(
        OpenAIReply,
        reply_id,
        body.model,
        chat=False,
        include_usage=body.include_usage,
        prompts=told_prompts(body, ids),
    )
    form = None if body.logprobs is None else LogprobForm.COMPLETION
    return Prepared(reply_id, body, requests, echo, lambda choice: make_parser("plain"), new_reply, form)
