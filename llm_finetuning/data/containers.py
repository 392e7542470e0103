"""Opens a data file by its content, whatever its name: how it is compressed and encoded, and what form it has."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO

CHUNK = 1 << 16
DAMAGE = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
ARROW_FILE, ARROW_STREAM, PARQUET = b"ARROW1", b"\xff\xff\xff\xff", b"PAR1"
OTHERS = {
    b"%PDF": "a PDF; export its data as JSON lines or CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file; save it as CSV UTF-8",
    b"SQLite format 3": "an SQLite database; export the table as CSV",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"\x89HDF": "an HDF5 file; export it as parquet or JSON lines",
    b"version https://git-lfs": "a pointer of Git LFS, not the data; run git lfs pull",
    b"<!": "a page of HTML, not data; download the file itself",
    b"<html": "a page of HTML, not data; download the file itself",
    b"<?xml": "XML; export its data as JSON lines or CSV",
}
"""First bytes of what people hand in by mistake, and what to do then."""
ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
SNIFFED_LINES = 10
DOCUMENTS = ("readme", "license", "licence", "citation", "changelog", "notice")
"""How the names of files begin that lie beside the data in an archive."""


class ChunkStream(io.RawIOBase):
    """A readable stream over an iterator of bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.chunks, self.rest = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self.rest:
            self.rest = next(self.chunks, None)
            if self.rest is None:
                self.rest = b""
                return 0
        part, self.rest = self.rest[: len(buffer)], self.rest[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def _buffered(chunks: Iterator[bytes]) -> BinaryIO:
    return io.BufferedReader(ChunkStream(chunks), CHUNK)


def _zst_chunks(stream: BinaryIO) -> Iterator[bytes]:
    """Decompresses zstd frames one after the other; zstandard's own reader does not notice that a file is cut off."""
    import zstandard

    new_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj  # as `zstd --long=31` writes
    data = stream.read(CHUNK)
    try:
        while data:
            frame = new_frame()
            yield frame.decompress(data)
            while not frame.eof:
                data = stream.read(CHUNK)
                if not data:
                    raise EOFError("the last frame has no end")
                yield frame.decompress(data)
            data = frame.unused_data or stream.read(CHUNK)
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error


def _utf8_chunks(stream: BinaryIO, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        while data := stream.read(CHUNK):
            yield decoder.decode(data).encode("utf-8")
        yield decoder.decode(b"", final=True).encode("utf-8")
    except UnicodeDecodeError as error:
        raise EOFError(f"not {encoding.upper()}: {error.reason}") from error


def _open_zip(stream: BinaryIO) -> BinaryIO:
    """Opens the one file of a zip archive; raises ValueError if there are several, or none."""
    archive = zipfile.ZipFile(stream)
    names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
    if "[Content_Types].xml" in names:
        raise ValueError("an Excel or Word file. Save it as CSV UTF-8, and name that")
    plain = {name: name.rpartition("/")[2].lower() for name in names}
    names = [name for name, last in plain.items() if not last.startswith((".", *DOCUMENTS))] or names
    if len(names) != 1:
        raise ValueError(f"a zip archive of {len(names)} files ({', '.join(names[:5])}). Unpack it, and name one")
    if archive.getinfo(names[0]).flag_bits & 1:
        raise ValueError("a zip archive with a password. Unpack it, and name the file")
    return archive.open(names[0])


COMPRESSIONS = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"BZh": ("bz2", bz2.open),
    b"\xfd7zXZ\x00": ("xz", lzma.open),
    b"\x28\xb5\x2f\xfd": ("zst", lambda stream: _buffered(_zst_chunks(stream))),
    b"PK\x03\x04": ("zip", _open_zip),
    b"PK\x05\x06": ("zip", _open_zip),
}
"""First bytes of a compressed file → (name, what opens it)."""


def open_content(path: Path) -> tuple[BinaryIO, list[str]]:
    """Returns (the decompressed bytes of a file, what it was compressed with), by its first bytes, also twice."""
    stream, names = path.open("rb", CHUNK), []
    while len(names) < 3:
        head = stream.peek(8)[:8]
        found = next((entry for magic, entry in COMPRESSIONS.items() if head.startswith(magic)), None)
        if found is None:
            break
        names.append(found[0])
        stream = found[1](stream)
    return stream, names


@contextmanager
def named_damage(path: Path, done: list[int]) -> Iterator[None]:
    """Turns what a decompressor or decoder raises into a ValueError; done[0] = the lines read before."""
    try:
        yield
    except DAMAGE as error:
        problem = f"the file is cut off or damaged ({error})"
    except OSError as error:
        if error.errno is not None:  # the disk, not the data
            raise
        problem = f"the file is cut off or damaged ({error})"
    else:
        return
    raise ValueError(f"{path}, after line {done[0]}: {problem}. Download or copy it again.")


def encoding_of(head: bytes) -> str:
    """Returns the encoding of a text by its byte order mark, or by the zero bytes of its first two characters."""
    for mark, name in ENCODINGS.items():
        if head.startswith(mark):
            return name
    zeros = [byte == 0 for byte in head[:4].ljust(4, b"x")]
    patterns = {
        (0, 1, 1, 1): "utf-32-le",
        (1, 1, 1, 0): "utf-32-be",
        (0, 1, 0, 1): "utf-16-le",
        (1, 0, 1, 0): "utf-16-be",
    }
    return patterns.get(tuple(map(int, zeros)), "utf-8")


def open_text(path: Path) -> BinaryIO:
    """Opens a text file as UTF-8 without a byte order mark, whatever it is compressed with and encoded in."""
    stream, _ = open_content(path)
    encoding = encoding_of(stream.peek(4)[:4])
    if encoding == "utf-8-sig":
        stream.read(len(codecs.BOM_UTF8))
    elif encoding != "utf-8":
        return _buffered(_utf8_chunks(stream, encoding))
    return stream


def lines(path: Path, after: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, line) of a text file in UTF-8, without blank lines and those up to `after`."""
    done = [0]
    with named_damage(path, done), open_text(path) as stream:
        for number, line in enumerate(stream, 1):
            done[0] = number
            if number > after and not line.isspace():
                yield number, line


def form_of(path: Path) -> str:
    """Returns "parquet", "arrow", "JSON lines", "JSON" or "CSV"; raises ValueError for what is none of them.

    A folder is one of `Dataset.save_to_disk`, whose files are arrow.
    """
    if path.is_dir():
        return "arrow"
    with named_damage(path, [0]):
        try:
            stream, _ = open_content(path)
        except ValueError as error:
            raise ValueError(f"{path} is {error}.") from error
        with stream:
            head = stream.peek(300)[:300]
    if head.startswith(PARQUET):
        return "parquet"
    if head.startswith((ARROW_FILE, ARROW_STREAM)):
        return "arrow"
    for magic, what in OTHERS.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {what}.")
    if head[257:262] == b"ustar":
        raise ValueError(f"{path} is a tar archive; unpack it, and name one file.")
    return _text_form(path)


def _text_form(path: Path) -> str:
    head = [line for _, line in islice(lines(path), SNIFFED_LINES)]
    if not head:
        raise ValueError(f"{path} has no lines. Download or write it again.")
    first, state = head[0].lstrip()[:1], _state(head[0])
    objects = any(line.startswith(b"{") and _state(line) == "whole" for line in head[1:])
    if first not in (b"{", b"["):
        return "JSON lines" if objects else "CSV"
    if state == "whole":
        return "JSON" if first == b"[" and len(head) == 1 else "JSON lines"
    if state == "open" and (first == b"[" or not objects or _begins_with_a_value(path)):
        return "JSON"
    return "JSON" if not objects and (first == b"[" or state == "more") else "JSON lines"


def _state(line: bytes) -> str:
    """Says whether a line is a "whole" JSON value (a comma may follow an object), begins one or one and "more"."""
    line = line.rstrip()
    try:
        json.loads(line[:-1] if line.endswith(b"},") else line)
    except json.JSONDecodeError as error:
        return "open" if error.pos >= len(error.doc.rstrip()) else "more" if error.msg == "Extra data" else "broken"
    except (ValueError, RecursionError):
        return "broken"
    return "whole"


def _begins_with_a_value(path: Path) -> bool:
    """Whether the whole text begins with one valid JSON value that does not end on its first line."""
    with open_text(path) as stream:
        text = stream.read().decode("utf-8", errors="replace").lstrip()
    try:
        json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return True
