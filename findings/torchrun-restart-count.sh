#!/usr/bin/env bash
# torch 2.13.0: after a restart TORCHELASTIC_RESTART_COUNT differs between the machines of a run.
#
# A worker fails on one of two nodes, and torchrun starts the workers of both again. The count is said to be the number
# of restarts of the worker group so far. On the node of the worker that failed it is 1; on the other it stays 0: there
# the restart is taken for a change of members. So the count names no attempt, as a prefix of keys in the store that
# both share, say: each would look for the other's keys where there are none.
#
# Seen: first start: restart count 0
#       first start: restart count 0
#       started again: restart count 0
#       started again: restart count 1
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment torch==2.13.0 numpy==2.4.6
cat > worker.py <<'PYTHON'
import os, sys, time
from pathlib import Path

count = os.environ["TORCHELASTIC_RESTART_COUNT"]
again = Path("failed").exists()
print(f"{'started again' if again else 'first start'}: restart count {count}", flush=True)
if not again:
    if os.environ["RANK"] == "1":
        time.sleep(5)  # until the other has started
        Path("failed").touch()
        sys.exit(1)
    time.sleep(120)  # torchrun ends it
PYTHON
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
meeting=(--rdzv-backend c10d --rdzv-endpoint "127.0.0.1:$port" --rdzv-id run)
for node in 1 2; do
    torchrun --nnodes 2 --nproc-per-node 1 "${meeting[@]}" --max-restarts 1 worker.py > "out-$node" 2> /dev/null &
done
wait
seen=$(sort out-1 out-2)
printf '%s\n' "$seen"
[[ $seen == "$(printf '%s\n' "first start: restart count "{0,0} "started again: restart count "{0,1})" ]]
