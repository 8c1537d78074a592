#!/usr/bin/env bash
# torch 2.13.0: torchrun keeps its store when it starts processes again, and a connection to it serves one thread.
#
# The comment in torch/distributed/rendezvous.py says that each attempt has a new store. It has that of the attempt
# before, with all its keys. And a thread that waits in a TCPStore keeps others from using the same connection: a thread
# that is to end the process, say, and says so in the store first.
#
# Seen: attempt 0: key there: False
#       attempt 1: key there: True
#       another thread's add took 3 s
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment torch==2.13.0 numpy==2.4.6
cat > worker.py <<'PYTHON'
import os, sys
from torch.distributed.rendezvous import rendezvous

store, _, _ = next(rendezvous("env://"))
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
print(f"attempt {attempt}: key there: {store.check(['key'])}", flush=True)
store.set("key", "")
sys.exit(attempt == "0")
PYTHON
cat > threads.py <<'PYTHON'
import threading, time
from datetime import timedelta
from torch.distributed import TCPStore

server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
client = TCPStore("127.0.0.1", server.port, is_master=False)


def wait():
    try:
        client.wait(["never"], timedelta(seconds=3.5))
    except RuntimeError:
        pass


thread = threading.Thread(target=wait)
thread.start()
time.sleep(0.5)
start = time.monotonic()
client.add("count", 1)
print(f"another thread's add took {round(time.monotonic() - start)} s", flush=True)
thread.join()
PYTHON
attempts=$(torchrun --standalone --max-restarts 1 --nproc-per-node 1 worker.py 2>/dev/null)
took=$(python threads.py 2>/dev/null)
printf '%s\n' "$attempts" "$took"
[[ $attempts == "attempt 0: key there: False"$'\n'"attempt 1: key there: True" ]]
[[ $took == "another thread's add took 3 s" ]]
