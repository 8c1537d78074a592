"""One way for every step to read its arguments and to fail."""

import argparse
import sys
from collections.abc import Callable


class StepError(Exception):
    """A failure the user can mend: what is wrong, where, and what to do, in one line."""


def run_step(
    name: str,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    main: Callable[[argparse.Namespace], None],
    argv: list[str] | None = None,
) -> None:
    """Run `main` with the arguments of the step `name`.

    Any failure becomes one line on stderr and exit code 1; `--debug` shows the stack trace instead.
    """
    parser = argparse.ArgumentParser(prog=f"python -m steps.{name}", description=description)
    add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the stack trace of a failure")
    args = parser.parse_args(argv)
    try:
        main(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if args.debug:
            raise
        if isinstance(error, StepError):
            message = str(error)
        else:
            message = f"{type(error).__name__}: {error} (run again with --debug for the stack trace)"
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(1)
