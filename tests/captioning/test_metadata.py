"""Captions in XMP: pixels and other metadata stay, and Pillow finds the description."""

import io
import zlib
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vlv.captioning.inputs import Input
from vlv.captioning.metadata import XmpCaptions, read_description, write_description
from vlv.captioning.sidecars import ExistingCaption

TEXT = "a dog & a <cat> \U0001f600"
FORMATS = {
    "jpeg": {"format": "JPEG", "quality": 90, "comment": b"made by hand"},
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True},
    "lossy webp": {"format": "WEBP", "quality": 80},
}
FOREIGN = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="5"/></rdf:RDF></x:xmpmeta>'
)


def encoded(image, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **settings)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def xmp_text(data: bytes) -> str:
    packet = opened(data).info["xmp"]
    root = ElementTree.fromstring(packet if isinstance(packet, str) else packet.decode())
    return "".join(root.itertext()).strip()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_pillow_finds_the_description_and_the_pixels_are_the_same(kind, mode, images):
    if kind == "jpeg" and mode == "RGBA":
        mode = "CMYK"
    exif = Image.Exif()
    exif[0x0110] = "camera"
    data = encoded(images[1].convert(mode), exif=exif, **FORMATS[kind])
    assert read_description(data) == ""
    changed = write_description(data, TEXT)
    assert read_description(changed) == TEXT and xmp_text(changed) == TEXT
    before, after = opened(data), opened(changed)
    assert (before.mode, before.size, before.tobytes()) == (after.mode, after.size, after.tobytes())
    assert after.getexif()[0x0110] == "camera" and after.info.get("comment") == before.info.get("comment")
    again = write_description(changed, "shorter")
    assert read_description(again) == "shorter" and len(again) < len(changed)
    assert write_description(again, TEXT) == changed


def test_an_animation_keeps_its_frames(images):
    frames = [image.resize((32, 32)) for image in images[:3]]
    for settings in ({"format": "WEBP", "lossless": True}, {"format": "PNG"}):
        data = encoded(frames[0], save_all=True, append_images=frames[1:], **settings)
        changed = opened(write_description(data, TEXT))
        assert changed.n_frames == 3
        changed.seek(2)
        assert changed.convert("RGB").tobytes() == frames[2].tobytes()


@pytest.mark.parametrize("kind", [*FORMATS, "compressed"])
def test_other_values_in_the_xmp_stay(kind, images):
    if kind in ("png", "compressed"):
        texts = PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", FOREIGN.decode(), zip=kind == "compressed")
        data = encoded(images[0], format="PNG", pnginfo=texts)
    else:
        data = encoded(images[0], xmp=FOREIGN, **FORMATS[kind])
    changed = write_description(data, TEXT)
    packet = opened(changed).info["xmp"]
    packet = packet if isinstance(packet, bytes) else packet.encode()
    assert read_description(changed) == TEXT
    assert b'xmp:Rating="5"' in packet and packet.count(b"<x:xmpmeta") == 1


@pytest.mark.parametrize(
    "form",
    [
        b'<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/" dc:description="by hand"/>',
        b'<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description>by hand</dc:description>'
        b"</rdf:Description>",
    ],
)
def test_a_description_of_another_form_is_read_before_it_is_replaced(form, images, tmp_path):
    packet = FOREIGN.replace(b"</rdf:RDF>", form + b"</rdf:RDF>")
    path = tmp_path / "a.png"
    path.write_bytes(encoded(images[0], format="JPEG", xmp=packet))
    assert read_description(path.read_bytes()) == "by hand"
    with pytest.raises(ExistingCaption):
        XmpCaptions().wants(Input("a.png", path))
    XmpCaptions("append").write(Input("a.png", path), "new")
    assert read_description(path.read_bytes()) == "by hand, new" and xmp_text(path.read_bytes()) == "by hand, new"
    assert path.read_bytes().count(b"by hand") == 1


def test_a_chunk_with_too_few_fields_is_damaged(images):
    body = b"iTXtXML:com.adobe.xmp\0\0\0text"
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    data = encoded(images[0], format="PNG")
    with pytest.raises(ValueError, match="its XMP is damaged: the chunk has too few fields"):
        read_description(data[:33] + chunk + data[33:])


def test_an_image_that_has_changed_since_it_was_read_is_left_alone(tmp_path, images):
    path = tmp_path / "a.png"
    images[0].save(path)
    item = Input("a.png", path)
    item = replace(item, identity=item.identify())
    images[1].resize((40, 40)).save(path)
    other = path.read_bytes()
    with pytest.raises(ValueError, match="the file changed"):
        XmpCaptions().write(item, "new")
    assert path.read_bytes() == other


def test_what_xml_cannot_hold_is_left_out(images):
    data = encoded(images[0], format="PNG")
    assert read_description(write_description(data, "a\x00 b\x0b\ud83d c")) == "a b c"


def test_formats_and_damage_that_cannot_be_written_are_named(images):
    with pytest.raises(ValueError, match="JPEG, PNG and WebP files; pass --sidecar"):
        write_description(encoded(images[0], format="BMP"), TEXT)
    data = encoded(images[0], format="JPEG", xmp=b"<x:xmpmeta")
    with pytest.raises(ValueError, match="its XMP is damaged"):
        write_description(data, TEXT)
    entities = b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'
    with pytest.raises(ValueError, match="document type"):
        read_description(encoded(images[0], format="JPEG", xmp=entities))
    with pytest.raises(ValueError, match="a JPEG file holds about 65,533"):
        write_description(encoded(images[0], format="JPEG"), "word " * 14_000)


def test_an_existing_description_is_refused_skipped_or_joined(tmp_path, images):
    path = tmp_path / "a.jpg"
    images[0].save(path)
    item = Input("a.jpg", path)
    item = XmpCaptions().write(item, "old")
    with pytest.raises(ExistingCaption, match=r"a\.jpg has a description; pass --on-existing"):
        XmpCaptions().wants(item)
    assert not XmpCaptions("skip").wants(item) and XmpCaptions("append").wants(item)
    for _ in range(2):
        XmpCaptions("append").write(item, "new")
        assert read_description(path.read_bytes()) == "old, new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_is_known_as_it_is_then(tmp_path, images):
    path = tmp_path / "a.png"
    images[0].save(path)
    item = Input("a.png", path)
    before = item.identify()
    after = XmpCaptions().write(replace(item, identity=before), "new")
    assert after.identity == item.identify() != before
