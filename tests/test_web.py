"""A picture may be named by an address: it is fetched within limits, or one line says what is wrong."""

import io
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from pgfunc import image
from pgfunc.cli import inputs
from pgfunc.cli.drawings import drawing_name
from pgfunc.errors import DataError, ImageError
from pgfunc.files import web
from pgfunc.names import is_url
from pgfunc.train import data


def red() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 6), "red").save(file, "PNG")
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers by the path: a picture, an error, a redirect, too many bytes, or bytes that never end."""

    def do_GET(self) -> None:
        with suppress(OSError):  # the client has left
            name = self.path.partition("?")[0].strip("/")
            if name in MOVED:
                self.head(302, Location=MOVED[name])
            elif name in CONTENT:
                status, content, announced = CONTENT[name]
                self.head(status, **({"Content-Length": announced} if announced else {}))
                self.wfile.write(content)
            elif name == "drip":
                self.head(200)
                self.drip(b"x")
            elif name == "slow-header":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                self.drip(b"a: b\r\n")
            else:
                self.wfile.write(b"\0 nothing that a browser understands\r\n\r\n")

    def head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def drip(self, part: bytes) -> None:
        while not self.server.stopped.wait(0.02):  # pyright: ignore[reportAttributeAccessIssue]
            self.wfile.write(part)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


MOVED = {"moved": "/red.png", "to-file": "file:///etc/hostname", "to-ftp": "ftp://127.0.0.1/a.png", "circle": "/circle"}
CONTENT = {
    "red.png": (200, red(), ""),
    "gone": (404, b"", ""),
    "text": (200, b"<html>not a picture</html>", ""),
    "announced": (200, b"x", str(2**31)),
    "large": (200, bytes(2**20 + 1), ""),
    "cut": (200, red()[:-30], str(len(red()))),
}
REASONS = {
    "gone": "cannot be fetched (404 Not Found)",
    "text": "not a picture",
    "announced": "more than 1 MiB; download it and make it smaller",
    "large": "more than 1 MiB; download it and make it smaller",
    "cut": "cannot be read as a picture",
    "drip": "did not arrive within 0.5 seconds; download it first",
    "slow-header": "did not arrive within 0.5 seconds; download it first",
    "to-file": "cannot be fetched (302 Found - Redirection to url 'file:///etc/hostname' is not allowed)",
    "to-ftp": "cannot be fetched (unknown url type: ftp)",
    "circle": "cannot be fetched (302 The HTTP server returned a redirect error",
    "nonsense": "cannot be fetched (not an answer in HTTP",
}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a server on this machine."""
    with pytest.MonkeyPatch.context() as patch, ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        patch.setenv("no_proxy", "127.0.0.1")
        server.stopped = threading.Event()  # pyright: ignore[reportAttributeAccessIssue]
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.stopped.set()  # pyright: ignore[reportAttributeAccessIssue]
        server.shutdown()


@pytest.mark.parametrize("path", ["red.png", "red.png?size=large", "moved"])
def test_an_address_gives_the_picture_behind_it(address, path):
    assert np.array_equal(np.asarray(image.open_image(f"{address}/{path}")), np.full((6, 9, 3), [255, 0, 0]))


@pytest.mark.parametrize("name", REASONS)
def test_what_cannot_be_fetched_is_named_in_one_line(address, name, monkeypatch):
    monkeypatch.setattr(web, "LARGEST", 2**20)
    monkeypatch.setattr(web, "SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(ImageError) as error:
        image.open_image(f"{address}/{name}")
    assert str(error.value).startswith(f"{address}/{name}: {REASONS[name]}")
    assert str(error.value).isprintable()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.png", "http://[/a.png", "https://127.0.0.1:x/", "http://a b/c"])
def test_an_address_without_a_server_is_named(url):
    with pytest.raises(ImageError, match="cannot be fetched"):
        image.open_image(url)


def test_only_texts_that_begin_with_http_are_addresses(tmp_path):
    names = "http://a/b.png", "HTTPS://a", "http:/a", "ftp://a", "httpx://a", "a http://b", b"http://a", tmp_path
    assert [is_url(name) for name in names] == [True, True, *[False] * 6]


def test_commands_take_addresses_where_files_must_exist():
    names = {"https://a/b.png": "b.png", "https://a/b.jpg?w=9": "b.jpg", "https://a/": "picture.png"}
    (*items,) = inputs.expand([*names]).items
    assert {item.image: drawing_name(item.drawing) for item in items} == names


def test_training_data_are_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image": "http://a/b.png", "prefix": "", "suffix": ""}')
    with pytest.raises(DataError, match=r'a.jsonl:1: image is "http://a/b.png"; download it'):
        data.read(tmp_path / "a.jsonl")
