"""The used blocks of LVM2 physical volumes: labels, metadata, and what is used inside of their logical volumes.

Linear and striped volumes are looked into like partitions; volumes of other types, those that lie partly elsewhere, and
those that others are made of are copied whole. Extents of no volume are free.

Source: LVM2 lib/format_text/layout.h and lib/label/label.h (label, headers), lvm2 `man 7 lvmraid` and the comments in
its text metadata.
"""

from __future__ import annotations

import re
import struct
import zlib
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from stages.disk.usage import Numbers, RangeSet, Refusal, UsedMap, take_witness

_SECTOR = 512
_MDA_HEADER = 512
_MDA_MAGIC = b" LVM2 x[5A%r0N*>"
_CRC_BEGIN = 0xF597A6CF
_PLAIN_STATUS = {"READ", "WRITE", "VISIBLE", "FIXED_MINOR"}
_DEPTH_MAX = 16

Section = dict[str, "Value"]
Value = str | int | float | list["str | int | float"] | Section

MapInside = Callable[[RangeReader], Awaitable[UsedMap | Refusal]]


@dataclass(frozen=True, slots=True)
class _Label:
    """What a physical volume's label says."""

    uuid: str
    text: str
    text_ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a logical volume. Bytes.

    Attributes:
        offset, length: in the volume.
        stripes: (member, offset there) of each stripe; one for linear.
        chunk: bytes that go to one stripe before it is the next one's turn.
    """

    offset: int
    length: int
    stripes: tuple[tuple[int, int], ...]
    chunk: int

    def places(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(member, offset there, length) of a range inside the segment, in the order of the volume."""
        while length:
            chunk, inside = divmod(offset, self.chunk)
            row, column = divmod(chunk, len(self.stripes))
            member, base = self.stripes[column]
            step = min(length, self.chunk - inside)
            yield member, base + row * self.chunk + inside, step
            offset, length = offset + step, length - step

    def project(self, positions: Numbers, column: int) -> Numbers:
        """How many bytes of a stripe lie before each position of the segment."""
        row = self.chunk * len(self.stripes)
        made: Numbers = positions // row * self.chunk + np.clip(positions % row - column * self.chunk, 0, self.chunk)
        return made


@dataclass(frozen=True, slots=True)
class LogicalVolume:
    """A volume whose every byte lies on members that are here: a RangeReader."""

    name: str
    size: int
    segments: tuple[Segment, ...]
    members: tuple[RangeReader, ...]

    def places(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(member, offset there, length) of a range, in order."""
        first = bisect_right(self.segments, offset, key=lambda segment: segment.offset) - 1
        for segment in self.segments[max(0, first) :]:
            if segment.offset >= offset + length:
                return
            begin = max(offset, segment.offset)
            end = min(offset + length, segment.offset + segment.length)
            if begin < end:
                yield from segment.places(begin - segment.offset, end - begin)

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. Raises FormatError outside of the volume."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError("something is said to lie outside of what there is", offset=offset, length=length)
        parts = [await self.members[member].read(at, step) for member, at, step in self.places(offset, length)]
        return b"".join(parts)


@dataclass(slots=True)
class _Volume:
    """A logical volume as the metadata describes it. `reason` says why it is not looked into."""

    name: str
    segments: list[Segment] = field(default_factory=list)
    reason: str = ""

    @property
    def size(self) -> int:
        """Bytes of its segments so far."""
        return self.segments[-1].offset + self.segments[-1].length if self.segments else 0


async def map_volumes(members: Sequence[RangeReader], map_inside: MapInside) -> list[UsedMap | Refusal]:
    """Map physical volumes, which may be of several groups.

    Args:
        members: the physical volumes of one disk; a volume that lies on several of them can only be looked into when
            all are given.
        map_inside: maps a volume's filesystem.
    Returns:
        one answer for each member.
    """
    labels: list[_Label | None] = []
    answers: list[UsedMap | Refusal] = []
    for member in members:
        try:
            labels.append(await _read_label(member))
            answers.append(Refusal("lvm2", "its metadata is not on this disk"))
        except FormatError as error:
            labels.append(None)
            answers.append(Refusal("lvm2", f"it is damaged: {error.message}"))
    newest: dict[str, tuple[int, str, Section]] = {}
    for index, label in enumerate(labels):
        if label is not None and label.text:
            try:
                group_id, sequence, name, group = _group(label.text)
            except FormatError as error:
                answers[index] = Refusal("lvm2", f"it is damaged: {error.message}")
                labels[index] = None
                continue
            if group_id not in newest or newest[group_id][0] < sequence:
                newest[group_id] = (sequence, name, group)
    for _, name, group in newest.values():
        try:
            mapped = await _map_group(name, group, members, labels, map_inside)
        except FormatError as error:
            mapped = {index: Refusal("lvm2", f"it is damaged: {error.message}") for index in _mine(group, labels)}
        for index, answer in mapped.items():
            answers[index] = answer
    return answers


@dataclass(frozen=True, slots=True)
class FoundVolume:
    """A logical volume that was found: to be read where `volume` is there, else `reason` says why not."""

    group: str
    name: str
    volume: LogicalVolume | None
    reason: str = ""


async def find_volumes(members: Sequence[RangeReader]) -> tuple[list[FoundVolume], list[str]]:
    """List the visible logical volumes of physical volumes, which may be of several groups.

    Returns:
        the volumes, and what is wrong with the members, in sentences.
    Raises:
        StoreError: a member can't be read.
    """
    labels: list[_Label | None] = []
    problems: list[str] = []
    newest: dict[str, tuple[int, str, Section]] = {}
    for member in members:
        label: _Label | None = None
        try:
            label = await _read_label(member)
            if label.text:
                group_id, sequence, name, group = _group(label.text)
                if group_id not in newest or newest[group_id][0] < sequence:
                    newest[group_id] = (sequence, name, group)
        except FormatError as error:
            problems.append(f"a physical volume is damaged: {error.message}")
            label = None
        labels.append(label)
    found: list[FoundVolume] = []
    for _, name, group in newest.values():
        try:
            found += _find_in_group(name, group, members, labels)
        except FormatError as error:
            problems.append(f"the volume group {name} is damaged: {error.message}")
    return found, problems


def _find_in_group(
    group_name: str, group: Section, members: Sequence[RangeReader], labels: Sequence[_Label | None]
) -> list[FoundVolume]:
    mine = _mine(group, labels)
    reason = _why_not(group)
    extent = _number(group, "extent_size") * _SECTOR
    if not extent:
        raise FormatError("its extents have no size")
    described = _sections(group, "physical_volumes")
    places: dict[str, tuple[int, int, int]] = {}
    for index, name in mine.items():
        start, count = _number(described[name], "pe_start") * _SECTOR, _number(described[name], "pe_count")
        if start + count * extent > members[index].size:
            raise FormatError("its extents reach behind the end of the partition")
        places[name] = (index, start, count)
    found = []
    for volume in _volumes(group, set(described), places, extent):
        if "VISIBLE" not in _words(_sections(group, "logical_volumes")[volume.name], "status"):
            continue
        why = reason or volume.reason
        logical = LogicalVolume(volume.name, volume.size, tuple(volume.segments), tuple(members))
        found.append(FoundVolume(group_name, volume.name, None if why else logical, why))
    return found


# -- label and text ---------------------------------------------------------------------------------------------------


def _crc(data: bytes) -> int:
    return ~zlib.crc32(data, ~_CRC_BEGIN & 0xFFFFFFFF) & 0xFFFFFFFF


async def _read_label(reader: RangeReader) -> _Label:
    """Label and newest metadata text of a physical volume. Raises FormatError."""
    head = await reader.read(0, min(4 * _SECTOR, reader.size))
    for sector in range(4):
        at = sector * _SECTOR
        data = head[at : at + _SECTOR]
        if data[:8] == b"LABELONE" and data[24:32] == b"LVM2 001":
            break
    else:
        raise FormatError("there is no LVM2 label")
    number, crc, start = struct.unpack_from("<QII", data, 8)
    if number != sector or _crc(data[20:]) != crc or not 32 <= start <= _SECTOR - 56:
        raise FormatError("its label is not sound")
    raw = data[start : start + 32].decode("ascii", "replace")
    uuid = "-".join([raw[:6], *(raw[i : i + 4] for i in range(6, 26, 4)), raw[26:]])
    text, ranges = "", [(at, _SECTOR)]
    lists: list[list[tuple[int, int]]] = [[], []]
    which, position = 0, start + 40
    while which < 2 and position + 16 <= _SECTOR:
        offset, size = struct.unpack_from("<QQ", data, position)
        position += 16
        if offset == 0:
            which += 1
        else:
            lists[which].append((offset, size))
    best = -1
    for offset, size in lists[1][:2]:
        found, used = await _read_text(reader, offset, size)
        ranges += used
        sequence = re.search(r"\bseqno\s*=\s*(\d+)", found)
        if sequence is not None and int(sequence[1][:18]) > best:
            best, text = int(sequence[1][:18]), found
    return _Label(uuid, text, tuple(ranges))


async def _read_text(reader: RangeReader, start: int, size: int) -> tuple[str, list[tuple[int, int]]]:
    """The text in one metadata area, which is a ring, and the ranges that it was read from. Raises FormatError."""
    header = await reader.read(start, _MDA_HEADER)
    if header[4:20] != _MDA_MAGIC or _crc(header[4:]) != struct.unpack_from("<I", header, 0)[0]:
        raise FormatError("a header of its metadata is not sound")
    if struct.unpack_from("<Q", header, 32)[0] != size:
        raise FormatError("its label and its metadata disagree about the size")
    offset, length, crc = struct.unpack_from("<QQI", header, 40)
    ranges = [(start, _MDA_HEADER)]
    if not offset:
        return "", ranges
    if not _MDA_HEADER <= offset < size or length > size - _MDA_HEADER:
        raise FormatError("its metadata would lie outside of its area")
    first = min(length, size - offset)
    ranges += [(start + offset, first)] + ([(start + _MDA_HEADER, length - first)] if length > first else [])
    text = b"".join([await reader.read(at, count) for at, count in ranges[1:]])
    if _crc(text) != crc:
        raise FormatError("the checksum of its metadata is wrong")
    return text.rstrip(b"\0").decode("utf-8", "replace"), ranges


_TOKENS = re.compile(
    r'\s+|\#[^\n]*|(?P<string>"(?:[^"\\]|\\.)*")|(?P<number>-?\d+(?:\.\d+)?)(?![\w.+-])|(?P<word>[\w.+\-/@]+)|(?P<sign>[{}=\[\],])'
)


def parse_text(text: str) -> Section:
    """Read LVM's nested `key = value` text. Raises FormatError."""
    root: Section = {}
    stack = [root]
    tokens = _tokens(text)
    for kind, word in tokens:
        if kind == "sign" and word == "}":
            stack.pop()
            if not stack:
                raise FormatError("its metadata is unbalanced")
            continue
        if kind == "sign":
            raise FormatError("its metadata can't be parsed")
        sign = next(tokens, ("", ""))[1]
        if sign == "{":
            inner: Section = {}
            stack[-1][word] = inner
            stack.append(inner)
            if len(stack) > _DEPTH_MAX:
                raise FormatError("its metadata is nested too deep")
        elif sign == "=":
            stack[-1][word] = _value(tokens)
        else:
            raise FormatError("its metadata can't be parsed")
    if len(stack) != 1:
        raise FormatError("its metadata is unbalanced")
    return root


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    position = 0
    while position < len(text):
        match = _TOKENS.match(text, position)
        if match is None:
            raise FormatError("its metadata can't be parsed")
        position = match.end()
        if match.lastgroup is not None:
            yield match.lastgroup, match[0]


def _value(tokens: Iterator[tuple[str, str]]) -> Value:
    kind, word = next(tokens, ("", ""))
    if (kind, word) != ("sign", "["):
        return _scalar(kind, word)
    listed: list[str | int | float] = []
    for kind, word in tokens:
        if (kind, word) == ("sign", "]"):
            return listed
        if (kind, word) != ("sign", ","):
            listed.append(_scalar(kind, word))
    raise FormatError("its metadata is unbalanced")


def _scalar(kind: str, word: str) -> str | int | float:
    if kind == "string":
        return re.sub(r"\\(.)", r"\1", word[1:-1])
    if kind == "number" and len(word) <= 20:
        return float(word) if "." in word else int(word)
    raise FormatError("its metadata can't be parsed")


def _number(section: Section, name: str) -> int:
    found = section.get(name)
    if not isinstance(found, int) or not 0 <= found < 1 << 62:
        raise FormatError(f"its metadata has no sound {name}")
    return found


def _words(section: Section, name: str) -> set[str]:
    found = section.get(name, [])
    return {str(one) for one in found} if isinstance(found, list) else {str(found)}


def _sections(section: Section, name: str) -> dict[str, Section]:
    found = section.get(name, {})
    return {key: one for key, one in found.items() if isinstance(one, dict)} if isinstance(found, dict) else {}


def _group(text: str) -> tuple[str, int, str, Section]:
    """(id, sequence number, name, section) of the one volume group in a metadata text. Raises FormatError."""
    groups = [(name, one) for name, one in parse_text(text).items() if isinstance(one, dict)]
    if len(groups) != 1:
        raise FormatError("its metadata describes no volume group")
    name, group = groups[0]
    return str(group.get("id", "")), _number(group, "seqno"), name, group


# -- the group --------------------------------------------------------------------------------------------------------


def _mine(group: Section, labels: Sequence[_Label | None]) -> dict[int, str]:
    """Which members belong to the group: index to the name that its metadata gives them."""
    names = {str(one.get("id", "")): name for name, one in _sections(group, "physical_volumes").items()}
    return {index: names[one.uuid] for index, one in enumerate(labels) if one is not None and one.uuid in names}


async def _map_group(
    group_name: str,
    group: Section,
    members: Sequence[RangeReader],
    labels: Sequence[_Label | None],
    map_inside: MapInside,
) -> dict[int, UsedMap | Refusal]:
    mine = _mine(group, labels)
    if reason := _why_not(group):
        return {index: Refusal("lvm2", reason) for index in mine}
    extent = _number(group, "extent_size") * _SECTOR
    if not extent:
        raise FormatError("its extents have no size")
    described = _sections(group, "physical_volumes")
    places: dict[str, tuple[int, int, int]] = {}  # name: member, first extent at, extents
    ranges = {index: RangeSet(members[index].size) for index in mine}
    witnesses: dict[int, list[tuple[int, int]]] = {}
    for index, name in mine.items():
        start = _number(described[name], "pe_start") * _SECTOR
        count = _number(described[name], "pe_count")
        end = start + count * extent
        if end > members[index].size:
            raise FormatError("its extents reach behind the end of the partition")
        places[name] = (index, start, count)
        ranges[index].add(0, start)
        ranges[index].add(end, members[index].size - end)
        label = labels[index]
        witnesses[index] = list(label.text_ranges) if label is not None else []
    notes: dict[int, list[str]] = {index: [] for index in mine}
    for volume in _volumes(group, set(described), places, extent):
        here = {member for segment in volume.segments for member, _ in segment.stripes}
        size = volume.size
        answer: UsedMap | Refusal = Refusal("", volume.reason)
        logical = LogicalVolume(volume.name, size, tuple(volume.segments), tuple(members))
        if not volume.reason:
            answer = await map_inside(logical)
        if isinstance(answer, UsedMap):
            starts, stops = answer.starts, answer.starts + answer.lengths
            note = f"{answer.filesystem}, {answer.used_bytes} of {size} bytes used"
            for offset, length in answer.witness.ranges:
                for member, at, step in logical.places(offset, length):
                    witnesses[member].append((at, step))
        else:
            starts, stops = np.zeros(1, np.int64), np.array([size], np.int64)
            note = f"copied whole: {answer.reason}"
        _project(volume, starts, stops, ranges)
        for member in here:
            notes[member].append(f"{group_name}/{volume.name}: {note}")
    made: dict[int, UsedMap | Refusal] = {}
    for index, one in ranges.items():
        begins, lengths = one.finish()
        made[index] = UsedMap(
            filesystem="lvm2",
            size=members[index].size,
            starts=begins,
            lengths=lengths,
            unit=extent,
            units_used=-(-int(lengths.sum()) // extent),
            notes=tuple(notes[index]),
            witness=await take_witness(members[index], witnesses[index]),
        )
    return made


def _why_not(group: Section) -> str:
    """Why the metadata can't be trusted; empty where it can."""
    if "EXPORTED" in _words(group, "status") | _words(group, "flags"):
        return "its volume group is exported"
    if "PARTIAL" in _words(group, "status") | _words(group, "flags"):
        return "its volume group is incomplete"
    for name, one in _sections(group, "physical_volumes").items():
        if "MISSING" in _words(one, "status") | _words(one, "flags"):
            return f"the physical volume {name} of its group is missing"
    return ""


def _volumes(
    group: Section, known: set[str], places: dict[str, tuple[int, int, int]], extent: int
) -> Iterator[_Volume]:
    """Every logical volume with the segments that lie on members. Raises FormatError."""
    volumes = _sections(group, "logical_volumes")
    listed = {name: [one for one in volume.values() if isinstance(one, dict)] for name, volume in volumes.items()}
    referenced = {
        str(word)
        for segments in listed.values()
        for segment in segments
        if segment.get("type") != "striped"
        for value in segment.values()
        for word in (value if isinstance(value, list) else [value])
        if isinstance(word, str)
    }
    if direct := referenced & known:
        raise FormatError(f"a volume of an unknown kind lies on {min(direct)}")
    for name, volume in volumes.items():
        made = _Volume(name)
        status = _words(volume, "status")
        if not status <= _PLAIN_STATUS or "VISIBLE" not in status:
            made.reason = "it is a part of another volume, or is being changed"
        elif name in referenced:
            made.reason = "another volume is made of it"
        position = 0
        for segment in sorted(listed[name], key=lambda one: _number(one, "start_extent")):
            if segment.get("type") != "striped":
                made.reason = made.reason or f"it is of the type {segment.get('type')}"
                continue
            if _number(segment, "start_extent") != position:
                made.reason = made.reason or "its segments have gaps"
            position = _number(segment, "start_extent") + _number(segment, "extent_count")
            _add_segment(made, segment, places, known, extent)
        if not listed[name]:
            made.reason = made.reason or "it has no segments"
        yield made


def _add_segment(
    volume: _Volume, segment: Section, places: dict[str, tuple[int, int, int]], known: set[str], extent: int
) -> None:
    """Add a linear or striped segment; where a part of it is elsewhere, the parts that are here one by one."""
    count = _number(segment, "extent_count")
    listed = segment.get("stripes")
    stripes = listed if isinstance(listed, list) else []
    number = len(stripes) // 2
    if not number or number != _number(segment, "stripe_count") or count % number:
        raise FormatError("the stripes of a segment make no sense")
    each = count // number
    found: list[tuple[int, int]] = []
    for name, first in zip(stripes[::2], stripes[1::2], strict=True):
        if name not in known or not isinstance(first, int) or first < 0:
            volume.reason = volume.reason or "it lies on something that is no physical volume"
            continue
        place = places.get(str(name))
        if place is None:
            volume.reason = volume.reason or "it lies partly on another disk"
            continue
        member, start, extents = place
        if first + each > extents:
            raise FormatError("a segment lies outside of its physical volume")
        found.append((member, start + first * extent))
    offset = volume.size
    if len(found) == number:
        chunk = _number(segment, "stripe_size") * _SECTOR if number > 1 else count * extent
        if not count:
            return
        if chunk < 4096 or (number > 1 and (each * extent) % chunk):
            raise FormatError("the stripes of a segment make no sense")
        volume.segments.append(Segment(offset, count * extent, tuple(found), chunk))
        return
    for one in found:
        volume.segments.append(Segment(offset, each * extent, (one,), max(1, each * extent)))
        offset += each * extent


def _project(volume: _Volume, starts: Numbers, stops: Numbers, ranges: dict[int, RangeSet]) -> None:
    """Add a volume's used ranges to those of the members that it lies on."""
    for segment in volume.segments:
        first = int(np.searchsorted(stops, segment.offset, side="right"))
        last = int(np.searchsorted(starts, segment.offset + segment.length, side="left"))
        begins = np.clip(starts[first:last] - segment.offset, 0, segment.length)
        ends = np.clip(stops[first:last] - segment.offset, 0, segment.length)
        for column, (member, base) in enumerate(segment.stripes):
            ranges[member].add_many(segment.project(begins, column) + base, segment.project(ends, column) + base)
