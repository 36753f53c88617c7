"""Reads which kernels a file built by nvcc holds, by architecture: from the ELF images of devices inside it.

Needs uncompressed images (--no-compress), and none of the toolkit's programs.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

_EM_CUDA = 190


def kernels(path: Path) -> dict[int, set[str]]:
    """Return the mangled names of the functions with code of their own section, by architecture (90 for sm_90)."""
    data = path.read_bytes()
    found: dict[int, set[str]] = {}
    for match in re.finditer(rb"\x7fELF\x02\x01", data):
        image = data[match.start() :]
        if struct.unpack_from("<H", image, 18)[0] != _EM_CUDA:
            continue
        sections, (flags,) = struct.unpack_from("<Q", image, 40)[0], struct.unpack_from("<I", image, 48)
        size, count, names_at = struct.unpack_from("<HHH", image, 58)
        # From version 8 of this ABI on, the architecture is in the second byte of the flags.
        target = flags >> 8 & 0xFF if image[8] >= 8 else flags & 0xFF

        def header(i: int, image: bytes = image, sections: int = sections, size: int = size) -> tuple[int, int]:
            name, _, _, _, offset = struct.unpack_from("<IIQQQ", image, sections + i * size)
            return name, offset

        names = header(names_at)[1]
        for i in range(count):
            start = names + header(i)[0]
            name = image[start : image.index(b"\0", start)].decode()
            if name.startswith(".text."):
                found.setdefault(target, set()).add(name.removeprefix(".text."))
    return found
