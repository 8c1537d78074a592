"""Preprocess 100 million generated rows under 3 GB of memory; outside CI, as it takes five minutes and 12 GB of disk.

`python tests/large_log.py`: the numbers are those of study `data-growth`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from steps.common import studies
from steps.studies import data_growth

ROWS, LIMIT = 100_000_000, 3_000_000_000  # bytes


def main() -> None:
    plan = studies.plan("data-growth")
    case = next(case for case in data_growth.cases(plan) if case["rows"] == ROWS)
    found = {row["metric"]: row["value"] for row in data_growth.measure(case, plan, Path())}
    print(f"{ROWS:,} rows: {found['total']:.0f} s, peak {found['peak'] / 1e9:.2f} GB")
    if found["peak"] > LIMIT:
        sys.exit(f"more than {LIMIT / 1e9:.0f} GB")


if __name__ == "__main__":
    main()
