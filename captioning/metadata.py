"""Captions in the metadata of image files: `dc:description` of XMP, spliced in without touching the pixels."""

import mmap
import re
import zlib
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image

from vlv.errors import UserError
from vlv.files import write_atomically

from .inputs import Input
from .output import require_writable
from .sidecars import CaptionFiles, ExistingCaption, UnsupportedFile, advice

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DC = "http://purl.org/dc/elements/1.1/"
DESCRIPTION = f"{{{DC}}}description"
LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
EMPTY = (
    f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{RDF}"><rdf:Description rdf:about="" xmlns:dc="{DC}"/>'
    "</rdf:RDF></x:xmpmeta>"
)
PACKET = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n{}\n<?xpacket end="w"?>'
NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
JPEG_XMP, JPEG_SEGMENT = b"http://ns.adobe.com/xap/1.0/\0", 65533
PNG_KEYWORD = b"XML:com.adobe.xmp\0"
PNG_XMP = PNG_KEYWORD + b"\0\0\0\0"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
XMP_KINDS = {"JPEG": JPEG_XMP, "PNG": PNG_XMP, "WebP": b"XMP "}
WEBP_HAS_XMP, WEBP_HAS_ALPHA = 0x04, 0x10
Data = bytes | mmap.mmap
Spans = list[tuple[bytes, int, int]]
"""Segments or chunks of a file, each with its kind, and where it begins and ends."""


class XmpCaptions(CaptionFiles):
    """Writes captions into the XMP of JPEG, PNG and WebP files. Other metadata and the pixels stay byte for byte."""

    _writable: Path | None = None
    """The folder that was found writable last."""

    def place(self, item: Input) -> str:
        if not item.is_file:
            raise UserError(f"{item.name} is not a file that metadata can be written into")
        return f"dc:description of {item.path}"

    def wants(self, item: Input) -> bool:
        place = self.place(item)
        try:
            with item.path.open("rb") as file:
                _format(file.read(12))
        except OSError:  # reading the image gives the reason
            return True
        except ValueError as error:
            raise UnsupportedFile(f"{place}: {error}") from error
        if item.path.parent != self._writable:
            require_writable(item.path.parent, "--metadata", "xmp")
            self._writable = item.path.parent
        if self.on_existing in ("overwrite", "append", "prepend"):
            return True
        try:
            with item.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                existing = read_description(data)
        except (OSError, ValueError):  # reading the image, or writing, gives the reason
            return True
        if existing and self.on_existing == "error":
            raise ExistingCaption(f"{item.path} has a description; {advice()}")
        return not existing

    def holds(self, item: Input, entry: Any) -> bool:
        existing = read_description(item.path.read_bytes())
        caption = entry["caption"] if isinstance(entry, dict) else entry
        return bool(existing) and self.merged(existing, NOT_XML.sub("", caption)) == existing

    def write(self, item: Input, entry: Any) -> Input:
        item.require_unchanged()
        data = item.path.read_bytes()
        caption = entry["caption"] if isinstance(entry, dict) else entry
        changed = write_description(data, self.merged(read_description(data), caption))
        write_atomically(item.path, lambda temporary: temporary.write_bytes(changed))
        return item if item.identity is None else replace(item, identity=item.identify())


def read_description(data: Data) -> str:
    """The description in the XMP of an image file; "" if there is none.

    Raises:
        ValueError: If the file is not JPEG, PNG or WebP, or its XMP is damaged.
    """
    packet = _split(data)[1]
    if packet is None:
        return ""
    root = _parse(packet)
    texts = _description_texts(root)
    return (texts[0].text or "") if texts else " ".join(_plain_descriptions(root))


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


def _format(head: bytes) -> str:
    """The format of a file by its first 12 bytes. Raises `ValueError` for those without XMP."""
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(PNG_SIGNATURE):
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    raise ValueError("metadata can be written into JPEG, PNG and WebP files; pass --sidecar for others")


def _split(data: Data) -> tuple[str, bytes | None]:
    """The format of a file, and its XMP. Raises `ValueError` for other formats."""
    kind = _format(data[:12])
    spans = {"JPEG": _jpeg_spans, "PNG": _png_spans, "WebP": _webp_spans}[kind](data)
    found = next((data[start:end] for part, start, end in spans if part == XMP_KINDS[kind]), None)
    if found is None:
        return kind, None
    if kind == "JPEG":
        return kind, found[4 + len(JPEG_XMP) :]
    return kind, _png_text(found[8:-4]) if kind == "PNG" else found[8 : 8 + int.from_bytes(found[4:8], "little")]


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


def _plain_descriptions(root: ElementTree.Element) -> list[str]:
    """The texts of descriptions that are not alternatives of languages: attributes, plain texts, lists."""
    texts = []
    for owner in root.iterfind(f".//{{{RDF}}}Description"):
        texts.append(owner.get(DESCRIPTION, ""))
        texts += [text for element in owner.findall(DESCRIPTION) for text in element.itertext()]
    return [text.strip() for text in texts if text.strip()]


def _add_description(root: ElementTree.Element, text: str) -> None:
    """Gives the first `rdf:Description` a description, in place of those of other forms."""
    owners = root.findall(f".//{{{RDF}}}Description")
    if not owners:
        raise ValueError("its XMP has no rdf:Description")
    for owner in owners:
        owner.attrib.pop(DESCRIPTION, None)
        for old in owner.findall(DESCRIPTION):
            owner.remove(old)
    owner = owners[0]
    alternatives = ElementTree.SubElement(ElementTree.SubElement(owner, DESCRIPTION), f"{{{RDF}}}Alt")
    ElementTree.SubElement(alternatives, f"{{{RDF}}}li", {LANGUAGE: "x-default"}).text = text


def _bodies(data: bytes, spans: Spans) -> list[tuple[bytes, bytes]]:
    """The segments or chunks with their bytes."""
    return [(kind, data[start:end]) for kind, start, end in spans]


def _jpeg_spans(data: Data) -> Spans:
    """The segments before the pixels, and the rest. The kind of the segment of XMP is `JPEG_XMP`, else its marker."""
    spans, position = [(b"\xff\xd8", 0, 2)], 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] not in (0xDA, 0xFF):
        head = data[position : position + 4 + len(JPEG_XMP)]
        end = position + 2 + int.from_bytes(head[2:4], "big")
        is_xmp = head[1] == 0xE1 and head[4:] == JPEG_XMP
        spans.append((JPEG_XMP if is_xmp else head[:2], position, end))
        position = end
    return [*spans, (b"", position, len(data))]


def _jpeg_with(data: bytes, packet: bytes) -> bytes:
    length = 2 + len(JPEG_XMP) + len(packet)
    if length > JPEG_SEGMENT:
        raise ValueError(f"its XMP would have {len(packet):,} bytes; a JPEG file holds about {JPEG_SEGMENT:,}")
    segment = b"\xff\xe1" + length.to_bytes(2, "big") + JPEG_XMP + packet
    parts = [part for part in _bodies(data, _jpeg_spans(data)) if part[0] != JPEG_XMP]
    place = 1
    while parts[place][0] in (b"\xff\xe0", b"\xff\xe1"):  # JFIF and EXIF stay in front
        place += 1
    return b"".join(body for _, body in (*parts[:place], (JPEG_XMP, segment), *parts[place:]))


def _png_spans(data: Data) -> Spans:
    """The chunks, and what follows them. The kind of the chunk of XMP is `PNG_XMP`."""
    spans, position = [(b"", 0, len(PNG_SIGNATURE))], len(PNG_SIGNATURE)
    while position + 12 <= len(data):
        head = data[position : position + 8 + len(PNG_KEYWORD)]
        end = position + 12 + int.from_bytes(head[:4], "big")
        is_xmp = head[4:8] == b"iTXt" and head[8:] == PNG_KEYWORD
        spans.append((PNG_XMP if is_xmp else head[4:8], position, end))
        position = end
    return [*spans, (b"", position, len(data))]


def _png_text(body: bytes) -> bytes:
    """The text of an iTXt chunk: keyword, compressed or not, method, language, keyword in the language, text."""
    _, _, rest = body.partition(b"\0")
    fields = rest[2:].split(b"\0", 2)
    if len(fields) < 3:
        raise ValueError("its XMP is damaged: the chunk has too few fields")
    text = fields[2]
    if not rest[0]:
        return text
    try:
        return zlib.decompress(text)
    except zlib.error as error:
        raise ValueError(f"its XMP is damaged: {error}") from error


def _png_with(data: bytes, packet: bytes) -> bytes:
    body = b"iTXt" + PNG_XMP + packet
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    parts = [part for part in _bodies(data, _png_spans(data)) if part[0] != PNG_XMP]
    return b"".join(content for _, content in (*parts[:2], (PNG_XMP, chunk), *parts[2:]))  # behind IHDR


def _webp_spans(data: Data) -> Spans:
    """The chunks of a WebP file, each with its padding."""
    spans, position = [], 12
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        end = position + 8 + size + size % 2
        spans.append((data[position : position + 4], position, end))
        position = end
    return spans


def _webp_with(data: bytes, packet: bytes) -> bytes:
    parts = [part for part in _bodies(data, _webp_spans(data)) if part[0] != b"XMP "]
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
