"""Tar shards of WebDataset: samples are members that stand together and share a name up to its first dot.

The index of a shard is where each of its samples begins and where the last one ends, found by reading headers alone.
What is no header is a row of its own, which is rejected when it is read: damage is booked and costs only what it hit.
Layout of the format: https://github.com/webdataset/webdataset, of tar: POSIX.1-2001 (ustar, pax) and GNU long names.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from accessory.data.shards import Index, Shard

BLOCK = tarfile.BLOCKSIZE
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXTS = ("txt", "text", "caption", "cap", "cls", "id")
_NAME = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
             tarfile.GNUTYPE_LONGLINK)  # fmt: skip
_LONGEST = 1 << 20  # bytes of an extended header
_STEP = 1 << 20  # bytes looked through at a time for the next header

Read = Callable[[int, int], bytes]


@dataclass(frozen=True)
class _Member:
    """``begin`` is where its first header stands, ``start`` and ``end`` bound its data, ``after`` is what follows."""

    begin: int
    name: str
    file: bool
    start: int
    end: int
    after: int


@dataclass(frozen=True)
class _Gap:
    """Bytes without a member: zeros at an archive's end, or damage."""

    begin: int
    after: int
    zeros: bool


def _members(read: Read, start: int, end: int) -> Iterator[_Member | _Gap]:
    """What stands from ``start`` to ``end``. A member whose data would reach beyond is yielded as it claims to be."""
    at = start
    while at < end:
        block = read(at, BLOCK)
        member = _header(read, at, block)
        found: _Member | _Gap
        if member is not None:
            found = member
        else:
            zeros = not any(block)
            after = _next(read, at + BLOCK, end, (lambda b: any(b)) if zeros else (lambda b: b[257:262] == b"ustar"))
            found = _Gap(at, after, zeros)
        yield found
        at = found.after


def _header(read: Read, at: int, block: bytes) -> _Member | None:
    """The member whose header is ``block``; None where it is none, or of a kind that is not read."""
    name, size, place = "", -1, at
    for _ in range(4):  # extended headers before the member's own
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError):
            return None
        if info.size < 0 or info.type == tarfile.GNUTYPE_SPARSE:
            return None
        start = place + BLOCK
        if info.type not in _EXTENDED:
            size = size if size >= 0 else info.size if info.isreg() else 0
            return _Member(at, name or info.name, info.isreg(), start, start + size, start + _padded(size))
        if info.size > _LONGEST:
            return None
        data = read(start, info.size)
        if info.type == tarfile.GNUTYPE_LONGNAME:
            name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            records = _records(data)
            name = records.get("path", name)
            size = int(records["size"]) if records.get("size", "").isdecimal() else size
        place = start + _padded(info.size)
        block = read(place, BLOCK)
    return None


def _records(data: bytes) -> dict[str, str]:
    """The records ``LENGTH KEY=VALUE`` of a pax header, up to the first that is none."""
    found: dict[str, str] = {}
    while (match := re.match(rb"(\d{1,9}) ([^=\n]+)=", data)) is not None:
        length = int(match[1])
        if length <= match.end():
            break
        found[match[2].decode("utf-8", "replace")] = data[match.end() : length - 1].decode("utf-8", "surrogateescape")
        data = data[length:]
    return found


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _next(read: Read, at: int, end: int, wanted: Callable[[bytes], bool]) -> int:
    """Where the next block that is ``wanted`` stands, ``end`` where none is."""
    while at < end:
        part = read(at, min(_STEP, end - at))
        if not part:
            return end
        for i in range(0, len(part), BLOCK):
            if wanted(part[i : i + BLOCK]):
                return at + i
        at += len(part)
    return end


def _key(name: str) -> tuple[str, str] | None:
    match = _NAME.match(name)
    return None if match is None else (match[1], match[2].lower())


class Tar:
    """Reads rows of tar shards; a row is a mapping of the extensions of its members to what they hold.

    ``json`` is parsed, and the fields of an object are columns too; texts are decoded; pictures stay bytes. Whatever
    their extensions are, the pictures of a sample are its column ``image`` (a list where there are several), and
    ``txt`` is ``caption`` and ``text`` where nothing else is.
    """

    kind = "webdataset 1"

    def scan(self, shard: Shard) -> Index:
        """Where samples begin, and where the last ends. Raises OSError, and ValueError for a compressed shard."""
        with shard.open() as file:

            def read(at: int, count: int) -> bytes:
                file.seek(at)
                data: bytes = file.read(count)
                return data

            if read(0, 6).startswith(_PACKED):
                raise ValueError(f"{shard.url} is compressed, so no row can be found in the middle of it; unpack it")
            begins: list[int] = []
            last, closed, key = 0, False, ""
            for found in _members(read, 0, shard.size):
                last = min(found.after, shard.size)
                if isinstance(found, _Gap):
                    key, closed = "", True  # damage is a row, which says that others are lost
                    if found.zeros:
                        last = found.begin
                    else:
                        begins.append(found.begin)
                    continue
                closed = found.end > shard.size  # its row says so
                if found.file and (named := _key(found.name)) is not None and named[0] != key:
                    key = named[0]
                    begins.append(found.begin)
        # Where no mark of the end comes, a row more is rejected: nobody knows what stood there.
        return np.array([*begins, *(() if closed else (last,)), last], dtype=np.int64)

    def count(self, index: Index) -> int:
        """Rows of a shard."""
        return len(index) - 1

    def read(self, shard: Shard, index: Index, row: int) -> dict[str, Any]:
        """Row ``row``; ValueError says what is wrong with it, OSError that the shard cannot be read."""
        begin, end = int(index[row]), int(index[row + 1])
        if begin == end:
            raise ValueError(f"the end mark is missing at byte {end}: the shard was cut, and rows behind it are lost")
        data = shard.read(begin, end)
        found: dict[str, Any] = {}
        key = ""
        for member in _members(lambda at, count: data[at : at + count], 0, end - begin):
            if isinstance(member, _Gap):
                if not member.zeros:
                    raise ValueError(f"no tar header at byte {begin}: {end - begin} bytes of rows are lost")
                continue
            if not member.file or (named := _key(member.name)) is None:
                continue
            if member.end > len(data):
                wants, has = member.end - member.start, max(0, len(data) - member.start)
                raise ValueError(f"member {member.name} is cut short: {has} of {wants} bytes; what follows is lost")
            key, column = named
            if column in found:
                raise ValueError(f"two members {member.name}")
            found[column] = _decoded(member.name, column, data[member.start : member.end])
        return _row(key, found)

    def label(self, shard: Shard, index: Index, row: int) -> str:
        """The sample's key, empty where it has none."""
        begin, end = int(index[row]), int(index[row + 1])
        try:
            head = shard.read(begin, min(end, begin + 8 * BLOCK))
        except OSError:
            return ""
        member = _header(lambda at, count: head[at : at + count], 0, head[:BLOCK])
        named = None if member is None else _key(member.name)
        return "" if named is None else named[0]


def _decoded(name: str, column: str, data: bytes) -> Any:
    last = column.rsplit(".", 1)[-1]
    if last not in ("json", *TEXTS):
        return data
    try:
        text = data.decode("utf-8")
        return json.loads(text) if last == "json" else text
    except (ValueError, RecursionError) as error:
        what = "JSON" if last == "json" else "UTF-8 text"
        raise ValueError(f"member {name} is not valid {what} ({error})") from error


def _row(key: str, found: dict[str, Any]) -> dict[str, Any]:
    fields = found.get("json")
    row = {**(fields if isinstance(fields, dict) else {}), **found, "__key__": key}
    pictures = [value for column, value in found.items() if column.rsplit(".", 1)[-1] in PICTURES]
    if pictures:
        row["image"] = pictures[0] if len(pictures) == 1 else pictures
    if "txt" in found:
        row = {"caption": found["txt"], "text": found["txt"], **row}
    return row
