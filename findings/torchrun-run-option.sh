#!/usr/bin/env bash
# torch 2.13.0: torchrun refuses a script's own option `--run`, although it stands behind the script.
#
# Its help says that what follows the script are the script's arguments. But argparse looks for options in the whole line
# first, and takes `--run` for an abbreviation of torchrun's `--run-path`. Behind `--` it is handed on:
# `torchrun -m -- script --run x`.
#
# Seen: without --: torchrun: error: ambiguous option: --run could match --run-path, --run_path
#       with --: the script's arguments: ['--run', 'x']
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment torch==2.13.0 numpy==2.4.6
echo 'import sys; print("the script'"'"'s arguments:", sys.argv[1:])' > script.py
try() { torchrun --standalone --nproc-per-node 1 "$@" script --run x 2>&1 | grep -E "ambiguous|arguments:"; }
without=$(try -m) with=$(try -m --)
echo "without --: $without"
echo "with --: $with"
[[ $without == *"ambiguous option: --run could match --run-path"* ]]
[[ $with == "the script's arguments: ['--run', 'x']" ]]
