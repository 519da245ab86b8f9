"""Images of requests: data URIs and URLs, read within limits and never from the server's own network."""

import asyncio
import base64
import binascii
import io
import ipaddress
import socket
from dataclasses import dataclass
from functools import cache
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

import httpx
from PIL import Image, UnidentifiedImageError

from vlv.processing_vlv import add_formats, to_rgb

from .protocol import RequestError

MAX_REDIRECTS = 5
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "HEIF", "JXL")
NOT_PUBLIC = [ipaddress.ip_network(own) for own in ("::/96", "64:ff9b:1::/48")]  # RFC 4291, 8215: IPv4 within IPv6


@dataclass(frozen=True)
class ImageLimits:
    """What images of requests may be.

    Attributes:
        max_bytes: Largest file, in bytes.
        max_pixels: Largest number of pixels, width times height.
        timeout: Longest download, in seconds.
        allow_urls: Whether http and https URLs are fetched at all.
        allow_private: Whether they may lead to addresses that are not public, such as this machine's.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 50_000_000
    timeout: float = 20.0
    allow_urls: bool = True
    allow_private: bool = False


async def read_image(source: str, limits: ImageLimits, param: str) -> Image.Image:
    """The image of a data URI or URL, upright and RGB.

    Args:
        source: `data:image/...;base64,...`, `http://...` or `https://...`.
        param: Where it stands in the request, for the message.

    Raises:
        RequestError: 400 if it is none of these, cannot be fetched, is beyond a limit, or is not an image.
    """
    scheme = source[:8].partition(":")[0].lower()
    if scheme == "data":
        data = await asyncio.to_thread(_decode, source, limits, param)
    elif scheme in ("http", "https"):
        data = await _fetch(source, limits, param)
    else:
        raise RequestError(
            f"{_short(source)} is not an image that this server reads; give a data URI (data:image/png;base64,...) or "
            "an http(s) URL",
            param,
        )
    return await asyncio.to_thread(decode_image, data, limits, param)


def decode_image(data: bytes, limits: ImageLimits, param: str) -> Image.Image:
    """The image in the bytes of a file, upright and RGB.

    Raises:
        RequestError: 400 if it is beyond a limit, or not an image.
    """
    if len(data) > limits.max_bytes:
        raise _too_large(param, limits)
    width = height = 0
    if data:
        try:
            with Image.open(io.BytesIO(data), formats=readable_formats()) as image:
                width, height = image.size
        except UnidentifiedImageError as error:
            raise RequestError(
                f"this is not an image in a format that this server reads ({', '.join(readable_formats())})", param
            ) from error
        except Exception:  # to_rgb below has the reason
            width = height = 0
    if width * height > limits.max_pixels:
        raise RequestError(
            f"the image has {width} x {height} pixels, and this server reads at most {limits.max_pixels:,}; make it "
            "smaller",
            param,
        )
    try:
        return to_rgb(data)
    except ValueError as error:
        raise RequestError(f"the image cannot be read: {error}", param) from error


@cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats of `FORMATS` that are read here.

    Others are left out: Pillow runs another program for some (EPS), and decodes some before their size is known (ICO).
    """
    add_formats()
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _decode(uri: str, limits: ImageLimits, param: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise RequestError("a data URI has the form data:image/png;base64,...; this one has no comma", param)
    if len(payload) > 3 * limits.max_bytes:  # percent escapes take three characters a byte
        raise _too_large(param, limits)
    if not header.lower().endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode("".join(payload.split()) + "=" * (-len(payload) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"the base64 of the data URI is damaged: {error}", param) from error


async def _fetch(url: str, limits: ImageLimits, param: str) -> bytes:
    """The bytes at a URL.

    The name is resolved once, each address is checked, and the connection goes to a checked address, also after
    redirects, so that no name can lead elsewhere between check and connection.
    """
    if not limits.allow_urls:
        raise RequestError("this server fetches no URLs; give the image as a data URI", param)
    try:
        async with asyncio.timeout(limits.timeout), httpx.AsyncClient(trust_env=False, timeout=None) as client:
            for _ in range(MAX_REDIRECTS + 1):
                url, data = await _fetch_once(client, url, limits, param)
                if data is not None:
                    return data
    except TimeoutError as error:
        raise RequestError(f"{_short(url)} did not answer within {limits.timeout:g} s", param) from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
        reason = str(error) or type(error).__name__
        raise RequestError(f"{_short(url)} could not be fetched: {reason}", param) from error
    raise RequestError(f"{_short(url)} redirects more than {MAX_REDIRECTS} times", param)


async def _fetch_once(
    client: httpx.AsyncClient, url: str, limits: ImageLimits, param: str
) -> tuple[str, bytes | None]:
    """The URL and its bytes, or the URL that it redirects to and None."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError as error:
        raise RequestError(f"{_short(url)} is not a URL: {error}", param) from error
    if not host or port is None:
        raise RequestError(f"{_short(url)} is not an http(s) URL with a host", param)
    address = await _resolve(host, port, limits, param)
    pinned = httpx.URL(url).copy_with(host=address, port=port, username=None, password=None, fragment=None)
    headers = {
        "Host": parts.netloc.rpartition("@")[2],
        "User-Agent": "vlv",
        "Accept": "image/*",
        "Accept-Encoding": "identity",
    }
    # The certificate is checked against the name, not the address (httpx's extension for requests to an address).
    request = client.build_request("GET", pinned, headers=headers, extensions={"sni_hostname": host})
    response = await client.send(request, stream=True)
    try:
        if response.has_redirect_location:
            return urljoin(url, response.headers["location"]), None
        if response.status_code != 200:
            raise RequestError(f"{_short(url)} answers with status {response.status_code}", param)
        chunks, size = [], 0
        async for chunk in response.aiter_raw():
            size += len(chunk)
            if size > limits.max_bytes:
                raise _too_large(param, limits)
            chunks.append(chunk)
        return url, b"".join(chunks)
    finally:
        await response.aclose()


async def _resolve(host: str, port: int, limits: ImageLimits, param: str) -> str:
    """An address of a host.

    Raises:
        RequestError: 400 if it has none, or one of them is not public and only public ones are allowed.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise RequestError(f"the host {host} is not known", param) from error
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    if not limits.allow_private and (wrong := [own for own in addresses if not is_public(own)]):
        raise RequestError(
            f"{host} leads to {wrong[0]}, which is not a public address; this server fetches from public ones alone "
            "(its option --allow-private-urls changes that)",
            param,
        )
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address is a host's on the public Internet, also one of IPv4 within IPv6."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64 (RFC 6052)
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local or any(ip in network for network in NOT_PUBLIC):
            return False
    return ip.is_global and not ip.is_multicast


def _too_large(param: str, limits: ImageLimits) -> RequestError:
    return RequestError(
        f"the image has more than {limits.max_bytes / 2**20:g} MiB, the most that this server reads", param
    )


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
