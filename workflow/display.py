"""What Snakemake prints: under `--quiet` a line a step, and a clear end where it is interrupted.

Snakemake tells what it does by records of Python's logging, with an event each. Here is a filter of these records.
"""

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import Any

from snakemake.settings.enums import Quietness
from snakemake_interface_logger_plugins.common import LogEvent

_AGAIN = "snakemake: interrupted; run the same command again, it goes on from what is done"
#: What Snakemake says besides of a failed command: where in a rule it stands, and that something failed.
_REPEATED = (
    "CalledProcessError in file",
    "Exiting because a job execution failed",
    "At least one job did not complete",
)
_WORTH = "Nothing to be done"


class Display(logging.Filter):
    """Lets through what a person wants to read, in fewer words.

    quiet: what `--quiet` leaves out. With `rules`, each finished step is one line; with `progress` too, none. Failures
    and warnings always show. dry: whether nothing will run, where the plan itself is what one wants to read.
    """

    def __init__(self, quiet: Collection[Quietness], dry: Callable[[], bool]) -> None:
        super().__init__()
        self.brief = Quietness.RULES in quiet
        self.lines = self.brief and Quietness.PROGRESS not in quiet
        self.dry = dry
        self.interrupted = False
        self._begun: dict[int, tuple[str, float]] = {}
        self._done, self._total = 0, 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record shows; its text may be another afterwards."""
        if self.interrupted:  # what follows speaks of the failure of every running step
            return False
        if not self.brief or self.dry():
            return True
        told: dict[str, Any] = record.__dict__
        event = told.get("event")
        if event == LogEvent.JOB_ERROR:
            step, _ = self._begun.get(told["jobid"], (told["rule_name"], 0.0))
            return _say(record, failure(step, told["log"]))
        if record.levelno >= logging.WARNING:
            text = record.getMessage().strip()
            return bool(text) and not any(words in text for words in _REPEATED)
        if event == LogEvent.JOB_INFO:
            step = (
                f"{told['rule_name']} {'/'.join(told['wildcards'].values())}".strip()
            )  # train demo/demo/hstu/strict/0
            self._begun[told["jobid"]] = step, time.monotonic()
        if event == LogEvent.RUN_INFO and self.lines:
            steps = {rule: count for rule, count in told["stats"].items() if rule != "total"}
            self._total = sum(steps.values())
            counted = ", ".join(f"{count} {rule}" if count > 1 else rule for rule, count in steps.items())
            return _say(record, f"{self._total} steps: {counted}. What they print goes to logs/.")
        if event == LogEvent.JOB_FINISHED and self.lines:
            self._done += 1
            step, began = self._begun.pop(told["job_id"], ("", 0.0))
            took = f"  {time.monotonic() - began:.1f} s" if step else ""
            place = f"{self._done:{len(str(self._total))}}/{self._total}"
            return bool(step) and _say(record, f"{place}  {step}{took}")
        return event is None and record.getMessage().startswith(_WORTH)

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """What Ctrl-C does: the first lets Snakemake stop its steps, the next stops Snakemake."""
        while frame is not None:
            if frame.f_code.co_name == "emit":  # Snakemake prints, and ignores whatever is raised there
                threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
                return
            frame = frame.f_back
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("snakemake: interrupted; stopping what runs", file=sys.stderr, flush=True)
        atexit.register(print, _AGAIN, file=sys.stderr)
        sys.exit(130)  # while steps run, Snakemake catches this and waits for them


def failure(step: str, logs: list[str]) -> str:
    """One line: what the step said last, and where all that it said stands."""
    path = Path(logs[0]) if logs else None
    said = path.read_text(encoding="utf-8", errors="replace").split("\n") if path and path.is_file() else []
    last = next(filter(None, map(str.strip, reversed(said))), "it printed nothing")
    return f"{step} failed: {last} (log: {path})"


def _say(record: logging.LogRecord, text: str) -> bool:
    """Make the record a plain message: Snakemake's own filter and format go by its event."""
    record.msg, record.args = text, ()
    del record.__dict__["event"]
    return True
