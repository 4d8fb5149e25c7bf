"""A file on the web: its bytes, within limits of size and time. Only http and https are read, also after redirects."""

from http.client import HTTPException
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic
from urllib.error import HTTPError, URLError
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from pgfunc.errors import ImageError, first_line

LARGEST = 64 * 2**20  # bytes
SECONDS = 20.0  # in total
PART = 2**16  # bytes read at a time
HANDLERS = (
    ProxyHandler,
    HTTPHandler,
    HTTPSHandler,
    HTTPDefaultErrorHandler,
    HTTPRedirectHandler,
    HTTPErrorProcessor,
    UnknownHandler,
)  # fmt: skip  without those of ftp, file and data


def fetch(url: str) -> bytes:
    """The bytes behind an http or https address.

    Raises ImageError, which names the address, if it cannot be reached, answers with an error, sends more than
    `LARGEST` bytes, or takes more than `SECONDS`, however it spends them.
    """
    result: SimpleQueue[bytes | Exception] = SimpleQueue()
    # in a thread: looking up a name has no time limit, and a server may send a header one byte at a time
    Thread(target=_fetch_into, args=(result, url, monotonic() + SECONDS), daemon=True).start()
    try:
        answer = result.get(timeout=SECONDS)
    except Empty:
        raise ImageError(f"{url}: did not arrive within {SECONDS:g} seconds; download it first") from None
    if isinstance(answer, ImageError):
        raise answer
    if isinstance(answer, Exception):
        raise ImageError(f"{url}: cannot be fetched ({_reason(answer)})") from answer
    return answer


def _fetch_into(result: "SimpleQueue[bytes | Exception]", url: str, deadline: float) -> None:
    try:
        result.put(_read(url, deadline))
    except Exception as error:  # the network raises many types of error
        if isinstance(error, HTTPError):
            error.close()
        result.put(error)


def _read(url: str, deadline: float) -> bytes:
    """The bytes behind an address. Stops reading after the deadline, when nobody waits for them any more."""
    opener, content = OpenerDirector(), bytearray()
    for handler in HANDLERS:
        opener.add_handler(handler())
    # some servers refuse Python's own name
    with opener.open(Request(url, headers={"User-Agent": "pgfunc"}), timeout=SECONDS) as response:
        announced = int(response.headers.get("Content-Length") or 0)
        while monotonic() < deadline and max(announced, len(content)) <= LARGEST and (part := response.read1(PART)):
            content += part
    if max(announced, len(content)) > LARGEST:
        raise ImageError(f"{url}: more than {LARGEST // 2**20} MiB; download it and make it smaller")
    return bytes(content)


def _reason(error: Exception) -> str:
    """What went wrong, in a few words."""
    if isinstance(error, HTTPError):
        return f"{error.code} {error.reason}".partition("\n")[0]
    if isinstance(error, URLError):
        return str(getattr(error.reason, "strerror", None) or error.reason)
    if isinstance(error, HTTPException):
        return f"not an answer in HTTP: {first_line(error)}"
    return first_line(error)
