"""`data:` URIs as browsers read them: what is taken, what is refused and with which words, and what a body counts."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

import pytest

from service.body import _num_text_bytes
from service.errors import BadRequest, TooLarge
from service.media import MediaLimits, data_uri, fetch
from tests.media.samples import encoded, picture

DEMO = Path(__file__).parents[2] / "model" / "demo" / "media"
DATA = random.Random(0).randbytes(1000)
HEADERS = (
    *("data:image/png;base64,", "data:;base64,", "DATA:image/png;BASE64,", "dAtA:video/mp4;charset=x;BaSe64,"),
    *(" \n\tdata:image/png;base64,", "data: image/png ; base64 ,", "data:image/jpeg;charset=utf-8;base64,"),
    *('data:image/png;name="a,b;c\\"d";base64,', 'data:image/png;name=a"b;base64,', "data:nonsense;base64,"),
    "data:image/png;name=" + "x" * 4000 + ";base64,",
)


def lines(text: str, end: str = "\n") -> str:
    return "".join(text[at : at + 76] + end for at in range(0, len(text), 76))


FORMS: dict[str, Callable[[str], str]] = {
    "as it is": lambda text: text,
    "trailing newline": lambda text: text + "\n",
    "lines": lines,
    "lines of Windows": lambda text: lines(text, "\r\n"),
    "blank after the comma": lambda text: " " + text,
    "tabs and form feeds": lambda text: text.replace("A", "\tA\f"),
    "no padding": lambda text: text.rstrip("="),
    "half of the padding": lambda text: text.removesuffix("="),
    "padding apart": lambda text: text.replace("=", "\n=") + "\n",
    "URL-safe": lambda text: text.translate(str.maketrans("+/", "-_")),
    "URL-safe without padding": lambda text: text.translate(str.maketrans("+/", "-_")).rstrip("="),
    "both alphabets": lambda text: text.replace("+", "-", 3),
    "percent": lambda text: quote(text, safe=""),
    "percent, lower case": lambda text: re.sub("%..", lambda found: found[0].lower(), quote(text, safe="")),
    "everything percent": lambda text: "".join(f"%{ord(character):02X}" for character in text),
    "percent and lines": lambda text: lines(text).replace("\n", "%0D%0A").replace("+", "%2B").replace("=", "%3d"),
    "fragment": lambda text: text + "#t=10,20",
}


@pytest.mark.parametrize("slice", [None, 4, 7, 64])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_base64_is_read(monkeypatch, form, slice):
    if slice is not None:  # so that groups, escapes and padding lie across its border
        monkeypatch.setattr(data_uri, "SLICE", slice)
    for size in (0, 1, 2, 3, 4, 5, 57, 998, 999, 1000):
        uri = "data:image/png;base64," + FORMS[form](base64.b64encode(DATA[:size]).decode())
        assert data_uri.parse(uri).decode(1000) == DATA[:size]


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: header[:40])
def test_every_header_is_read(header):
    assert data_uri.parse(header + base64.b64encode(DATA).decode()).decode(1000) == DATA


def test_types_and_parameters_are_told_apart():
    uri = data_uri.parse('data:Video/JPEG;FPS = "2" ;name="a;fps=3,";base64,AAAA')
    assert (uri.media_type, uri.parameters, uri.content) == ("video/jpeg", {"fps": "2", "name": "a;fps=3,"}, "AAAA")


def test_without_base64_the_content_is_percent_decoded():
    """As `unquote_to_bytes` has it, which takes a `%` that begins nothing for itself."""
    rng = random.Random(1)
    for _ in range(300):
        content = "".join(
            rng.choice(["%", "%4", "%41", "%fF", "%zz", "a", "é", " ", "%25", "%2541"]) for _ in range(20)
        )
        uri = data_uri.parse("data:text/plain," + content)
        assert uri.decode(1000) == unquote_to_bytes(content)
    assert data_uri.parse("data:,a;base64,b").decode(10) == b"a;base64,b"


@pytest.mark.parametrize("slice", [None, 4, 9])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("AA!A", "'!' at offset 2"),
        ("AAAA\nAA.A", "'.' at offset 7"),
        ("äAAA", "'ä' at offset 0"),
        ("AAA\x00", r"'\x00' at offset 3"),
        ("AAAA%21AAA", "'%21' at offset 4"),
        ("AAAA%2", "'%' at offset 4"),
        ("AAAAAA%", "'%' at offset 6"),
        ("A\N{NO-BREAK SPACE}AA", r"'\xa0' at offset 1"),
        ('AAAA"AAA', "'\"' at offset 4"),
        ("AAAAA", "only one character"),
        ("A", "only one character"),
        ("AA=A", "'=' before the end of its base64, at offset 2"),
        ("AA==AA==", "'=' before the end of its base64, at offset 2"),
        ("=AAA", "'=' before the end of its base64, at offset 0"),
        ("AAAAAA%3DAAAAAAAAA", "'=' before the end of its base64, at offset 6"),
        ("AAAA===", "3 '='"),
        ("AAAA,AAAA", "',' at offset 4 after the comma, which is not base64; a list of frames is data:video/jpeg;"),
    ],
)
def test_malformed_base64_is_refused_with_the_character_and_its_place(monkeypatch, content, complaint, slice):
    if slice is not None:
        monkeypatch.setattr(data_uri, "SLICE", slice)
    with pytest.raises(BadRequest) as refused:
        data_uri.parse("data:image/png;base64," + content).decode(1000)
    assert complaint in refused.value.message
    assert refused.value.code == "invalid_data_uri"


@pytest.mark.parametrize(
    ("uri", "complaint"),
    [
        ("data:", "no comma"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64#,AAAA", "no comma"),
        ("data:" + "x" * 4097 + ";base64,AAAA", "more than 4096 characters before its comma"),
        ('data:"' + "x" * 4097 + '";base64,AAAA', "more than 4096 characters before its comma"),
        ("data:" + "x" * 5000, "no comma"),
        ("image/png;base64,AAAA", "does not begin with data:"),
    ],
    ids=lambda value: value[:30],
)
def test_malformed_headers_are_refused_with_the_reason(uri, complaint):
    with pytest.raises(BadRequest, match=complaint) as refused:
        data_uri.parse(uri)
    assert refused.value.code == "invalid_data_uri"


def forgiving(content: str) -> bytes | None:
    """WHATWG's "forgiving-base64 decode", with the URL-safe alphabet and half of a padding; None: failure."""
    text = re.sub("[\t\n\f\r ]", "", unquote_to_bytes(content).decode("latin-1"))
    text = re.sub("={1,2}\\Z", "", text).translate(str.maketrans("-_", "+/"))
    if len(text) % 4 == 1 or re.search("[^A-Za-z0-9+/]", text):
        return None
    return base64.b64decode(text + "=" * (-len(text) % 4))


@pytest.mark.parametrize("slice", [None, 4, 5, 9])
def test_any_content_is_read_as_the_standard_has_it(monkeypatch, slice):
    if slice is not None:
        monkeypatch.setattr(data_uri, "SLICE", slice)
    rng, read, refused = random.Random(3), 0, 0
    pieces = [
        "A",
        "z",
        "9",
        "+",
        "/",
        "-",
        "_",
        "AAAA",
        "BC",
        "\n",
        " ",
        "%2B",
        "%41",
        "%0a",
        "%3D",
        "=",
        "==",
        "%",
        "%4",
        "!",
    ]
    weights = [4] * 15 + [1] * 5
    for _ in range(3000):
        content = "".join(rng.choices(pieces, weights, k=rng.randrange(12))) + rng.choice(["", "", "=", "==", "\n"])
        expected = forgiving(content)
        if expected is not None:
            assert data_uri.decode_base64(content, 1000) == expected, content
            read += 1
            continue
        refused += 1
        with pytest.raises(BadRequest) as error:
            data_uri.decode_base64(content, 1000)
        if found := re.search("at offset (\\d+)", error.value.message):  # all before it is sound, and it is not
            sound, wrong = unquote_to_bytes(content[: int(found[1])]), content[int(found[1]) :]
            assert re.fullmatch(rb"[A-Za-z0-9+/_\-\t\n\f\r ]*", sound), content
            assert re.match("[^A-Za-z0-9+/_\\-\t\n\f\r ]", wrong), content
    assert min(read, refused) > 300


@pytest.mark.parametrize("form", FORMS)
def test_decoding_stops_at_the_limit(monkeypatch, form):
    monkeypatch.setattr(data_uri, "SLICE", 100)
    text = FORMS[form](base64.b64encode(DATA).decode())
    with pytest.raises(TooLarge):
        data_uri.parse("data:;base64," + text).decode(999)
    monkeypatch.setattr(data_uri, "_invalid_character", lambda *_: pytest.fail("read to its end"))
    with pytest.raises(TooLarge):
        data_uri.parse("data:;base64," + text.split("#")[0].rstrip("=\n") + "!" * 1000).decode(600)


# -- one reading for a body's limits and for its content


def escaped(rng: random.Random, text: str) -> str:
    """A JSON string of the text, any of its characters escaped."""
    short = {"/": r"\/", "\n": r"\n", "\t": r"\t", "\r": r"\r", "\f": r"\f", "\b": r"\b", '"': r"\""}

    def one(character: str) -> str:
        if rng.random() < 0.3 or character < " " and character not in short:
            return rng.choice([r"\u%04x", r"\u%04X"]) % ord(character)
        return short[character] if character in short and (character != "/" or rng.random() < 0.5) else character

    return '"' + "".join(map(one, text)) + '"'


def test_a_body_counts_as_text_just_what_is_no_data_uri():
    rng = random.Random(2)
    starts = ["data:", "DATA:", "dAta:", " data:", "\n\tdata:", "\x00data:", "\bData:"]
    others = ["date:", "xdata:", "data", "dat a:", "", "http://data:", "/data:", "\N{NO-BREAK SPACE}data:", "ⅾata:"]
    for start in [*starts, *others] * 30:
        text = start + "/abc+" * 20
        body = bytearray(b'{"text": "abc", "url": ' + escaped(rng, text).encode() + b"}")
        assert json.loads(body)["url"] == text
        assert (data_uri.START.match(text) is not None) == (start in starts)
        assert (_num_text_bytes(body, 10**6) < len(body) - 100) == (start in starts), body


@pytest.mark.parametrize("wide", ["\\u20ac", "\\ud83d\\ude00", "\\u0080", "ä"])
def test_a_string_that_would_take_more_memory_than_its_bytes_is_text(wide):
    body = bytearray(b'{"url": "data:' + b"A" * 1000 + wide.encode() + b'"}')
    assert _num_text_bytes(body, 10**6) > 1000
    body = bytearray(b'{"url": "data:' + b"A" * 1000 + b"\\u002f\\u007e\\/" + b'"}')
    assert _num_text_bytes(body, 10**6) < 30


def test_counting_ends_with_what_is_enough_and_not_before():
    rng = random.Random(4)
    pieces = [
        '"data:AAAA",',
        r'"\u0020\u0064ata:AAAAAAAA",',
        '"text",',
        "[0,0],",
        '"',
        r"\u00",
        '"data:ä",',
        '"dat"',
        "\\",
    ]
    for _ in range(200):
        body = bytearray("".join(rng.choices(pieces, k=rng.randrange(1, 30))).encode())
        exact = _num_text_bytes(body, 10**9)
        assert 0 < exact <= len(body)
        for enough in range(len(body) + 2):
            assert (_num_text_bytes(body, enough) > enough) == (exact > enough), body


def test_quotes_within_a_uri_end_it():
    body = bytearray(b'{"url": "data:image/png;name=\\"' + b"A" * 100 + b'\\"", "text": [' + b"0," * 500 + b"0]}")
    assert _num_text_bytes(body, 10**6) > 1000


@pytest.mark.parametrize("parameter", ['\\"', '"\\', '";', '"a'])
def test_a_header_of_quotes_takes_no_longer_than_another(parameter):
    """Four thousand characters took 67 ms on the event loop: each quote was searched for its end, to the end."""
    url = 'data:image/png;a="' + parameter * 2000 + ";base64,AAAA"

    def seconds() -> float:
        begun = time.process_time()
        with suppress(BadRequest):
            data_uri.parse(url)
        return time.process_time() - begun

    assert min(seconds() for _ in range(5)) < 0.02


# -- base64 without a URI around it


def resolve(url: str) -> bytes:
    return asyncio.run(fetch.resolve(url, limits=MediaLimits()))


@pytest.mark.parametrize("name", ["scene.png", "clip.mp4"])
@pytest.mark.parametrize("form", ["as it is", "lines", "no padding", "trailing newline"])
def test_base64_alone_is_read_where_it_tells_its_kind(name, form):
    data = (DEMO / name).read_bytes()
    url = FORMS[form](base64.b64encode(data).decode())
    assert resolve(url) == data
    body = bytearray(json.dumps({"url": url}).encode())
    assert _num_text_bytes(body, 10**9) < 100, "and is no text"
    assert _num_text_bytes(body.replace(b"/", b"\\/"), 10**9) < 100, "as PHP writes it"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP"])
def test_base64_alone_is_read_of_every_kind_of_picture(format):
    data = encoded(picture(40, 30), format)
    assert resolve(base64.b64encode(data).decode()) == data


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (base64.b64encode(DATA).decode(), "write base64 as data:image/png;base64,..."),
        (lines(base64.b64encode(DATA).decode()), "write base64 as data:image/png;base64,..."),
        (base64.urlsafe_b64encode(DATA).decode().rstrip("="), "write base64 as data:image/png;base64,..."),
        ("iVBORw0KGgo!" + "A" * 100, "'!'"),
        ("/9j/" + "A" * 101, "truncated base64"),
        ("scene.png", "must be a data: URI"),
        ("/9j", "must be a data: URI"),
    ],
    ids=lambda value: value[:20],
)
def test_other_base64_is_refused_and_says_what_to_write(url, says):
    with pytest.raises(BadRequest) as error:
        resolve(url)
    assert says in error.value.message
