"""What a chat's wishes about its thought come to: the template's variables, a limit for the sampler, and what of the
thought the reply has. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from isotherm.cluster.api.bodies.thinking import ThinkingBody
from isotherm.cluster.api.errors import ReplyError
from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.messages.requests import GenerationRequest
from isotherm.cluster.text.output import OutputParser
from isotherm.cluster.text.output_parsers import make_parser
from isotherm.cluster.text.template_traits import TemplateTraits
from isotherm.cluster.text.think_parser import THOUGHT_BEGIN, THOUGHT_END, HiddenThought
from isotherm.cluster.text.tokenizer import ChatPrompt, Tokenizer


def thinking_variables(body: ThinkingBody, traits: TemplateTraits) -> JSON:
    """What the template is given for what the body asks for. Raises ReplyError where the body asks for a thought of a
    template that has none."""
    given = body.chat_template_kwargs or {}
    variables: JSON = {} if body.effort is None else {"reasoning_effort": body.effort}
    switches = traits.thinking_switches
    if asked := body.thinking_asked:
        param, wanted = next(iter(asked.items()))
        possible = traits.knows_thoughts or _is_switched(body, traits)
        if wanted and not possible and not body.leaves_thought_to_model:
            raise ReplyError(f"{param}: the model's chat template knows no thinking", param=param)
        variables |= dict.fromkeys(switches, wanted)
    elif named := body.template_switches:  # by the name of another family, perhaps
        variables |= dict.fromkeys(switches, next(iter(named.values())))
    return {**variables, **given}


def with_thought_limit(
    requests: tuple[GenerationRequest, ...], body: ThinkingBody, prompt: ChatPrompt, tokenizer: Tokenizer
) -> tuple[GenerationRequest, ...]:
    """The requests, whose thoughts have the tokens that the body gives them: none where there are to be no thoughts and
    the template has no switch for them."""
    traits, limit = prompt.traits, body.thought_limit
    if not all(body.thinking_asked.values()):
        limit = 0 if traits.knows_thoughts and not _is_switched(body, traits) else None
    if limit is None:
        return requests
    begin, end = (tuple(tokenizer.encode(tag, add_special_tokens=False)) for tag in (THOUGHT_BEGIN, THOUGHT_END))
    limits: dict[str, Any] = {
        "thought_begin": () if prompt.in_thought else begin,
        "thought_end": end,
        "max_thinking_tokens": limit,
    }
    return tuple(replace(request, params=replace(request.params, **limits)) for request in requests)


def _is_switched(body: ThinkingBody, traits: TemplateTraits) -> bool:
    """Whether the template sees to it that there is a thought or none, as the body asks."""
    by_effort = body.effort is not None and "reasoning_effort" in traits.variables
    return by_effort or bool(traits.thinking_switches)


def parser_for(body: ThinkingBody, prompt: ChatPrompt) -> Callable[[], OutputParser]:
    """What makes the parser of each choice."""
    name = "plain" if body.separate_reasoning is False else "think"
    new_parser = partial(make_parser, name, THOUGHT_BEGIN if prompt.in_thought else prompt.text)
    return (lambda: HiddenThought(new_parser())) if body.hides_thought else new_parser
