"""How a process of ours writes its log: a line for each event on stderr, as text or as a JSON object."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any, Literal

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
FIELDS = "fields"  # the attribute of a log record that holds more than its message: names and values
# Characters that end a line or steer a terminal, each as it is written in a string. Whoever can have one of them logged
# could else write lines of his own.
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
_IN_TEXT = {code: repr(chr(code))[1:-1] for code in _CONTROLS}
_IN_JSON = {code: f"\\u{code:04x}" for code in _CONTROLS}


class TextLines(logging.Formatter):
    """The event's own fields stand behind its message, as name=value, those left out that say nothing."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s {process} %(name)s %(levelname)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = getattr(record, FIELDS, {})
        words = [f"{name}={_word(value)}" for name, value in fields.items() if value not in (None, "", [])]
        return " ".join([super().formatMessage(record), *words]).translate(_IN_TEXT)


def _word(value: object) -> object:
    if value is True or value is False:
        return "yes" if value else "no"
    return ",".join(value) if isinstance(value, list) else value


class JsonLines(logging.Formatter):
    """One object for each event: `time` in UTC, `level`, `process`, `logger`, `message`, `error` with its traceback,
    and the event's own fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)
        said |= getattr(record, FIELDS, {})
        return json.dumps(said, ensure_ascii=False, default=str).translate(_IN_JSON)


class _Lines(logging.StreamHandler):  # type: ignore[type-arg]  # it takes none in Python 3.10
    """A handler that is ours."""


def set_up_logs(process: str, form: LogFormat, level: LogLevel, logger: str = "") -> None:
    """For a process that is ours, or, with a logger's name, for the part of it that is: everything at `level` and above
    goes to stderr. Again in the same process it takes the place of what was before; where somebody else has set the
    logger up, it is left alone."""
    set_up = logging.getLogger(logger or None)
    ours = [handler for handler in set_up.handlers if isinstance(handler, _Lines)]
    if len(ours) < len(set_up.handlers):
        return
    for handler in ours:
        set_up.removeHandler(handler)
    new = _Lines(sys.stderr)
    new.setFormatter(JsonLines(process) if form == "json" else TextLines(process))
    set_up.addHandler(new)
    set_up.propagate = not logger
    set_up.setLevel(level.upper())
