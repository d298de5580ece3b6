"""What a checkpoint wants of sampling where a client does not say: its generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path

from isotherm.cluster.jsontypes import JSON
from isotherm.cluster.model.config import Fields, ModelConfigError, token_ids

# Field → the least and the greatest value that it may have. `do_sample` is not among them: a server samples, unless
# the client asks for temperature 0.
NUMBERS = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 2.0),
}


def generation_defaults(path: Path) -> JSON:
    """By the names that SamplingParams has for them; `max_tokens` is the file's max_new_tokens. Empty where there is no
    such file. Raises ModelConfigError."""
    f = _read(path)
    found: JSON = {}
    for name, (least, most) in NUMBERS.items():
        if name in f.raw:
            value = f.number(name)
            if not least <= value <= most:
                raise f.fail(name, value, f"between {least:g} and {most:g}")
            found[name] = value
    if "top_k" in f.raw:
        found["top_k"] = f.integer("top_k", minimum=-1)
    if "max_new_tokens" in f.raw:
        found["max_tokens"] = f.integer("max_new_tokens")
    return found


def generation_ends(path: Path) -> tuple[int, ...]:
    """The tokens that end a text. Raises ModelConfigError."""
    f = _read(path)
    return token_ids(f.raw, "eos_token_id", f.where)


def _read(path: Path) -> Fields:
    """What the file says that is not null, or nothing where there is none. Raises ModelConfigError."""
    file = path / "generation_config.json"
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        raw = {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelConfigError(f"{file}: cannot be read ({error})") from None
    if not isinstance(raw, dict):
        raise ModelConfigError(f"{file}: must hold a JSON object, found {type(raw).__name__}")
    return Fields({name: value for name, value in raw.items() if value is not None}, str(file))
