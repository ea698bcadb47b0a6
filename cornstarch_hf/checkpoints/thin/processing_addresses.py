"""What lies at addresses, in bounded time; those that strangers wrote are left to the package, which looks where they lead."""

import asyncio
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from huggingface_hub.utils import httpx

from ...checkpoints.code_folder import needs_package
from ...limits import cap

REFUSED = "which local_media=False (limits.LOCAL_MEDIA) keeps out of messages and rows"


class Foreign(str):
    """A text that a stranger wrote, which may name no file of this machine and no address."""


def foreign(item: Any) -> Any:
    """An item whose paths and addresses, at any depth, are `Foreign`."""
    if isinstance(item, (str, os.PathLike)):
        return Foreign(os.fsdecode(item))
    if isinstance(item, Mapping):
        return {key: foreign(value) for key, value in item.items()}
    return type(item)(map(foreign, item)) if type(item) in (list, tuple) else item


def local_allowed(given: bool | None) -> bool:
    """Whether messages and rows may name files of this machine: as given, else `limits.LOCAL_MEDIA`."""
    return bool(cap("LOCAL_MEDIA") if given is None else given)


def fetch(address: str, public: bool) -> bytes:
    """What lies at an address, in bounded time and size; ImportError where it must be of the public network."""
    if public:
        raise needs_package("What looks where the addresses of strangers lead (local_media=False)")
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, asyncio.wait_for(_body(address), cap("MAX_FETCH_SECONDS"))).result()


async def _body(address: str) -> bytes:
    most, content = cap("MAX_FILE_BYTES") + 1, bytearray()
    async with (
        httpx.AsyncClient(follow_redirects=True, timeout=None, headers={"Accept-Encoding": "identity"}) as client,
        client.stream("GET", address) as answer,
    ):
        if not answer.is_success:
            raise OSError(f"the server answers {answer.status_code} {answer.reason_phrase}")
        async for chunk in answer.aiter_raw():
            content += chunk[: most - len(content)]
            if len(content) >= most:
                break
    return bytes(content)
