"""Kill an orchestrator at random times, again and again: the same command has to go on and end with the same results.

`python tests/kill_runs.py --orchestrator snakemake --kills 30 --folder /tmp/kills` copies the project there, adds a
small experiment of its own, and runs it once unbroken. Then, in rounds from scratch: the documented command, SIGKILL
after a random time (to the orchestrator alone, whose jobs then live on, or to all of its processes, by turns), the same
command again, killed again, up to five times, and the command once more, which has to end as the unbroken one did.
Not collected by pytest, as it takes minutes.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from steps.common import yaml_files  # noqa: E402
from steps.common.files import write_json  # noqa: E402
from steps.common.provenance import commit  # noqa: E402
from steps.data.generators.demo import synthesize  # noqa: E402

NAME = "kills"
#: A killed DVC may leave half of its rwlock file, which it then refuses to read.
COMMANDS = {
    "snakemake": ["snakemake", "--cores", "2", NAME],
    "dvc": ["sh", "-c", f"rm -f .dvc/tmp/rwlock && exec dvc repro workflow/local/dvc.yaml:track@{NAME}"],
}
MADE = ("data", "runs", "logs", f"reports/{NAME}", "mlflow.db", "mlartifacts", ".snakemake", ".dvc/cache", ".dvc/tmp")
SETTINGS = {"seed": 1, "users": 60, "movies": 120, "genres": 5, "mean_ratings": 30}
#: What differs between equal runs: times, and how a run came to be.
VARYING = {"seconds", "train_seconds", "step_ms", "steps_per_second", "peak_bytes", "commit", "training_sha256"}
VARYING |= {"started", "ended", "cpu_seconds", "resident_peak_bytes"}
VARYING |= {"history_sha256"}  # of seconds too
_IN_A_ROUND = 5
LOG = "killed.log"


def copy_project(folder: Path) -> None:
    """The tracked files, as a repository of their own, with the small experiment in params/local."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if not name.startswith("reports/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    digest = hashlib.sha256(synthesize(**SETTINGS)).hexdigest()
    entry = yaml_files.read(ROOT / "params/datasets.yaml")["demo"] | {
        "title": "Small",
        "synthesize": {"form": "demo"} | SETTINGS,
        "source": {"file": f"{NAME}.zip", "sha256": digest, "mirrors": ["data/synthetic"]},
    }
    entry["training"] |= {"epochs": 3}
    experiment = {
        "title": "Killed again and again",
        "datasets": [NAME],
        "models": ["hstu"],
        "protocols": ["strict"],
        "seeds": [0],
    }
    local = folder / "params/local"
    (local / "experiments").mkdir(parents=True)
    (local / "datasets.yaml").write_text(yaml_files.dump({NAME: entry}))
    (local / "experiments" / f"{NAME}.yaml").write_text(yaml_files.dump(experiment))
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "t"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    subprocess.run([sys.executable, "-m", "workflow.generate"], cwd=folder, env=environment(folder), check=True)


def environment(folder: Path) -> dict[str, str]:
    """The commands of this Python, the copy's code, and numbers that do not depend on chance."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "true"}


def clean(folder: Path) -> None:
    """Remove all that a run made."""
    for name in MADE:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
    for path in folder.rglob("dvc.lock"):
        path.unlink()


def without_times(content: Any) -> Any:
    """JSON without what differs between equal runs."""
    if isinstance(content, dict):
        kept = {key: value for key, value in content.items() if key.split("/")[-1] not in VARYING}
        return {key: without_times(value) for key, value in kept.items()}
    return content


def results(folder: Path) -> dict[str, str]:
    """A hash of every result that has to be equal, by its path."""
    found = {}
    for path in sorted([*(folder / "runs").rglob("*"), *(folder / f"reports/{NAME}").rglob("*")]):
        if path.suffix == ".safetensors" and "resume" not in path.parts:
            tensors = {key: value.tobytes().hex() for key, value in sorted(load_file(path).items())}
            content = json.dumps(tensors)
        elif path.name == "metrics.json":
            content = json.dumps(without_times(json.loads(path.read_text())), sort_keys=True)
        elif path.name in ("config.json", "table.md", "table.csv", "comparisons.csv", "comparisons.md", "claims.md"):
            content = path.read_text()
        else:
            continue
        found[str(path.relative_to(folder))] = hashlib.sha256(content.encode()).hexdigest()
    return found


def run(folder: Path, command: list[str]) -> int:
    """The exit code of the command."""
    with (folder / LOG).open("w") as log:
        done = subprocess.run(
            command, cwd=folder, env=environment(folder), stdout=log, stderr=subprocess.STDOUT, check=False
        )
    return done.returncode


def said(folder: Path) -> str:
    """The end of what the last command printed."""
    return (folder / LOG).read_text()[-3000:]


def kill(folder: Path, command: list[str], after: float, alone: bool) -> int | None:
    """Start the command in a session of its own and kill it; its exit code if it ended before."""
    with (folder / LOG).open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(folder), start_new_session=True, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        process.wait(timeout=after)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL) if alone else os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode if process.returncode >= 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orchestrator", required=True, choices=list(COMMANDS))
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--folder", required=True, type=Path, help="must not exist")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    command, draw = COMMANDS[args.orchestrator], random.Random(args.seed)
    folder = args.folder.resolve() / "project"
    folder.mkdir(parents=True)
    copy_project(folder)
    tested = commit()
    start = time.monotonic()
    code: int | None = run(folder, command)
    whole = time.monotonic() - start
    if code:
        sys.exit(f"the unbroken run ended with {code}:\n{said(folder)}")
    expected = results(folder)
    print(f"unbroken: {whole:.1f} s, {len(expected)} results", flush=True)
    rounds: list[dict[str, Any]] = []
    done = 0
    while done < args.kills:
        clean(folder)
        kills: list[str] = []
        code = None
        while code is None and len(kills) < min(_IN_A_ROUND, args.kills - done):
            after, alone = draw.uniform(0.5, whole / 2), (done + len(kills)) % 2 == 0
            start = time.monotonic()
            code = kill(folder, command, after, alone)
            if code is not None and not kills:  # the machine is less busy than it was
                whole = min(whole, time.monotonic() - start)
            if code is None:
                kills.append(f"{'the orchestrator alone' if alone else 'all its processes'} after {after:.1f} s")
        if not code:  # killed, or done before the next kill
            code = run(folder, command)
        found = results(folder)
        differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        rounds.append({"kills": kills, "code": code, "differ": differ})
        done += len(kills)
        print(f"{done}: {'; '.join(kills)}: {f'{code} {differ}' if code or differ else 'as unbroken'}", flush=True)
        if code:
            print(said(folder), flush=True)
    good = sum(len(one["kills"]) for one in rounds if one["code"] == 0 and not one["differ"])
    result = {"orchestrator": args.orchestrator, "commit": tested, "unbroken_seconds": round(whole, 1)}
    write_json(args.folder / "kills.json", result | {"good": good, "kills": done, "rounds": rounds})
    print(f"{good} of {done}")
    sys.exit(good != done)


if __name__ == "__main__":
    main()
