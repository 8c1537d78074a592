"""Make the large generated archives, and compare their SHA-256 with those of params/datasets.yaml.

`python tests/full_size.py` makes one after the other in a temporary folder (4 GB, two minutes in all; `--folder` keeps
them), and prints seconds and the peak memory so far. Not collected by pytest, as it takes minutes.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from steps.common import params  # noqa: E402
from steps.common.files import atomic_path, sha256  # noqa: E402
from steps.data.generators import generator  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the archives stay")
    args = parser.parse_args()
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, dataset in params.load("datasets", ROOT / "params").items():
            if "synthesize" not in dataset:
                continue
            path, start = (args.folder or Path(temporary)) / dataset["source"]["file"], time.monotonic()
            with atomic_path(path) as partial:
                generator(**dataset["synthesize"]).write(partial)
            seconds, peak = time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            found, expected = sha256(path), dataset["source"]["sha256"]
            wrong += [name] if found != expected else []
            print(f"{name}: {path.stat().st_size} bytes, {seconds:.1f} s, {peak:.0f} MB, {found}", flush=True)
    sys.exit(f"not as in params/datasets.yaml: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
