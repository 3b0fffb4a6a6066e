"""Files with content of one's choice under checksums that agree, as an attacker would make them."""

from __future__ import annotations

import json
from typing import Any

from unisono.checkpoint.writing import digest


def forged(entries: dict[str, Any], notes: Any, data: bytes, **metadata: str) -> bytes:
    """A safetensors file with these notes of unisono.

    Args:
        entries: Name -> dtype code, shape and data_offsets.
        notes: What stands under the key `unisono`, as values or as text.
        data: The bytes of all tensors.
        metadata: More of it, or other checksums.
    """
    text = notes if isinstance(notes, str) else json.dumps(notes)
    listing = sorted([name, e["dtype"], e["shape"]] for name, e in entries.items())
    own = {"unisono": text, "unisono.crc32": digest(listing, text), **metadata}
    header = json.dumps({"__metadata__": own, **entries}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def taken_apart(content: bytes) -> tuple[dict[str, Any], Any, bytes]:
    """Undo `forged`: entries, notes and data of a file that unisono wrote."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    notes = json.loads(header.pop("__metadata__")["unisono"])
    return header, notes, content[8 + length :]
