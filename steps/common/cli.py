"""One way for every step to read its arguments and to fail."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout


class StepError(Exception):
    """A failure the user can correct: what is wrong, where, and what to do, in one line."""


def run_step(
    name: str,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    main: Callable[[argparse.Namespace], None],
    argv: list[str] | None = None,
    says: Callable[[], bool] = lambda: True,
) -> None:
    """Run `main` with the arguments of the step `name`.

    Any failure becomes one line on stderr and exit code 1; `--debug` shows the stack trace instead. says: asked where
    this process ends so, whether it is to say it; of several that fail alike one is.
    """
    parser = argparse.ArgumentParser(prog=f"python -m steps.{name}", description=description)
    add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the stack trace of a failure")
    args = _parsed(parser, argv, says)
    try:
        main(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not says():
            sys.exit(1)
        if args.debug:
            raise
        print(f"{name}: {' '.join(one_line(error).split())}", file=sys.stderr)
        sys.exit(1)


def _parsed(parser: argparse.ArgumentParser, argv: list[str] | None, says: Callable[[], bool]) -> argparse.Namespace:
    """The arguments; where there are none the parser prints an error or its help, and exits."""
    printed, failed = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(failed):
            return parser.parse_args(argv)
    except SystemExit:
        if says():
            print(printed.getvalue(), end="")
            print(failed.getvalue(), end="", file=sys.stderr)
        raise


def one_line(error: Exception) -> str:
    """What failed, for the user: an error of a file names the file, an unexpected one its kind."""
    if isinstance(error, StepError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return f"{type(error).__name__}: {error} (run again with --debug for the stack trace)"


def raise_failures(failures: dict[str, Exception], attempted: int) -> None:
    """Raise StepError that lists, in one line, the runs that failed out of so many; nothing if none did."""
    if not failures:
        return
    named = [one_line(error) if attempted == 1 else f"{run}: {one_line(error)}" for run, error in failures.items()]
    count = f"{len(failures)} of {attempted} runs failed: " if attempted > 1 else ""
    raise StepError(count + "; ".join(named)) from ExceptionGroup("runs that failed", list(failures.values()))
