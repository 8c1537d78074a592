#!/usr/bin/env bash
# torch 2.13.0 on a CPU: the ten best of `topk(10)` need not be among the 200 best of `topk(200)`.
#
# Where scores are equal, topk takes other columns for another k: of 4,000 equal scores the first ones for k = 10, and
# some from the middle for k = 200, none of them twice. A list of ten recommendations is then no beginning of the list
# of 200 from the same scores, and metrics of a model whose scores tie depend on how many were asked for.
#
# Seen: of the columns of topk(10), 0 are in topk(200); a stable sort: 10
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment torch==2.13.0 numpy==2.4.6
python - <<'PYTHON'
import torch

torch.set_num_threads(1)
scores = torch.zeros(4000)
few, many = (set(scores.topk(k).indices.tolist()) for k in (10, 200))
order = scores.sort(descending=True, stable=True).indices
stable = set(order[:10].tolist()) & set(order[:200].tolist())
print(f"of the columns of topk(10), {len(few & many)} are in topk(200); a stable sort: {len(stable)}")
assert len(few) == 10 and len(many) == 200
assert not few <= many, "changed: the ten best are among the 200 best"
PYTHON
