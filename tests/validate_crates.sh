#!/usr/bin/env bash
# Validates the repository's crate, and that of every experiment whose records are committed, against their profiles, in
# an environment of its own that is removed afterwards. Needs a network: the validator fetches the terms of the profiles.
# Run `make tables` before. What is only recommended is listed, and no error.
# PYTHON names the interpreter, of 3.10 or later.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check roc-validator==0.13.0
validate() {
    "$folder/venv/bin/rocrate-validator" --no-interactive --disable-color validate --no-paging --profile-identifier "$1" \
        --requirement-severity "$2" --output-format json --output-file "$folder/found.json" "$3" > /dev/null || true
    "$folder/venv/bin/python" - "$folder/found.json" "$@" <<'END'
import collections, json, sys

path, profile, severity, crate = sys.argv[1:]
issues = json.load(open(path))["issues"]
print(f"{crate}: {profile}, {severity}: {len(issues)} issues")
for (level, message), count in collections.Counter((i["severity"], i["message"]) for i in issues).most_common():
    print(f"    {count} x {level}: {message}")
sys.exit(any(issue["severity"] == "REQUIRED" for issue in issues))
END
    rm "$folder/found.json"
}

# Of the repository the files that are tracked: a clone has data and runs beside them, which are no part of it.
mkdir "$folder/repository"
git ls-files -z | xargs -0 cp --parents --target-directory "$folder/repository"
for profile in ro-crate-1.1 workflow-ro-crate-1.0 workflow-testing-ro-crate-0.1; do
    validate "$profile" recommended "$folder/repository"
done
for records in reports/*/records; do
    for profile in ro-crate-1.1 workflow-ro-crate-1.0 provenance-run-crate-0.5; do
        validate "$profile" recommended "$(dirname "$records")/crate"
    done
done
