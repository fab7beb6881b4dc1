"""Six novels by Jane Austen, out of the data of R's package janeaustenr, as Debian's r-cran-janeaustenr carries it:

    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb novels
    ... --novels novels/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb

One is held out: the one whose perplexity under the packaged model, 37.1, is nearest to 37.2, that of the text on which
the targets were measured.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from halfbyte.sample_data import Split

HELD_OUT = "MANSFIELD PARK"
_STRINGS, _STRING = 16, 9  # R's types of a vector of strings, and of one (R Internals, section 1.1)


def split(database: Path) -> Split:
    """{"text"} records, a novel each."""
    books = [_text(raw) for raw in _entries(database.read_bytes())]
    held = [b for b in books if b.startswith(HELD_OUT)]
    assert (len(books), len(held)) == (6, 1), f"{database} has {len(books)} books, {len(held)} called {HELD_OUT}."
    return {"train": [{"text": b} for b in books if b not in held], "heldout": [{"text": b} for b in held]}


def _entries(raw: bytes) -> Iterator[bytes]:
    """Of R's lazy-load database: a size in 4 bytes before each, zlib's after them."""
    while raw:
        unpacking = zlib.decompressobj()
        yield unpacking.decompress(raw[4:])
        raw = unpacking.unused_data


def _text(raw: bytes) -> str:
    """A vector of strings, R's serialization in XDR (R Internals, section 1.8), its lines joined."""
    at = 2 + 3 * 4  # "X\n", three versions
    at += 4 + struct.unpack_from(">i", raw, at)[0]  # the encoding
    flags, count = struct.unpack_from(">ii", raw, at)
    assert flags & 0xFF == _STRINGS, f"an R object of type {flags & 0xFF}, not strings"
    at += 8
    lines = []
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", raw, at)
        assert flags & 0xFF == _STRING
        lines.append(raw[at + 8 : at + 8 + size].decode())
        at += 8 + size
    return "\n".join(lines)
