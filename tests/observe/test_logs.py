"""What is logged, how loud, and where."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest

from pipeline import events
from pipeline.errors import ConfigError
from pipeline.events import Event, event_type
from pipeline.observe.logs import level_of, open_log, stderr_log
from tests.commands.conftest import sample

RETRY = events.RetryScheduled(stage="write.s3", operation="put_part", attempt=2, wait_s=1.6, reason="503 SlowDown")
FAILED = events.RunFailed(error="dead", hint="", exit_code=1)
SEALED = events.ImageSealed(uri="s3://a/b", size_bytes=7)


def every_event() -> list[Event]:
    """One of each kind, with made-up values."""
    made: list[Event] = []
    for kind in Event.__subclasses__():
        kinds = typing.get_type_hints(kind)
        values: dict[str, Any] = {
            item.name: {int: 1, float: 1.0, str: "x"}.get(kinds[item.name], ())
            for item in dataclasses.fields(kind)
            if item.default_factory is dataclasses.MISSING
        }
        made.append(kind(**values))
    return made


def logged(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_event_is_a_json_line_with_type_level_and_time(tmp_path: Path) -> None:
    log = open_log(tmp_path / "log", "debug")
    for event in every_event():
        log(event)
    log.close()
    lines = logged(tmp_path / "log")
    assert [line["event"] for line in lines] == [event_type(event) for event in every_event()]
    assert all(line["level"] in ("debug", "info", "warning", "error") and line["timestamp"] for line in lines)


def test_fields_travel_into_the_log(tmp_path: Path) -> None:
    log = open_log(tmp_path / "log", "info")
    log(RETRY)
    log.close()
    [line] = logged(tmp_path / "log")
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "retry_scheduled", "level": "warning", **dataclasses.asdict(RETRY)}


@pytest.mark.parametrize(
    "level, kept",
    [
        ("debug", ["progress_sampled", "image_sealed", "retry_scheduled", "run_failed"]),
        ("info", ["image_sealed", "retry_scheduled", "run_failed"]),
        ("warning", ["retry_scheduled", "run_failed"]),
        ("error", ["run_failed"]),
    ],
)
def test_the_level_drops_what_is_quieter(tmp_path: Path, level: Any, kept: list[str]) -> None:
    log = open_log(tmp_path / "log", level)
    for event in (sample(0, 0), SEALED, RETRY, FAILED):
        log(event)
    log.close()
    assert [line["event"] for line in logged(tmp_path / "log")] == kept


def test_a_verdict_is_as_loud_as_it_is_bad() -> None:
    levels = [
        level_of(events.ImageVerified(stage="verify.receipt", state=state, coverage=1, detail=""))
        for state in ("identical", "proven", "unproven", "unknown", "differs", "disproven")
    ]
    assert levels == ["info", "info", "warning", "warning", "error", "error"]


def test_a_log_is_appended_to(tmp_path: Path) -> None:
    for _ in range(2):
        log = open_log(tmp_path / "log", "info")
        log(SEALED)
        log.close()
    assert len(logged(tmp_path / "log")) == 2


def test_a_log_that_cannot_be_opened_names_who_asked_for_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[observe\] log_file: .* is a directory|can't be opened: is a directory"):
        open_log(tmp_path, "info", asked_by="[observe] log_file")


def test_a_full_disk_under_the_log_is_told_once_and_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(Path("/dev/full"), "info")
    for _ in range(3):
        log(SEALED)
    log.close()  # here too, for the interpreter still holds the line that did not fit
    assert capsys.readouterr().err == "the log /dev/full ends here: No space left on device\n"


def test_stderr_gets_warnings_as_keys_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    log = stderr_log("info")
    for event in (sample(0, 0), SEALED, RETRY, FAILED):
        log(event)
    log.close()
    assert capsys.readouterr().err == (
        'warning: retry_scheduled stage=write.s3 operation=put_part attempt=2 wait_s=1.6 reason="503 SlowDown"\n'
    )


def test_stderr_gets_everything_at_debug_and_nothing_but_errors_at_error(capsys: pytest.CaptureFixture[str]) -> None:
    loud, quiet = stderr_log("debug"), stderr_log("error")
    for event in (sample(0, 0), SEALED, RETRY):
        loud(event)
        quiet(event)
    told = [line.split()[:2] for line in capsys.readouterr().err.splitlines()]
    assert told == [["debug:", "progress_sampled"], ["info:", "image_sealed"], ["warning:", "retry_scheduled"]]


def test_an_unforeseen_error_is_logged_with_its_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path / "log", "error")
    for one in (log, stderr_log("info")):
        try:
            raise ZeroDivisionError("x")
        except ZeroDivisionError as error:
            one.failure(error)
    log.close()
    [line] = logged(tmp_path / "log")
    assert (line["event"], line["error"]) == ("internal_error", "ZeroDivisionError: x")
    assert "Traceback" in line["traceback"]
    assert "Traceback" in capsys.readouterr().err


def test_event_types_are_written_in_snake_case() -> None:
    assert event_type(RETRY) == "retry_scheduled"
    assert event_type(sample(0, 0)) == "progress_sampled"
