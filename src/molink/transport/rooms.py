"""Sources that wait until there is room where they send."""

import asyncio


class Rooms:
    """Owns a future for each that waits: one may give up without the others."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self) -> asyncio.Future[None]:
        """Done at the next `release`."""
        room: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(room)
        return room

    def release(self) -> None:
        """Let all of them go on."""
        for room in self._waiting:
            if not room.done():
                room.set_result(None)
        self._waiting.clear()
