"""Kill an orchestrator at random times, again and again: the same command has to go on and end with the same results.

`python tests/kill_runs.py --orchestrator snakemake --kills 30 --folder /tmp/kills` copies the project there, adds a
small experiment of its own, runs it once unbroken, and then for every kill from scratch: the documented command,
SIGKILL after a random time (to the orchestrator alone, whose jobs then live on, or to all of its processes, by turns),
and the command once more. Not collected by pytest, as it takes minutes.
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
NAME = "kills"
COMMANDS = {
    "snakemake": ["snakemake", "--cores", "2", NAME],
    "dvc": ["dvc", "repro", f"workflow/dvc/local/{NAME}/dvc.yaml"],
}
MADE = ("data", "runs", "logs", f"reports/{NAME}", "mlflow.db", "mlartifacts", ".snakemake", ".dvc/cache", ".dvc/tmp")
SETTINGS = {"seed": 1, "users": 60, "movies": 120, "genres": 5, "mean_ratings": 30}
#: What differs between equal runs: times, and how a run came to be.
VARYING = {"seconds", "train_seconds", "step_ms", "steps_per_second", "peak_bytes", "commit", "training_sha256"}
VARYING |= {"history_sha256"}  # of seconds too


def copy_project(folder: Path) -> None:
    """The tracked files, as a repository of their own, with the small experiment in params/local."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if not name.startswith("reports/") and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    sys.path.insert(0, str(folder))
    from steps.common import yaml_files
    from steps.synthesize import synthesize

    digest = hashlib.sha256(synthesize(**SETTINGS)).hexdigest()
    entry = yaml_files.read(ROOT / "params/datasets.yaml")["demo"] | {
        "title": "Small",
        "synthesize": SETTINGS,
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
    subprocess.run([sys.executable, "workflow/dvc/generate.py"], cwd=folder, env=environment(folder), check=True)


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


def run(folder: Path, command: list[str]) -> tuple[int, str]:
    """The exit code and the output of the command."""
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def kill(folder: Path, command: list[str], after: float, alone: bool) -> bool:
    """Start the command in a session of its own and kill it; whether it was still running."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(folder),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        process.wait(timeout=after)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL) if alone else os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


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
    start = time.monotonic()
    code, output = run(folder, command)
    whole = time.monotonic() - start
    if code:
        sys.exit(f"the unbroken run ended with {code}:\n{output[-3000:]}")
    expected = results(folder)
    print(f"unbroken: {whole:.1f} s, {len(expected)} results", flush=True)
    kills: list[dict[str, Any]] = []
    for number in range(args.kills):
        alone, longest = number % 2 == 0, whole
        while True:
            clean(folder)
            after = draw.uniform(0.5, longest)
            if kill(folder, command, after, alone):
                break
            longest = after  # it had ended: the machine is less busy than it was
        code, output = run(folder, command)
        found = results(folder)
        differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        kills.append({"after": round(after, 1), "alone": alone, "code": code, "differ": differ})
        good = code == 0 and not differ
        who = "the orchestrator alone" if alone else "all its processes"
        print(
            f"{number + 1}: {who} after {after:.1f} s: {'as unbroken' if good else f'{code} {differ}'}",
            flush=True,
        )
        if code:
            print(output[-3000:], flush=True)
    good = sum(one["code"] == 0 and not one["differ"] for one in kills)
    (args.folder / "kills.json").write_text(json.dumps({"seconds": whole, "kills": kills}, indent=2) + "\n")
    print(f"{good} of {args.kills}")
    sys.exit(good != args.kills)


if __name__ == "__main__":
    main()
