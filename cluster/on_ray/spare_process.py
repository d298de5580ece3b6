"""A process that Ray starts before anybody needs it: the next actor of its node begins there (actors/preload.py says
what it does meanwhile)."""

from __future__ import annotations

import asyncio
from typing import Any

import ray

# What Ray's own state API uses to ask a raylet; there is no public way.
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc

_generated: tuple[Any, Any] = common_pb2, node_manager_pb2
ASK_SECONDS = 5.0


async def start_spare(node_id: str, seconds: float) -> bool:
    """Have a node's raylet start one that it keeps for so many seconds. False: there is no such node any more. Raises
    what gRPC raises."""
    return await asyncio.to_thread(_start, node_id, seconds)


def _start(node_id: str, seconds: float) -> bool:
    node = next((node for node in ray.nodes() if node["NodeID"] == node_id and node["Alive"]), None)
    if node is None:
        return False
    host = node["NodeManagerAddress"]
    channel = init_grpc_channel(f"{f'[{host}]' if ':' in host else host}:{node['NodeManagerPort']}", options=[])
    common, messages = _generated
    asked = messages.PrestartWorkersRequest(
        language=common.Language.Value("PYTHON"), num_workers=1, keep_alive_duration_secs=int(seconds)
    )
    try:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(asked, timeout=ASK_SECONDS)
    finally:
        channel.close()
    return True
