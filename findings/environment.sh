# Sourced by the scripts: `environment PACKAGE==VERSION ...` makes `python` one that has these packages alone, in a
# temporary folder that goes when the script ends. PYTHON names another Python to start from.
set -euo pipefail

environment() {
    local folder
    folder=$(mktemp -d)
    trap "rm -rf '$folder'" EXIT
    "${PYTHON:-python3}" -m venv "$folder"
    export PATH="$folder/bin:$PATH"
    unset PYTHONPATH
    cd "$folder"
    python -m pip install --quiet --disable-pip-version-check "$@"
}
