"""What the best predictor of a generated stream reaches under protocol stream: no model can expect more.

`python tests/stream_ceiling.py` prints the least loss and HR@k of the last item of the records that are tested, as
steps/studies/stream_ceiling.py names them. `--dataset stream-small` is of the small one. Not collected by pytest.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from steps.common import params  # noqa: E402
from steps.data.generators.stream import Stream  # noqa: E402
from steps.studies.stream_ceiling import CUTS, KNOWN, expected, least_loss  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="stream")
    settings = dict(params.entry("datasets", parser.parse_args().dataset, ROOT / "params")["synthesize"])
    settings.pop("form")
    stream = Stream(**settings)
    tested = stream.records - stream.records // 10, stream.records
    print(f"loss of {KNOWN!r}: {least_loss(stream, *tested):.4f} nats")
    for name, means in expected(stream, *tested).items():
        print(name, "  ".join(f"HR@{k} {mean:.4f}" for k, mean in zip(CUTS, means, strict=True)))


if __name__ == "__main__":
    main()
