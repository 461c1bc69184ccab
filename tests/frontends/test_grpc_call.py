"""One call of a connection that others share."""

import asyncio
from typing import Any, cast

from picker.frontends.grpc_server import Call


class FullConnection:
    """Takes every message, and its socket takes none until it is told to."""

    def __init__(self) -> None:
        self.paused: asyncio.Future[None] | None = asyncio.get_running_loop().create_future()

    def send(self, stream_id: int, message: bytes) -> bool:
        return True


async def test_a_call_that_is_given_up_while_the_socket_is_full_does_not_end_the_others() -> None:
    connection = FullConnection()
    calls = [Call(cast(Any, connection), number, "/x") for number in (1, 3)]
    async with asyncio.TaskGroup() as group:
        given_up, waiting = (group.create_task(call.write(b"x")) for call in calls)
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.sleep(0)
        assert connection.paused is not None
        assert not connection.paused.done()
        connection.paused.set_result(None)
    assert given_up.cancelled()
    assert not waiting.cancelled()
