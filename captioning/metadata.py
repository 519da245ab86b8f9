"""Captions in the metadata of image files: `dc:description` of XMP, spliced in without touching the pixels."""

import re
import zlib
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from vlv.errors import UserError
from vlv.files import write_atomically

from .inputs import Input
from .sidecars import CaptionFiles, ExistingCaption, advice

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DC = "http://purl.org/dc/elements/1.1/"
LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
EMPTY = (
    f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{RDF}"><rdf:Description rdf:about="" xmlns:dc="{DC}"/>'
    "</rdf:RDF></x:xmpmeta>"
)
PACKET = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n{}\n<?xpacket end="w"?>'
NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
JPEG_XMP, JPEG_SEGMENT = b"http://ns.adobe.com/xap/1.0/\0", 65533
PNG_XMP = b"XML:com.adobe.xmp\0\0\0\0\0"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
WEBP_HAS_XMP, WEBP_HAS_ALPHA = 0x04, 0x10
Parts = list[tuple[bytes, bytes]]
"""Segments or chunks of a file, each with its kind and its bytes."""


class XmpCaptions(CaptionFiles):
    """Writes captions into the XMP of JPEG, PNG and WebP files. Other metadata and the pixels stay byte for byte."""

    def place(self, item: Input) -> str:
        if not item.is_file:
            raise UserError(f"{item.name} is not a file that metadata can be written into")
        return f"dc:description of {item.path}"

    def wants(self, item: Input) -> bool:
        self.place(item)
        if self.on_existing in ("overwrite", "append", "prepend"):
            return True
        try:
            existing = read_description(item.path.read_bytes())
        except (OSError, ValueError):  # reading the image, or writing, gives the reason
            return True
        if existing and self.on_existing == "error":
            raise ExistingCaption(f"{item.path} has a description; {advice()}")
        return not existing

    def write(self, item: Input, entry: Any) -> Input:
        data = item.path.read_bytes()
        caption = entry["caption"] if isinstance(entry, dict) else entry
        changed = write_description(data, self.merged(read_description(data), caption))
        write_atomically(item.path, lambda temporary: temporary.write_bytes(changed))
        return item if item.identity is None else replace(item, identity=item.identify())


def read_description(data: bytes) -> str:
    """The description in the XMP of an image file; "" if there is none.

    Raises:
        ValueError: If the file is not JPEG, PNG or WebP, or its XMP is damaged.
    """
    packet = _split(data)[1]
    texts = _description_texts(_parse(packet)) if packet is not None else []
    return texts[0].text or "" if texts else ""


def write_description(data: bytes, text: str) -> bytes:
    """An image file with a description in its XMP. Its pixels and other metadata are those of `data`.

    Raises:
        ValueError: If the file is not JPEG, PNG or WebP, or its XMP is damaged or gets too large.
    """
    kind, packet = _split(data)
    root = _parse(packet if packet is not None else EMPTY.encode())
    text = NOT_XML.sub("", text)
    texts = _description_texts(root)
    if texts:
        texts[0].text = text
    else:
        _add_description(root, text)
    new = PACKET.format(ElementTree.tostring(root, encoding="unicode")).encode("utf-8")
    return {"JPEG": _jpeg_with, "PNG": _png_with, "WebP": _webp_with}[kind](data, new)


def _split(data: bytes) -> tuple[str, bytes | None]:
    """The format of a file, and its XMP. Raises `ValueError` for other formats."""
    if data.startswith(b"\xff\xd8\xff"):
        found = [body[4 + len(JPEG_XMP) :] for kind, body in _jpeg_parts(data) if kind == JPEG_XMP]
        return "JPEG", found[0] if found else None
    if data.startswith(PNG_SIGNATURE):
        found = [body[8:-4] for kind, body in _png_parts(data) if kind == PNG_XMP]
        return "PNG", _png_text(found[0]) if found else None
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        found = [body[8 : 8 + int.from_bytes(body[4:8], "little")] for k, body in _webp_parts(data) if k == b"XMP "]
        return "WebP", found[0] if found else None
    raise ValueError("metadata can be written into JPEG, PNG and WebP files; pass --sidecar for others")


def _parse(packet: bytes) -> ElementTree.Element:
    if b"<!DOCTYPE" in packet:
        raise ValueError("its XMP has a document type, which is not read")
    try:
        for _, (prefix, uri) in ElementTree.iterparse(BytesIO(packet.strip(b"\0 \n")), ["start-ns"]):
            with suppress(ValueError):  # a reserved prefix
                if prefix:
                    ElementTree.register_namespace(prefix, uri)
        return ElementTree.fromstring(packet.strip(b"\0 \n"))
    except ElementTree.ParseError as error:
        raise ValueError(f"its XMP is damaged: {error}") from error


def _description_texts(root: ElementTree.Element) -> list[ElementTree.Element]:
    """The texts of the description, that of the default language first."""
    texts = list(root.iterfind(f".//{{{DC}}}description/{{{RDF}}}Alt/{{{RDF}}}li"))
    return sorted(texts, key=lambda text: text.get(LANGUAGE) != "x-default")


def _add_description(root: ElementTree.Element, text: str) -> None:
    owner = root.find(f".//{{{RDF}}}Description")
    if owner is None:
        raise ValueError("its XMP has no rdf:Description")
    owner.attrib.pop(f"{{{DC}}}description", None)
    for old in owner.findall(f"{{{DC}}}description"):
        owner.remove(old)
    alternatives = ElementTree.SubElement(ElementTree.SubElement(owner, f"{{{DC}}}description"), f"{{{RDF}}}Alt")
    ElementTree.SubElement(alternatives, f"{{{RDF}}}li", {LANGUAGE: "x-default"}).text = text


def _jpeg_parts(data: bytes) -> Parts:
    """The segments before the pixels, and the rest. The kind of the segment of XMP is `JPEG_XMP`, else its marker."""
    parts, position = [(b"\xff\xd8", data[:2])], 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] not in (0xDA, 0xFF):
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        body = data[position:end]
        is_xmp = body[1] == 0xE1 and body[4:].startswith(JPEG_XMP)
        parts.append((JPEG_XMP if is_xmp else body[:2], body))
        position = end
    return [*parts, (b"", data[position:])]


def _jpeg_with(data: bytes, packet: bytes) -> bytes:
    length = 2 + len(JPEG_XMP) + len(packet)
    if length > JPEG_SEGMENT:
        raise ValueError(f"its XMP would have {len(packet):,} bytes; a JPEG file holds about {JPEG_SEGMENT:,}")
    segment = b"\xff\xe1" + length.to_bytes(2, "big") + JPEG_XMP + packet
    parts = [part for part in _jpeg_parts(data) if part[0] != JPEG_XMP]
    place = 1
    while parts[place][0] in (b"\xff\xe0", b"\xff\xe1"):  # JFIF and EXIF stay in front
        place += 1
    return b"".join(body for _, body in (*parts[:place], (JPEG_XMP, segment), *parts[place:]))


def _png_parts(data: bytes) -> Parts:
    """The chunks, and what follows them. The kind of the chunk of XMP is `PNG_XMP`."""
    parts, position = [(b"", PNG_SIGNATURE)], len(PNG_SIGNATURE)
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        is_xmp = kind == b"iTXt" and data[position + 8 :].startswith(PNG_XMP[:18])
        parts.append((PNG_XMP if is_xmp else kind, data[position:end]))
        position = end
    return [*parts, (b"", data[position:])]


def _png_text(body: bytes) -> bytes:
    """The text of an iTXt chunk: keyword, compressed or not, method, language, keyword in the language, text."""
    _, _, rest = body.partition(b"\0")
    text = rest[2:].split(b"\0", 2)[2]
    if not rest[0]:
        return text
    try:
        return zlib.decompress(text)
    except zlib.error as error:
        raise ValueError(f"its XMP is damaged: {error}") from error


def _png_with(data: bytes, packet: bytes) -> bytes:
    body = b"iTXt" + PNG_XMP + packet
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    parts = [part for part in _png_parts(data) if part[0] != PNG_XMP]
    return b"".join(content for _, content in (*parts[:2], (PNG_XMP, chunk), *parts[2:]))  # behind IHDR


def _webp_parts(data: bytes) -> Parts:
    """The chunks of a WebP file, each with its padding."""
    parts, position = [], 12
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        end = position + 8 + size + size % 2
        parts.append((data[position : position + 4], data[position:end]))
        position = end
    return parts


def _webp_with(data: bytes, packet: bytes) -> bytes:
    parts = [part for part in _webp_parts(data) if part[0] != b"XMP "]
    if not parts or parts[0][0] != b"VP8X":
        try:
            with Image.open(BytesIO(data)) as image:
                (width, height), has_alpha = image.size, image.mode == "RGBA"
        except OSError as error:
            raise ValueError(f"it is damaged: {error}") from error
        flags = (WEBP_HAS_ALPHA if has_alpha else 0).to_bytes(4, "little")
        size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        parts.insert(0, (b"VP8X", b"VP8X" + (10).to_bytes(4, "little") + flags + size))
    head = bytearray(parts[0][1])
    head[8] |= WEBP_HAS_XMP
    chunk = b"XMP " + len(packet).to_bytes(4, "little") + packet + b"\0" * (len(packet) % 2)
    body = b"WEBP" + bytes(head) + b"".join(content for _, content in parts[1:]) + chunk
    return b"RIFF" + len(body).to_bytes(4, "little") + body
