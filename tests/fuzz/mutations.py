"""Seeded damage to files: what a bad disk, a cut transfer or somebody who means harm does to them."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence

import numpy as np

Mutation = Callable[[bytes, np.random.Generator], bytes]

HEAD = 1024  # where formats keep what everything else depends on
EXTREMES = (0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
NUMBERS = (
    "0", "-1", "1", "65536", "2147483648", "99999999999999999999", "1e308", "1e999", "-1e-999", "nan", "inf", "1.5", "",
    "0x41", "١٢", "--5", "1,5", "{}", "[]", "null", "true",
)  # fmt: skip
SCRAPS = (
    "\0",
    "{",
    "}",
    "[",
    "]",
    '"',
    "'",
    "\n",
    "\r",
    "\t",
    ";",
    "=",
    ":",
    "<",
    ">",
    "&",
    "%",
    "\ufffd",
    "\u202e",
    "\\",
)
DEEP = 20_000


def flip_bits(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip one to eight bits."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        out[_place(data, rng)] ^= 1 << int(rng.integers(8))
    return bytes(out)


def overwrite_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Overwrite a short run with one value, or with noise."""
    start, length = _place(data, rng), int(rng.integers(1, 17))
    value = (
        rng.integers(0, 256, length, np.uint8).tobytes() if rng.random() < 0.5 else bytes([_extreme_byte(rng)]) * length
    )
    return data[:start] + value[: len(data) - start] + data[start + length :]


def extreme_number(data: bytes, rng: np.random.Generator) -> bytes:
    """Overwrite what may be a size, a count or an offset with a number at the edge of what it can hold."""
    width = int(rng.choice([1, 2, 4, 8]))
    start = _place(data, rng) // width * width if rng.random() < 0.8 else _place(data, rng)
    number = int(rng.choice(np.array([*EXTREMES, len(data), len(data) + 1], np.uint64))) % 2 ** (8 * width)
    return data[:start] + number.to_bytes(width, str(rng.choice(["little", "big"]))) + data[start + width :]  # type: ignore[arg-type]


def extreme_real(data: bytes, rng: np.random.Generator) -> bytes:
    """Overwrite eight bytes with a real number that is none, or beyond any range."""
    start = _place(data, rng) // 4 * 4
    code = str(rng.choice(["<d", ">d", "<f"]))
    value = float(rng.choice([np.nan, np.inf, -np.inf, 1e300 if "d" in code else 1e38, -0.0]))
    packed = struct.pack(code, value)
    return data[:start] + packed + data[start + len(packed) :]


def truncate(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut the end off."""
    return data[: _place(data, rng)]


def extend(data: bytes, rng: np.random.Generator) -> bytes:
    """Add noise, zeros or the beginning again."""
    length = int(rng.integers(1, 4096))
    tails = (rng.integers(0, 256, length, np.uint8).tobytes(), bytes(length), data[:length])
    return data + tails[int(rng.integers(3))]


def delete_run(data: bytes, rng: np.random.Generator) -> bytes:
    """Take a run out."""
    start = _place(data, rng)
    return data[:start] + data[start + int(rng.integers(1, 65)) :]


def repeat_run(data: bytes, rng: np.random.Generator) -> bytes:
    """Insert a run of the file a second time, elsewhere."""
    start, length, to = _place(data, rng), int(rng.integers(1, 257)), _place(data, rng)
    return data[:to] + data[start : start + length] + data[to:]


def swap_runs(data: bytes, rng: np.random.Generator) -> bytes:
    """Let two runs of one length change places."""
    length = int(rng.integers(1, 65))
    one, two = sorted((_place(data, rng), _place(data, rng)))
    if two + length > len(data) or one + length > two:
        return flip_bits(data, rng)
    return (
        data[:one]
        + data[two : two + length]
        + data[one + length : two]
        + data[one : one + length]
        + data[two + length :]
    )


def replace_number(data: bytes, rng: np.random.Generator) -> bytes:
    """Text: put another number in the place of one."""
    return _replace_match(rb"-?\d+\.?\d*(?:[eE][-+]?\d+)?", data, rng, lambda _: str(rng.choice(NUMBERS)).encode())


def replace_word(data: bytes, rng: np.random.Generator) -> bytes:
    """Text: put another word of the file, or none, in the place of one."""
    words = re.findall(rb"[A-Za-z_:]{2,}", data) or [b"x"]
    other = words[int(rng.integers(len(words)))] if rng.random() < 0.7 else b""
    return _replace_match(rb"[A-Za-z_:]{2,}", data, rng, lambda _: other)


def edit_lines(data: bytes, rng: np.random.Generator) -> bytes:
    """Text: drop, double or exchange lines."""
    lines = data.split(b"\n")
    one, two = (int(rng.integers(len(lines))) for _ in range(2))
    kind = int(rng.integers(3))
    if kind == 0:
        del lines[one]
    elif kind == 1:
        lines.insert(two, lines[one])
    else:
        lines[one], lines[two] = lines[two], lines[one]
    return b"\n".join(lines)


def insert_scrap(data: bytes, rng: np.random.Generator) -> bytes:
    """Text: insert a character with a meaning, a byte that is no UTF-8, a very long word or a very deep nesting."""
    start, kind = _place(data, rng), rng.random()
    if kind < 0.7:
        scrap = str(rng.choice(SCRAPS)).encode()
    elif kind < 0.85:
        scrap = bytes([int(rng.integers(128, 256))])
    elif kind < 0.95:
        scrap = str(rng.choice(["a", "9", " ", "\n", ","])).encode() * DEEP
    else:
        scrap = str(rng.choice(["[", "{", "(", "<a>", '{"a":'])).encode() * DEEP
    return data[:start] + scrap + data[start:]


BINARY: tuple[Mutation, ...] = (
    flip_bits, overwrite_bytes, extreme_number, extreme_number, extreme_real, truncate, extend, delete_run, repeat_run,
    swap_runs,
)  # fmt: skip
TEXT: tuple[Mutation, ...] = (replace_number, replace_number, replace_word, edit_lines, insert_scrap)


def mutate(data: bytes, donors: Sequence[bytes], rng: np.random.Generator) -> bytes:
    """Damage a file in one to four ways; ``donors`` are other files, whose parts may be spliced in."""
    for _ in range(int(rng.choice([1, 1, 1, 2, 3, 4]))):
        if not data:
            return data
        if donors and rng.random() < 0.05:
            donor = donors[int(rng.integers(len(donors)))]
            data = data[: _place(data, rng)] + donor[int(rng.integers(len(donor) + 1)) :]
            continue
        kinds = TEXT if is_text(data) and rng.random() < 0.75 else BINARY
        data = kinds[int(rng.integers(len(kinds)))](data, rng)
    return data


def is_text(data: bytes) -> bool:
    """Tell whether a file reads as text."""
    return b"\0" not in data[:4096] and sum(byte < 9 or byte > 126 for byte in data[:512]) * 20 <= len(data[:512])


def _place(data: bytes, rng: np.random.Generator) -> int:
    """A place in the file, half of the time near its beginning."""
    limit = min(HEAD, len(data)) if rng.random() < 0.5 else len(data)
    return int(rng.integers(limit))


def _extreme_byte(rng: np.random.Generator) -> int:
    return int(rng.choice([0, 1, 0x20, 0x7F, 0x80, 0xFF]))


def _replace_match(
    pattern: bytes, data: bytes, rng: np.random.Generator, new: Callable[[re.Match[bytes]], bytes]
) -> bytes:
    matches = list(re.finditer(pattern, data))
    if not matches:
        return flip_bits(data, rng)
    match = matches[int(rng.integers(len(matches)))]
    return data[: match.start()] + new(match) + data[match.end() :]
