"""The quantizer of ik_llama.cpp as a peer: its program llama-quantize, run on F32 GGUF files.

Its own types (IQ4_K, IQ4_KS, IQ4_KT, ...) are no part of llama.cpp, and no one else reads them. So `as_f32` has the
program itself compute the values of a file of its, which is then compared as any other.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def quantize(program: Path, source: Path, out: Path, mix: str, squares: Mapping[str, Tensor] | None) -> None:
    """Writes `source`, a GGUF file of floats, as `out` in a mix that the program knows by name ("IQ4_K", "Q4_K_M").

    squares: the mean squares of inputs, float32 (in,), by GGUF's names of weights; others are rounded without.
    """
    if not squares:
        _run(program, source, out, mix)
        return
    with tempfile.TemporaryDirectory() as folder:
        matrix = Path(folder) / "imatrix.dat"
        matrix.write_bytes(_entries(squares))
        # hidden, since the path of the matrix would be told in the result, whose size would then depend on it
        _run(program, "--imatrix", matrix, "--hide-imatrix", source, out, mix)


def as_f32(program: Path, source: Path, out: Path) -> None:
    """Writes a file of any of the program's types in F32: the values that its own dequantization gives."""
    _run(program, "--allow-requantize", source, out, "F32")


def _entries(squares: Mapping[str, Tensor]) -> bytes:
    """An importance matrix in llama.cpp's older layout. The reader divides an entry by its count, of which we say 1:
    what we have are means already."""
    parts = [struct.pack("<i", len(squares))]
    for name, values in squares.items():
        text = name.encode()
        parts += [struct.pack("<i", len(text)), text, struct.pack("<ii", 1, values.numel())]
        parts += [values.numpy(force=True).astype("<f4").tobytes()]
    return b"".join(parts)


def _run(program: Path, *arguments: str | Path) -> None:
    """Raises RuntimeError with the program's last lines where it fails or crashes."""
    done = subprocess.run([program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        last = done.stdout.decode(errors="replace").strip().splitlines()[-10:]
        raise RuntimeError("\n".join([f"{program.name} failed ({done.returncode}):", *last]))
