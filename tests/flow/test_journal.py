"""The log of records: whatever is cut off or damaged, a reader sees a state that was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import PlanError
from pipeline.flow.journal import MAGIC, Record, RecordLog, parse

RECORDS = [Record(1, b"header"), Record(2, b""), Record(3, bytes(300)), Record(3, b"\xff" * 7)]


def write(path: Path, records: list[Record] = RECORDS) -> bytes:
    log = RecordLog.open(path)
    for record in records:
        log.append(record)
    log.close()
    return path.read_bytes()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    data = write(tmp_path / "log")
    assert parse(data) == (RECORDS, len(data))


def test_log_cut_at_any_byte_gives_the_records_before_the_cut(tmp_path: Path) -> None:
    data = write(tmp_path / "log")
    ends = [len(MAGIC)]
    for record in RECORDS:
        ends.append(ends[-1] + len(record.to_bytes()))
    for length in range(len(data)):
        whole = sum(1 for end in ends[1:] if end <= length)
        assert parse(data[:length])[0] == RECORDS[:whole], length


def test_log_cut_at_any_byte_can_be_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "log"
    data = write(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        log = RecordLog.open(path)
        found = log.found
        log.append(Record(9, b"next"))
        log.close()
        assert parse(path.read_bytes())[0] == [*found, Record(9, b"next")], length


def test_any_flipped_bit_ends_the_log_before_its_record(tmp_path: Path) -> None:
    data = write(tmp_path / "log")
    for index in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[index] ^= 1 << bit
            found, _ = parse(bytes(damaged))
            assert len(found) < len(RECORDS), (index, bit)
            assert found == RECORDS[: len(found)], (index, bit)


def test_second_process_is_told_that_the_export_is_running(tmp_path: Path) -> None:
    log = RecordLog.open(tmp_path / "log")
    script = "import pathlib, sys, pipeline.flow.journal as j; j.RecordLog.open(pathlib.Path(sys.argv[1]))"
    second = subprocess.run([sys.executable, "-c", script, str(log.path)], capture_output=True, text=True)
    assert second.returncode == 1
    assert "this export is running already" in second.stderr
    with pytest.raises(PlanError, match="running already"):
        RecordLog.open(log.path)
    log.close()
    RecordLog.open(log.path).close()


def test_log_stays_locked_while_it_is_rewritten(tmp_path: Path) -> None:
    log = RecordLog.open(tmp_path / "log")
    log.append(Record(1, bytes(1000)))
    log.rewrite(RECORDS[:2])
    with pytest.raises(PlanError, match="running already"):
        RecordLog.open(log.path)
    log.append(RECORDS[2])
    log.close()
    assert parse(log.path.read_bytes())[0] == RECORDS[:3]
    assert os.listdir(tmp_path) == ["log"]


def test_rewriting_that_fails_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RecordLog.open(tmp_path / "log")
    log.append(RECORDS[0])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.flow.journal.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        log.rewrite(RECORDS)
    log.append(RECORDS[1], durable=True)
    log.close()
    assert parse(log.path.read_bytes())[0] == RECORDS[:2]
    assert os.listdir(tmp_path) == ["log"]


def test_removed_log_leaves_nothing(tmp_path: Path) -> None:
    log = RecordLog.open(tmp_path / "deep" / "log")
    (tmp_path / "deep" / "log.new").write_bytes(b"of a compaction that was killed")
    log.remove()
    assert os.listdir(tmp_path / "deep") == []


def test_record_that_claims_to_be_huge_is_damage() -> None:
    data = MAGIC + b"\xff\xff\xff\xff\x01" + bytes(100)
    assert parse(data) == ([], len(MAGIC))
