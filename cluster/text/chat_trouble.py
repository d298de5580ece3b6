"""Why chats cannot be had of a model, found out before one is asked for: its templates are tried."""

from __future__ import annotations

from isotherm.cluster.text.chat_template import DEFAULT, ChatTemplate, ChatTemplateError
from isotherm.cluster.text.template_traits import TemplateTraits


def chat_trouble(template: ChatTemplate) -> list[str]:
    """A line for each of the templates that is of no use, or whose prompts would lack something. Blocks for as long as
    rendering them takes."""
    found = []
    try:
        template.choose()
    except ChatTemplateError as error:
        found.append(str(error))
    for name in template.sources:
        words = _trouble(TemplateTraits(template, name))
        if words:
            found.append(words if name == DEFAULT else f"(template {name}) {words}")
    return found


def _trouble(traits: TemplateTraits) -> str:
    try:
        if words := traits.trouble:
            return words
        unnamed = traits.unnamed_tokens  # which compiles templates for other purposes too
    except ChatTemplateError as error:
        return str(error)
    # Many templates end a turn by a token that some of these checkpoints do not have; all begin a text by one they do.
    if "bos_token" in unnamed:
        return (
            "the model's chat template begins with bos_token, which tokenizer_config.json is to name: prompts lack it"
        )
    return ""
