#!/usr/bin/env bash
# Tests of kernels and steps with the newest torch and triton, in an environment of their own that is removed afterwards.
# Usage: tests/newest.sh [torch's version [triton's version]], such as: tests/newest.sh '2.15.*' '3.9.*'
# PYTHON names the interpreter, of 3.11 or 3.12. All else comes in the versions of constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
torch=${1:-2.15.*} triton=${2:-3.9.*}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/venv"
python=$folder/venv/bin/python
"$python" - > "$folder/wanted.txt" <<'END'
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
for name in [*project["dependencies"], *extras["reproduce"], *extras["dev"]]:
    if name.split(">")[0] not in ("torch", "triton") and not name.startswith(project["name"]):
        print(name)
END
# These come with torch and triton in whatever versions they want.
grep -viE '^(torch|triton|fbgemm[-_]gpu.*|nvidia.*|sympy|setuptools)==' constraints.txt > "$folder/constraints.txt"
"$python" -m pip install --quiet --disable-pip-version-check -c "$folder/constraints.txt" \
    "torch==$torch" "triton==$triton" -r "$folder/wanted.txt"

# No release may be built for this torch: such a one is left out, and steps and kernels use torch alone.
if "$python" -m pip install --quiet --disable-pip-version-check --no-deps fbgemm-gpu-cpu &&
    "$python" -c "import fbgemm_gpu" > /dev/null 2>&1; then
    echo "fbgemm-gpu-cpu loads with this torch, and is tested"
else
    "$python" -m pip uninstall --quiet --yes fbgemm-gpu-cpu
    echo "fbgemm-gpu-cpu does not load with this torch: its tests are skipped"
fi
"$python" -c "import numpy, torch, triton; print('torch', torch.__version__, 'triton', triton.__version__, 'numpy', numpy.__version__)"
# The doctor wants the pinned set, which this is not.
PYTHONPATH=$PWD "$python" -m pytest tests/kernels tests/steps --ignore tests/steps/test_doctor.py
