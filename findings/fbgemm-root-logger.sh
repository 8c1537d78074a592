#!/usr/bin/env bash
# fbgemm-gpu-cpu 1.8.0 with torch 2.13.0: importing fbgemm_gpu attaches a handler to Python's root logger.
#
# Its modules log by `logging.info`, which calls `logging.basicConfig` where the root logger has no handler. From then on
# an application's own `logging.basicConfig(...)` does nothing, and its format and level are lost.
#
# Seen: handlers before: [], after: [<StreamHandler <stderr> (NOTSET)>]
#       the application's level INFO is not set: WARNING
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment torch==2.13.0 fbgemm-gpu-cpu==1.8.0 numpy==2.4.6
python - <<'PYTHON'
import logging

import torch

root = logging.getLogger()
before = list(root.handlers)
import fbgemm_gpu

print(f"handlers before: {before}, after: {root.handlers}")
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
print(f"the application's level INFO is not set: {logging.getLevelName(root.level)}")
assert not before
assert root.handlers, "changed: the root logger has no handler"
assert root.level == logging.WARNING, "changed: the application's basicConfig counts"
PYTHON
