"""Processes that a test runs to their end."""

import asyncio
from asyncio.subprocess import PIPE, STDOUT


async def run_to_end(*command: str, deadline: float, apart: bool = False) -> tuple[int | None, str, str]:
    """Return the exit status of a command, its output and, if that is to be `apart`, its errors.

    Raises TimeoutError after `deadline` seconds. The process has ended then, too.
    """
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE if apart else STDOUT)
    try:
        async with asyncio.timeout(deadline):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, out.decode(), (err or b"").decode()
