"""What users import: `from isotherm.cluster.client import Client`. Needs httpx alone."""

from isotherm.cluster.client.answers import (
    APIError,
    Choice,
    Chunk,
    ClientError,
    Completion,
    ConnectionFailedError,
    RawResponse,
    StreamBrokenError,
    Usage,
)
from isotherm.cluster.client.async_client import AsyncClient
from isotherm.cluster.client.client import Client

__all__ = [
    "APIError",
    "AsyncClient",
    "Choice",
    "Chunk",
    "Client",
    "ClientError",
    "Completion",
    "ConnectionFailedError",
    "RawResponse",
    "StreamBrokenError",
    "Usage",
]
