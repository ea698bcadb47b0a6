"""What lies at addresses, in bounded time; those that strangers wrote are left to the package, which looks where they lead."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from huggingface_hub.utils import httpx

from ...checkpoints.code_folder import needs_package
from ...limits import cap

REFUSED = "which local_media=False (limits.LOCAL_MEDIA) keeps out of messages and rows"


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
