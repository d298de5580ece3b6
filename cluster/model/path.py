"""Turns the MODEL argument into a directory: a path, `tiny`, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from isotherm.cluster.errors import IsothermError, one_line
from isotherm.cluster.model.registry import load_config

DESCRIPTION = ["*.json", "*.jinja", "tiktoken.model"]  # a few megabytes that say what the model is
WEIGHTS = ["*.safetensors"]


class ModelNotFoundError(IsothermError, ValueError):
    """MODEL names nothing that can be had; the message says what to do."""


def bundled_model() -> Path:
    """The small trained model that comes with Isotherm."""
    import isotherm.manifests

    return Path(next(iter(isotherm.manifests.__path__))) / "tiny"


def resolve_model(model: str, weights: bool = True) -> Path:
    """An absolute directory. A hub id is downloaded (or taken from the cache) by huggingface_hub, which shows its
    progress; pickles and code are never fetched, and weights only where they are asked for and the rest can be served.
    Raises ModelNotFoundError, ModelConfigError, TokenizerError or ProxyError."""
    if model == "tiny":  # a directory of that name is ./tiny
        return bundled_model()
    refused = ModelNotFoundError(
        f'MODEL is {model!r}; it must be a directory, "tiny", or a hub id such as deepseek-ai/DeepSeek-V3'
    )
    try:
        path = Path(model).expanduser()
        if model and path.is_dir():
            return path.resolve()
        if path.exists():
            raise refused
    except (OSError, ValueError, RuntimeError):  # too long, a null character, ~ of nobody
        raise refused from None
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id

    from isotherm.cluster.proxies import proxy_for
    from isotherm.cluster.text.tokenizer_files import tokenizer_file

    try:
        validate_repo_id(model)
    except HFValidationError:
        raise refused from None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model, re.ASCII):
        raise refused

    try:
        description = Path(snapshot_download(model, allow_patterns=DESCRIPTION))
        load_config(description)
        tokenizer_file(description)
        return Path(snapshot_download(model, allow_patterns=DESCRIPTION + WEIGHTS)) if weights else description
    except RepositoryNotFoundError:
        raise ModelNotFoundError(
            f'the hub has no model "{model}" that you may read; log in with `hf auth login` if it is private'
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise ModelNotFoundError(
            f'"{model}" is not a directory here, and the hub cannot be reached ({one_line(error)}). Download it where '
            f"there is a network (`hf download {model}`) and give the directory, or try the bundled model: "
            "isotherm serve tiny"
        ) from None
    except IsothermError:
        raise
    except Exception:
        proxy_for(httpx.URL(ENDPOINT))  # what the hub's client says of one that cannot be used names no variable
        raise
