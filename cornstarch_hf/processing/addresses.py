"""Fetches what lies at an address, in bounded time and size, and of the public network alone where that is asked for.

`opening` opens whatever users hand over, and asks here where that is an address.
"""

import asyncio
import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from huggingface_hub.utils import httpx

from ..limits import cap

REFUSED = "which local_media=False (limits.LOCAL_MEDIA) keeps out of messages and rows"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def fetch(address: str, public: bool) -> bytes:
    """What lies at an address (http, https), and one byte more than `limits.MAX_FILE_BYTES` at most.

    Args:
        public: whether the address, and each that it leads to, must be one of the public network.

    Raises:
        TimeoutError: it has not come whole within `limits.MAX_FETCH_SECONDS`.
        OSError: the server cannot be reached, or answers otherwise.
        ValueError: no such address, or none of the public network.
    """
    # In a thread of its own, since the caller may stand in a running event loop; there all steps have one limit of time.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, _within_time(address, public)).result()


async def _within_time(address: str, public: bool) -> bytes:
    seconds = cap("MAX_FETCH_SECONDS")
    try:
        async with asyncio.timeout(seconds):
            return await _body(address, public)
    except TimeoutError as error:
        raise TimeoutError(
            f"it has not come within cornstarch_hf.limits.MAX_FETCH_SECONDS = {seconds:,}: if that is meant, set the "
            "attribute higher before."
        ) from error
    except httpx.InvalidURL as error:
        raise ValueError(f"it is no address ({error})") from error
    except ExceptionGroup as error:  # of connections that are tried together
        raise OSError(f"it cannot be fetched ({error.exceptions[0]})") from error
    except httpx.HTTPError as error:
        raise OSError(f"it cannot be fetched ({type(error).__name__}: {error})") from error


async def _body(address: str, public: bool) -> bytes:
    # A proxy would connect to an address that nobody here has seen.
    way: dict[str, Any] = {"transport": _PublicNetwork(), "trust_env": False} if public else {}
    # Not compressed: few bytes could become many.
    headers = {"Accept-Encoding": "identity"}
    async with (
        httpx.AsyncClient(follow_redirects=True, timeout=None, headers=headers, **way) as client,
        client.stream("GET", address) as answer,
    ):
        if not answer.is_success:
            raise OSError(f"the server answers {answer.status_code} {answer.reason_phrase}")
        most, content = cap("MAX_FILE_BYTES") + 1, bytearray()
        async for chunk in answer.aiter_raw():
            content += chunk[: most - len(content)]
            if len(content) >= most:
                break
        return bytes(content)


class _PublicNetwork(httpx.AsyncBaseTransport):
    """Connects to addresses of the public network alone: names are looked up once, and what was looked at is connected to.

    A client calls it anew for each redirect.
    """

    def __init__(self) -> None:
        self._inner = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        host, port = request.url.raw_host.decode("ascii"), request.url.port
        port = port or (443 if request.url.scheme == "https" else 80)
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        numbers = dict.fromkeys(str(address[0]) for *_, address in found)
        if not numbers or not all(map(is_public, numbers)):
            raise ValueError(f"it leads to {host!r}, of this machine or a network that is not public, {REFUSED}")
        failure: Exception | None = None
        for number in numbers:
            pinned = httpx.Request(
                request.method,
                request.url.copy_with(host=number),
                headers=request.headers,  # with the name as their Host
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": host},  # whose certificate is asked for
            )
            try:
                return await self._inner.handle_async_request(pinned)
            except httpx.ConnectError as error:  # the next one may be up
                failure = error
        raise failure or httpx.ConnectError(f"{host!r} has no address", request=request)

    async def aclose(self) -> None:
        await self._inner.aclose()


def is_public(number: str) -> bool:
    """Whether an IP address is one of the public network, as are those of version 4 that one of version 6 stands for.

    >>> [is_public(number) for number in ("8.8.8.8", "127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe")]
    [True, False, False, False]
    """
    address = ipaddress.ip_address(number)
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)))
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if embedded := [each for each in inner if each is not None]:
            return all(is_public(str(each)) for each in embedded)
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)
