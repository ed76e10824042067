"""Lines out of a stream of chunks, however long, in linear time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

MAX_LINE = 32 * 1024 * 1024
"""Bytes. etcd takes no object above 1.5 MiB; this bounds what a broken peer can make us hold."""


class Truncated(Exception):
    """The stream ended within a line."""


class LineTooLong(Exception):
    """A line has more than MAX_LINE bytes."""


async def iterate(
    chunks: AsyncIterator[bytes], line_seconds: float, *, max_line: int = MAX_LINE
) -> AsyncGenerator[bytes, None]:
    """Lines without their end, empty ones left out.

    Raises TimeoutError when a line does not become whole within `line_seconds` (so that a peer that sends a
    byte now and then is not alive), Truncated and LineTooLong. aiohttp's own line reader gives up at 128 KiB.
    """
    parts: list[bytes] = []
    size = 0
    loop = asyncio.get_running_loop()
    deadline = loop.time() + line_seconds
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            break
        *whole, rest = chunk.split(b"\n")
        for end in whole:
            line = b"".join((*parts, end))
            parts, size = [], 0
            if line:
                yield line
        if whole:
            deadline = loop.time() + line_seconds
        parts.append(rest)
        size += len(rest)
        if size > max_line:
            raise LineTooLong(f"a line of more than {max_line} bytes")
    if size:
        raise Truncated(f"the stream ended within a line, after {size} bytes of it")
