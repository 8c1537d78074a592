"""Put result tables into a README, between `<!-- table: EXPERIMENT -->` and `<!-- end -->`."""

import argparse
import re
from pathlib import Path

from steps.common.cli import StepError, run_step
from steps.common.files import write_text

_BLOCK = re.compile(r"(?<=<!-- table: )([a-z0-9-]+)( -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)


def insert_tables(text: str, reports: Path) -> str:
    """`text` with every marked block holding the tables of `reports/<experiment>/table.md`."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}{match[2]}\n{_tables(reports / match[1] / 'table.md')}\n"

    return _BLOCK.sub(block, text)


def _tables(path: Path) -> str:
    """The titles and tables of a report, without its notes."""
    if not path.is_file():
        raise StepError(f"{path} does not exist; run tabulate first")
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            lines += ["", f"**{line.removeprefix('## ')}**", ""]
        elif line.startswith("|"):
            lines.append(line)
    return "\n".join(lines).strip() + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--reports", type=Path, default=Path("reports"))


def main(args: argparse.Namespace) -> None:
    write_text(args.readme, insert_tables(args.readme.read_text(encoding="utf-8"), args.reports))


if __name__ == "__main__":
    run_step("readme", __doc__, add_arguments, main)
