# SPDX-License-Identifier: Apache-2.0
"""Reads which CUDA machine code is inside a library.

``cuobjdump`` only looks into sections that nvcc's host compiler made; TVM keeps the fatbin as data. So the file is
searched for fatbin headers, whose layout NVIDIA ships in ``fatbinary_section.h`` and ``fatBinaryCtl.h``: a header of
16 bytes (magic, version, header size, size of all entries), then entries (kind, header size, padded size, ...,
architecture at byte 28, flags at byte 40), each followed by its code, compressed or not.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_MAGIC = struct.pack("<IH", 0xBA55ED50, 1)
_HEADER = struct.Struct("<IHHQ")
_ENTRY = struct.Struct("<HHIQ12xI8xQ")
_PTX, _ELF = 1, 2
# Seen set by nvcc 13.0 for sm_90a, sm_100a and sm_120a, and for no plain architecture.
_ARCH_SPECIFIC = 1 << 20


def archs_in(path: Path) -> list[str]:
    """Lists the CUDA architectures whose code ``path`` holds, lowest first.

    Args:
        path: A fatbin, or any file with fatbins inside, such as ``model.so``.

    Returns:
        ``sm_NN`` or ``sm_NNa`` for machine code and ``compute_NN`` for PTX, which a driver compiles for newer GPUs.
        Empty if there is no CUDA code.

    Raises:
        OSError: if the file cannot be read.
    """
    found: set[tuple[int, bool, str]] = set()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(_MAGIC)
        while at >= 0:
            found |= _entries(data, at)
            at = data.find(_MAGIC, at + len(_MAGIC))
    return [name for *_, name in sorted(found)]


def _entries(data: mmap.mmap, at: int) -> set[tuple[int, bool, str]]:
    """Returns ``(number, is PTX, name)`` of every entry of the fatbin at byte ``at``."""
    found = set()
    if at + _HEADER.size > len(data):
        return set()
    _, _, header_size, size = _HEADER.unpack_from(data, at)
    entry, end = at + header_size, min(at + header_size + size, len(data))
    while entry + _ENTRY.size <= end:
        kind, _, entry_header, code_size, arch, flags = _ENTRY.unpack_from(data, entry)
        if kind not in (_PTX, _ELF) or entry_header < _ENTRY.size:
            break
        suffix = "a" if flags & _ARCH_SPECIFIC else ""
        found.add((arch, kind == _PTX, f"{'compute' if kind == _PTX else 'sm'}_{arch}{suffix}"))
        entry += entry_header + code_size
    return found
