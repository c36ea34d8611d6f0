"""The same pixels in any kind of file are the same picture: by either route, with the same answer, seen once."""

from __future__ import annotations

import numpy as np
from PIL import Image

from loadtest.client import Question, Variant
from loadtest.media import File
from tests.e2e.server import EngineServer
from tests.media.parts import RGB, chunk, heic, orientation, png, tiff, with_chunks
from tests.media.samples import encoded, picture

IMAGE = picture(96, 64)
UNDO = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def stored(value: int) -> Image.Image:
    """The picture as a camera stores it that says how it is to be turned."""
    turned = UNDO[value]
    return IMAGE if turned is None else IMAGE.transpose(turned)


def same_pictures() -> dict[str, bytes]:
    files = {
        "PNG": encoded(IMAGE, "PNG"),
        "WebP": encoded(IMAGE, "WEBP", lossless=True),
        "BMP": encoded(IMAGE, "BMP"),
        "PNG of 16 bits": png(np.asarray(IMAGE).astype(int) * 257, 16, RGB),
        "PNG with much text": with_chunks(encoded(IMAGE, "PNG"), chunk(b"zTXt", b"a\0\7b"), chunk(b"gAMA", b"")),
    }
    for value in UNDO:
        exif = b"Exif\0\0" + tiff(orientation(value), (282, 2, 2, b"72\0\0"))
        files[f"PNG, orientation {value}"] = encoded(stored(value), "PNG", exif=exif)
        files[f"WebP, orientation {value}"] = encoded(stored(value), "WEBP", lossless=True, exif=exif)
    return files


def test_the_same_picture_in_any_file_has_the_same_answer_by_both_routes(server: EngineServer) -> None:
    files = same_pictures()
    questions = [Question("Describe it.", (File("image", "image/png", data),)) for data in files.values()]
    for way in (Variant("chat"), Variant("generate")):
        texts = [server.text(question, way) for question in questions]
        assert dict(zip(files, texts, strict=True)) == dict.fromkeys(files, texts[0])
    other = Question("Describe it.", (File("image", "image/png", encoded(picture(96, 64, seed=1), "PNG")),))
    assert server.text(other) != texts[0], "or the answer would not depend on the picture"


def test_avif_and_heic_are_read_by_both_routes(server: EngineServer) -> None:
    for data in (encoded(IMAGE, "AVIF"), heic(IMAGE), heic(IMAGE, turns=1), heic(IMAGE, brands=(b"mif1", b"heic"))):
        question = Question("Describe it.", (File("image", "application/octet-stream", data),))
        assert server.text(question, Variant("chat")) == server.text(question, Variant("generate"))
