"""Images of requests: what is fetched and read, and what is refused."""

import asyncio
import base64
import io
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from vlv.serving.images import ImageLimits, is_public, read_image
from vlv.serving.protocol import RequestError

LIMITS = ImageLimits(max_bytes=20_000, max_pixels=10_000, timeout=0.5, allow_private=True)


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, format="PNG")
    return file.getvalue()


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        port = self.server.server_address[1]
        if self.path == "/slow.png":
            time.sleep(1)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/").replace("PORT", str(port)))
            self.end_headers()
            return
        self.send_response({"/none.png": 404, "/unchanged.png": 304}.get(self.path, 200))
        self.end_headers()
        self.wfile.write(bytes(30_000) if self.path == "/large.png" else png(20, 10))

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="module")
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def read(source: str, limits: ImageLimits = LIMITS) -> Image.Image:
    return asyncio.run(read_image(source, limits, "messages[0]"))


@pytest.mark.parametrize("path", ["/image.png", "/to//image.png", "/to/http://localhost:PORT/image.png"])
def test_a_url_is_fetched_also_after_redirects(site, path):
    assert read(site + path).size == (20, 10)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/none.png", "status 404"),
        ("/large.png", "more than 0.0190735 MiB"),
        ("/slow.png", "did not answer within 0.5 s"),
        ("/to//to//to//to//to//to//to/image.png", "redirects more than 5 times"),
        ("/unchanged.png", "status 304"),
        ("/to/file:///etc/passwd", "not an http"),
    ],
)
def test_a_url_that_gives_no_image_is_an_error_that_says_why(site, path, reason):
    with pytest.raises(RequestError, match=reason):
        read(site + path)


def test_a_private_address_is_refused_also_behind_a_name_or_a_redirect(site, monkeypatch):
    public = ImageLimits(allow_private=False)
    for url in (site, site.replace("127.0.0.1", "localhost"), site.replace("127.0.0.1", "0x7f.1")):
        with pytest.raises(RequestError, match=r"127.0.0.1, which is not a public address|not known"):
            read(f"{url}/image.png", public)
    # The first address counts as public, and redirects to one that does not.
    monkeypatch.setattr("vlv.serving.images.is_public", lambda address: address == "127.0.0.1")
    with pytest.raises(RequestError, match=r"127.0.0.2, which is not a public address"):
        read(f"{site}/to/http://127.0.0.2:1/image.png", public)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False),
        ("fec0::1", False),
        ("::7f00:1", False),
        ("64:ff9b:1::7f00:1", False),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize("kind", ["ICO", "EPS", "PPM"])
def test_a_format_of_which_decoding_is_not_safe_or_not_usual_is_refused(kind):
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, format=kind)
    with pytest.raises(RequestError, match="not an image in a format that this server reads"):
        read(data_uri(file.getvalue()))


def test_urls_can_be_turned_off(site):
    with pytest.raises(RequestError, match="fetches no URLs; give the image as a data URI"):
        read(site, ImageLimits(allow_urls=False))


def test_a_data_uri_is_read_with_line_breaks_and_without_padding():
    uri = data_uri(png(20, 10))
    assert read(uri).size == (20, 10)
    assert read(uri[:60] + "\n" + uri[60:].rstrip("=")).size == (20, 10)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("data:image/png;base64", "has no comma"),
        ("data:image/png;base64,%%%", "base64 of the data URI is damaged"),
        ("data:image/png;base64,aGVsbG8=", "not an image in a format that this server reads \\(PNG, JPEG"),
        ("data:image/png;base64,", "is empty"),
        (data_uri(png(200, 100)), r"200 x 100 pixels, and this server reads at most 10,000"),
        (data_uri(png(20, 10)[:45]), "cannot be read"),
        ("data:image/png;base64," + "A" * 90_000, "the most that this server reads"),
        ("/etc/passwd", "give a data URI"),
        ("file:///etc/passwd", "give a data URI"),
        ("http://", "http\\(s\\) URL with a host"),
        ("http://[::1", "not a URL"),
    ],
)
def test_other_sources_are_errors_that_say_why(source, reason):
    with pytest.raises(RequestError, match=reason) as caught:
        read(source)
    assert caught.value.status == 400 and caught.value.param == "messages[0]"
