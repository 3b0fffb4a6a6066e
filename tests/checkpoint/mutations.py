"""Ways to break a file that know its format, so that what is deep in it is reached, too."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

from forging import forged, taken_apart

INTEGERS = [0, 1, 2, 3, 7, 8, 16, 64, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]
INTEGERS += [
    2**32,
    2**40,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    10**30,
    -1,
    -2,
    -(2**63),
]
TEXTS = ["", "x", "F32", "BF16", "F64", "C64", "U8", "BOOL", "F4", "complex128", "float8_e8m0fnu"]
TEXTS += [
    "members.x",
    "combination.weights",
    "..",
    "../x",
    "a/b",
    "a\\b",
    "\0",
    "\ud800",
    "\x1b[2J[/x]",
    "é" * 300,
]
DEEP = json.loads("[" * 400 + "]" * 400)
GLOBALS = ["posix system", "builtins eval", "builtins bytearray", "_codecs encode", "torch Size"]
GLOBALS += ["torch FloatStorage", "torch DoubleStorage", "torch BoolStorage", "torch Tensor"]
GLOBALS += ["torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch device"]
GLOBALS += ["torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor"]
GLOBALS += ["torch._utils _rebuild_meta_tensor_no_storage", "torch float64", "torch LongStorage"]
GLOBALS += ["torch._utils _rebuild_nested_tensor", "collections Counter", "collections OrderedDict"]
GLOBALS += ["torch._tensor _rebuild_from_type_v2", "torch.nn.parameter Parameter", "builtins set"]
OPS = [pickle.MARK, pickle.POP, pickle.POP_MARK, pickle.REDUCE, pickle.BUILD, pickle.TUPLE]
OPS += [pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.SETITEM, pickle.SETITEMS]
OPS += [pickle.NONE, pickle.NEWTRUE, pickle.BINPERSID, pickle.NEWOBJ, pickle.STOP, pickle.APPEND]
ZIP_SIGNATURES = [b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\7\x08"]

Mutation = Callable[[bytes, random.Random], bytes]


# Any file -----------------------------------------------------------------------------------------


def change_bytes(content: bytes, dice: random.Random) -> bytes:
    """Flip, insert, delete, repeat, zero or cut off."""
    if not content:
        return bytes([dice.randrange(256)])
    at = dice.randrange(len(content))
    size = min(dice.choice([1, 1, 2, 4, 8, 16, 64, 512]), len(content) - at)
    before, part, after = content[:at], content[at : at + size], content[at + size :]
    return dice.choice(
        [
            before + bytes([content[at] ^ 1 << dice.randrange(8)]) + content[at + 1 :],
            before + dice.randbytes(size) + after,
            before + dice.randbytes(size) + part + after,
            before + after,
            before + part + part + after,
            before + bytes(size) + after,
            before,
            content + dice.randbytes(size),
        ]
    )


def change_length(content: bytes, dice: random.Random) -> bytes:
    """Write an integer over some place, often the first, where safetensors keep a length."""
    at = dice.choice([0, 0, dice.randrange(len(content) + 1)])
    size = dice.choice([2, 4, 8])
    value = dice.choice([*INTEGERS, len(content), len(content) - 8]) % 256**size
    return content[:at] + value.to_bytes(size, "little") + content[at + size :]


# JSON ---------------------------------------------------------------------------------------------


def change_json(value: Any, dice: random.Random) -> Any:
    """The same but for one place, anywhere in it."""
    if not isinstance(value, (dict, list)) or not value or dice.random() < 0.1:
        return _other(value, dice)
    inside = list(value) if isinstance(value, dict) else range(len(value))
    key = dice.choice(inside)
    changed = value.copy()
    way = dice.random()
    if way < 0.1:
        del changed[key]
    elif way < 0.2:
        new = _other(value[key], dice) if dice.random() < 0.5 else value[dice.choice(inside)]
        if isinstance(value, dict):
            changed[dice.choice([*inside, *TEXTS])] = new
        else:
            changed.insert(key, new)
    elif isinstance(value[key], (dict, list)) and value[key]:
        changed[key] = change_json(value[key], dice)
    else:
        changed[key] = _other(value[key], dice)
    return changed


def _other(value: Any, dice: random.Random) -> Any:
    near: list[Any] = []
    if isinstance(value, int):
        near = [value + 1, value - 1, value * 2, -value]
    elif isinstance(value, str):
        near = [value[1:], value + "x", value.upper(), value[:-1] + "0"]
    elif isinstance(value, list):
        near = [value[::-1], value * 2, [value], [*value, 1]]
    texts, numbers = dice.choice(TEXTS), dice.choice(INTEGERS)
    return dice.choice(
        [
            *near,
            texts,
            numbers,
            None,
            True,
            1.5,
            float("nan"),
            [],
            {},
            [texts],
            {texts: numbers},
            DEEP,
        ]
    )


def change_json_text(content: bytes, dice: random.Random) -> bytes:
    """A file that is one JSON text, such as an index of shards."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return change_bytes(content, dice)
    return json.dumps(change_json(value, dice)).encode()


# safetensors --------------------------------------------------------------------------------------


def change_header(content: bytes, dice: random.Random) -> bytes:
    """Change names, dtypes, shapes, offsets or notes; the checksums of the header agree."""
    try:
        entries, notes, data = _apart(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return change_bytes(content, dice)
    if notes is None:  # not of unisono
        changed = json.dumps(change_json(entries, dice)).encode()
        return len(changed).to_bytes(8, "little") + changed + data
    if dice.random() < 0.7:
        notes = change_json(notes, dice)
    else:
        entries = change_json(entries, dice)
    try:
        return forged(entries, notes, data)
    except (TypeError, KeyError, ValueError, AttributeError):  # no longer one with checksums
        changed = json.dumps(entries).encode()
        return len(changed).to_bytes(8, "little") + changed + data


def _apart(content: bytes) -> tuple[dict[str, Any], Any, bytes]:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if "unisono" in header.get("__metadata__", {}):
        return taken_apart(content)
    return header, None, content[8 + length :]


# Zip files of torch.save --------------------------------------------------------------------------


def change_directory(content: bytes, dice: random.Random) -> bytes:
    """Write over a field of a zip file's own structures."""
    found = [at for s in ZIP_SIGNATURES for at in _places(content, s)]
    if not found:
        return change_bytes(content, dice)
    at = dice.choice(found) + dice.randrange(4, 46)
    size = dice.choice([1, 2, 4, 8])
    value = dice.choice([*INTEGERS, len(content), dice.choice(found)]) % 256**size
    return content[:at] + value.to_bytes(size, "little") + content[at + size :]


def change_records(content: bytes, dice: random.Random) -> bytes:
    """Write the archive anew with a record changed, compressed, twice, missing or renamed."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except Exception:  # it is broken already
        return change_bytes(content, dice)
    if not records:
        return change_bytes(content, dice)
    at = dice.randrange(len(records))
    if dice.random() < 0.6:
        at = next((k for k, (name, _) in enumerate(records) if name.endswith("data.pkl")), at)
    name, data = records[at]
    folder = name.partition("/")[0]
    change = dice.choice([change_pickle, change_pickle, change_bytes])
    new = dice.choice(["data.pkl", "data/0", "data/1", "byteorder", "constants.pkl", "code/x.py"])
    small = dice.choice([b"big", b"little", b"0", b"-1", b"64", b"3", b"", b"x" * 100])
    replaced = dice.choice(
        [
            [(name, change(data, dice))],
            [(name, change(data, dice))],
            [(name, change(data, dice))],
            [],
            [(name, data), (name, change(data, dice))],
            [(f"{folder}/{new}", data), (name, data)],
            [(f"{folder}/{dice.choice(['byteorder', '.format_version', 'version'])}", small)],
            [(name, data), (f"{folder}/.storage_alignment", small)],
            [(name, dice.choice(records)[1])],
        ]
    )
    compressed = zipfile.ZIP_DEFLATED if dice.random() < 0.1 else zipfile.ZIP_STORED
    changed = [*records[:at], *replaced, *records[at + 1 :]]
    if dice.random() < 0.9:
        changed = list(dict(changed).items())  # one of each name
    return _zipped(changed, compressed)


def _zipped(records: list[tuple[str, bytes]], compressed: int) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", compressed) as archive:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, data in records:
            archive.writestr(zipfile.ZipInfo(name), data, compressed)
    return out.getvalue()


def _places(content: bytes, sign: bytes) -> list[int]:
    found, at = [], content.find(sign)
    while at >= 0:
        found.append(at)
        at = content.find(sign, at + 1)
    return found


# Pickles ------------------------------------------------------------------------------------------


def change_pickle(content: bytes, dice: random.Random) -> bytes:
    """Drop, repeat, insert or change one instruction of a pickle, or of several in a row."""
    ops = _instructions(content)
    if not ops:
        return change_bytes(content, dice)
    start, end, name = dice.choice(ops)
    whole, way = content[start:end], dice.random()
    if way < 0.15:
        new = b""
    elif way < 0.25:
        new = whole + whole
    elif way < 0.45:
        new = whole + dice.choice([*OPS, _get(dice), _integer(dice), _global(dice)])
    elif name == "GLOBAL":
        new = _global(dice)
    elif name.startswith(("BININT", "LONG")):
        new = _integer(dice)
    elif name.startswith("BINGET"):
        new = _get(dice)
    elif name == "BINUNICODE":
        text = dice.choice(TEXTS).encode(errors="replace")
        new = pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    else:
        other = dice.choice(ops)
        new = content[other[0] : other[1]]
    return content[:start] + new + content[end:]


def _instructions(content: bytes) -> list[tuple[int, int, str]]:
    """Start, end and name of the instructions of all pickles that stand one after another."""
    found: list[tuple[int, int, str]] = []
    stream = io.BytesIO(content)
    try:
        while True:
            for op, _, at in pickletools.genops(stream):
                found.append((at, stream.tell(), op.name))
    except Exception:  # the end, or something else
        return [(start, end, name) for start, end, name in found if end > start]


def _integer(dice: random.Random) -> bytes:
    value = dice.choice(INTEGERS)
    if 0 <= value < 256 and dice.random() < 0.5:
        return pickle.BININT1 + bytes([value])
    if -(2**31) <= value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    data = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(data)]) + data


def _global(dice: random.Random) -> bytes:
    module, name = dice.choice(GLOBALS).split()
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _get(dice: random.Random) -> bytes:
    return pickle.BINGET + bytes([dice.randrange(40)])


ANY: list[Mutation] = [change_bytes, change_length]
OF: dict[str, list[Mutation]] = {
    ".safetensors": [*ANY, *8 * [change_header]],
    ".json": [change_bytes, change_json_text, change_json_text],
    ".pth": [*ANY, change_pickle, change_pickle],
    ".pt": [*ANY, change_directory, *4 * [change_records]],
}
OF[".bin"] = OF[".ckpt"] = OF[".pt"]
