"""What users import: `from isotherm.cluster.client import Client`. Needs httpx and pydantic alone."""

from isotherm.cluster.client.answers import (
    Choice,
    Chunk,
    Completion,
    RawResponse,
    TokenLogprob,
    ToolCall,
    ToolCallPiece,
    Usage,
)
from isotherm.cluster.client.async_client import AsyncClient, AsyncStream
from isotherm.cluster.client.batch import BatchSummary
from isotherm.cluster.client.batch_output import BatchResult, read_results
from isotherm.cluster.client.client import Client, Stream
from isotherm.cluster.client.errors import (
    APIError,
    AuthenticationError,
    BadRequestError,
    BatchError,
    ClientError,
    ConflictError,
    ConnectionFailedError,
    NotFoundError,
    OutputCutError,
    OutputError,
    OutputInvalidError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
    StreamBrokenError,
    UnavailableError,
)
from isotherm.cluster.client.operations import OperationEvent
from isotherm.cluster.client.params import Copies, ModelInfo, Operation
from isotherm.cluster.client.typed import tool

__all__ = [
    "APIError",
    "AsyncClient",
    "AsyncStream",
    "AuthenticationError",
    "BadRequestError",
    "BatchError",
    "BatchResult",
    "BatchSummary",
    "Choice",
    "Chunk",
    "Client",
    "ClientError",
    "Completion",
    "ConflictError",
    "ConnectionFailedError",
    "Copies",
    "ModelInfo",
    "NotFoundError",
    "Operation",
    "OperationEvent",
    "OutputCutError",
    "OutputError",
    "OutputInvalidError",
    "PermissionDeniedError",
    "RateLimitError",
    "RawResponse",
    "ServerError",
    "Stream",
    "StreamBrokenError",
    "TokenLogprob",
    "ToolCall",
    "ToolCallPiece",
    "UnavailableError",
    "Usage",
    "read_results",
    "tool",
]
