"""Opens what users hand over: paths, bytes, addresses, base64, open files; and tells what could not be decoded of it.

What strangers wrote may name nothing of this machine.
"""

import base64
import os
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any
from urllib.request import url2pathname

from PIL import Image

from ..limits import cap, check
from .addresses import REFUSED, fetch


class Foreign(str):
    """A text that a stranger wrote, which may name no file of this machine and no address in its networks."""


def foreign(item: Any) -> Any:
    """An item whose paths and addresses, at any depth, are `Foreign`; what is in memory already stays as it is."""
    if isinstance(item, (str, os.PathLike)):
        return Foreign(os.fsdecode(item))
    if isinstance(item, Mapping):
        return {key: foreign(value) for key, value in item.items()}
    return type(item)(map(foreign, item)) if type(item) in (list, tuple) else item


def local_allowed(given: bool | None) -> bool:
    """Whether messages and rows may name files of this machine: as given, else `limits.LOCAL_MEDIA` (ValueError: no bool)."""
    allowed = cap("LOCAL_MEDIA") if given is None else given
    if not isinstance(allowed, bool):
        raise ValueError(f"local_media must be True or False, or None for limits.LOCAL_MEDIA, got {allowed!r:.100}.")
    return allowed


def opened(item: Any, where: str) -> str | bytes:
    """The path of a local file, or the bytes behind anything else that `is_file` (ValueError: no file, or too large a one)."""
    if isinstance(item, (bytes, bytearray, memoryview)):
        source: str | bytes = bytes(item)
    elif hasattr(item, "__fspath__"):
        source = os.fsdecode(item)
    elif isinstance(item, str):
        source = _addressed(item)
    else:
        source = _read(item)
    size = os.path.getsize(source) if isinstance(source, str) else len(source)
    check(size, "MAX_FILE_BYTES", f"{where}: the number of bytes of the encoded item is at least")
    return source


def _addressed(text: str) -> str | bytes:
    scheme, _, rest = text.partition(":")
    if (scheme := scheme.lower()) in ("http", "https"):
        address = urllib.parse.quote(text, safe="!#$%&'()*+,/:;=?@[]~")  # spaces and letters, as browsers write them
        return fetch(address, public=isinstance(text, Foreign))
    if scheme == "file":
        if isinstance(text, Foreign):
            raise ValueError(f"it names a file of this machine, {REFUSED}")
        parts = urllib.parse.urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"the file lies on another machine, {parts.netloc!r}")
        return url2pathname(parts.path)
    if scheme == "data":
        content = rest.partition(",")[2]
        # What is written out byte by byte is no base64.
        return _base64(urllib.parse.unquote(content)) or urllib.parse.unquote_to_bytes(content)
    if not isinstance(text, Foreign) and os.path.isfile(text):
        return text
    if (found := _base64(text)) is None:
        if isinstance(text, Foreign):
            raise ValueError(f"it is no address (http, https, data) and no base64 text, but names a file, {REFUSED}")
        raise ValueError("there is no such file, and it is no address (http, https, file, data) and no base64 text")
    return found


def _base64(text: str) -> bytes | None:
    try:
        return base64.b64decode("".join(text.split()), validate=True) or None  # line breaks inside are usual
    except ValueError:
        return None


def _read(file: Any) -> bytes:
    """All bytes of an open file, which stays where it was."""
    seekable = hasattr(file, "seekable") and file.seekable()
    position = file.tell() if seekable else 0
    if seekable:
        file.seek(0)
    most, content = cap("MAX_FILE_BYTES") + 1, b""
    while (
        len(content) < most and (piece := file.read(most - len(content))) != b""
    ):  # raw files give what is there already
        if not isinstance(piece, bytes):
            raise TypeError(f"the file gives {type(piece).__name__} and no bytes: open it in the mode 'rb'")
        content += piece
    if seekable:
        file.seek(position)
    return content


def decoded(decode: Callable[[Any], Any], item: Any, where: str, kind: str) -> Any:
    """What a decoder makes of an item; ValueError with its cause if it cannot, TimeoutError if an address takes too long."""
    try:
        return decode(item)
    except (ImportError, MemoryError):  # a package is missing
        raise
    except TimeoutError as error:
        raise TimeoutError(f"{where}: the {kind} at {_without_secrets(str(item))!r:.200}: {error}") from error
    except Image.DecompressionBombError as error:
        limit = f"cornstarch_hf.limits.MAX_IMAGE_PIXELS is {cap('MAX_IMAGE_PIXELS'):,}: send a smaller one."
        raise ValueError(f"{where}: the image has more pixels than Pillow decodes ({error}); {limit}") from error
    except Exception as error:  # of many sorts: OSError, SyntaxError, RuntimeError, ...
        if "cornstarch_hf.limits." in str(error):  # a cap of this package: its message says what to do
            raise
        what = f"{len(item)} bytes" if isinstance(item, (bytes, bytearray)) else f"{_without_secrets(str(item))!r:.200}"
        cause = f"{type(error).__name__}: {error}"
        raise ValueError(f"{where}: the {kind} cannot be decoded from {what}: {cause}") from error


def _without_secrets(source: str) -> str:
    """An address without user, password and query, which may hold a token; anything else as it is."""
    if not source.lower().startswith(("http:", "https:")):
        return source
    try:
        parts = urllib.parse.urlsplit(source)
    except ValueError:  # it is none, and may hold one all the same
        return "an address"
    return f"{parts.scheme}://{parts.hostname}{parts.path}"
