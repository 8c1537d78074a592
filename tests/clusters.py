"""What tests of clusters and of object storage run against, all on this machine: a one-node Slurm, a stand-in for a
Kubernetes API server that runs pods as processes, and a server of S3's protocol."""

import base64
import getpass
import importlib.util
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

_SBIN = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
#: What a marked test needs: a name, and whether it is there.
NEEDS = {
    "slurm": (
        "Slurm (slurmctld, slurmd, munge) and the extra `slurm`",
        all(shutil.which(name, path=_SBIN) for name in ("slurmctld", "slurmd", "srun", "munged"))
        and importlib.util.find_spec("snakemake_executor_plugin_slurm") is not None,
    ),
    "kubernetes": ("the extra `kubernetes`", importlib.util.find_spec("snakemake_executor_plugin_kubernetes")),
    "s3": (
        "the extra `clusters`",
        all(importlib.util.find_spec(name) for name in ("moto", "dvc_s3", "snakemake_storage_plugin_s3")),
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark, (what, there) in NEEDS.items():
            if item.get_closest_marker(mark) and not there:
                item.add_marker(pytest.mark.skip(reason=f"needs {what}"))


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


def _wait(condition: Callable[[], bool], what: str, folder: Path, seconds: float = 60) -> None:
    """Wait until what was started answers. Where it does not, fail with what the daemons printed to `folder`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            printed = [f"{path.name}: {path.read_text()[-1000:]}" for path in sorted(folder.glob("*.out"))]
            pytest.fail("\n".join([f"{what} did not come up in {seconds} s", *printed]))
        time.sleep(0.1)


@contextmanager
def _daemon(folder: Path, *command: str | Path) -> Iterator[None]:
    program = shutil.which(command[0], path=_SBIN)
    with (folder / f"{command[0]}.out").open("w") as printed:
        process = subprocess.Popen([str(program), *command[1:]], stdout=printed, stderr=printed)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def one_node_slurm(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a Slurm with one node of 8 cores, 64 GB and one GPU, none of which need be there.

    All of its files are in `folder`; its path has to be short, as sockets are in it.
    """
    host, user, conf = socket.gethostname().split(".")[0], getpass.getuser(), folder / "slurm.conf"
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    conf.write_text(f"""
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000 Gres=gpu:1
PartitionName=main Nodes={host} Default=YES
""")
    (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File=/dev/null\n")  # without a file it counts as none
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    # The plugin's job step clears SLURM_CONF of srun's environment: findings/snakemake-slurm-conf.sh.
    srun = folder / "bin/srun"
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {shutil.which("srun")} "$@"\n')
    srun.chmod(0o755)
    environment = {"SLURM_CONF": str(conf), "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    files = [
        f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file", "seed-file")
    ]
    with ExitStack() as running:
        running.enter_context(
            _daemon(folder, "munged", "--foreground", "--force", *files, f"--log-file={folder}/munge.log")
        )
        _wait((folder / "munge.socket").exists, "munged", folder)
        running.enter_context(_daemon(folder, "slurmctld", "-D", "-c", "-f", conf))
        running.enter_context(_daemon(folder, "slurmd", "-D", "-c", "-f", conf))
        _wait(lambda: "idle" in _output(environment, "sinfo", "--noheader", "--format=%t"), "a node of Slurm", folder)
        yield environment


def _output(environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        command, env=os.environ | environment, text=True, capture_output=True, check=False, timeout=60
    )
    return done.stdout


def slurm_jobs(environment: dict[str, str]) -> dict[str, dict[str, str]]:
    """What Slurm says of each job, by the name of its rule."""
    said = _output(environment, "scontrol", "show", "job", "--oneliner").splitlines()
    jobs = [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in said]
    return {re.sub("^rule_|_wildcards.*", "", job["Comment"]): job for job in jobs}


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of a server of S3's protocol that keeps all in memory, and takes any credentials."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


class Kubernetes(ThreadingHTTPServer):
    """As much of a Kubernetes API server as the executor plugin asks for. A pod is a shell in an empty folder."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Api)
        self.folder = folder
        self.jobs: list[dict[str, Any]] = []
        self.ended: dict[str, int] = {}
        self.secrets: dict[str, str] = {}
        (folder / "bin").mkdir()
        pip = folder / "bin/pip"  # each job installs the storage plugin, which is here as in the image
        pip.write_text("#!/bin/sh\n")
        pip.chmod(0o755)
        server = f"http://127.0.0.1:{self.server_address[1]}"
        self.config = folder / "config"  # JSON is YAML
        self.config.write_text(
            json.dumps(
                {
                    "current-context": "here",
                    "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
                    "clusters": [{"name": "here", "cluster": {"server": server}}],
                    "users": [{"name": "me", "user": {}}],
                }
            )
        )

    def run_pod(self, job: dict[str, Any]) -> None:
        """Run the job's container in an empty folder, with the secrets that it asks for."""
        name, [container] = job["metadata"]["name"], job["spec"]["template"]["spec"]["containers"]
        folder = self.folder / name
        folder.mkdir()
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SNAKEMAKE_", "HSTU_"))}
        environment |= {one["name"]: self.secrets[one["valueFrom"]["secretKeyRef"]["key"]] for one in container["env"]}
        environment["PATH"] = f"{self.folder}/bin:{environment['PATH']}"
        environment.pop("PYTHONPATH", None)
        with (self.folder / f"{name}.log").open("w") as log:
            done = subprocess.run(
                [*container["command"], *container["args"]], cwd=folder, env=environment, stdout=log, stderr=log
            )
        self.ended[name] = done.returncode

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in self.folder.glob("*.log"))


class _Api(BaseHTTPRequestHandler):
    server: Kubernetes

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, content: Any, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/secrets"):
            data = content["data"].items()
            self.server.secrets = {key: base64.b64decode(value).decode() for key, value in data}
        else:
            self.server.jobs.append(content)
            threading.Thread(target=self.server.run_pod, args=[content], daemon=True).start()
        self.answer(content, 201)

    def do_GET(self) -> None:
        if self.path.endswith("/status"):
            code = self.server.ended.get(self.path.split("/")[-2])
            self.answer({"status": {} if code is None else {"failed" if code else "succeeded": 1}})
        else:
            self.answer({"items": []})  # of pods

    def do_DELETE(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer({})


@contextmanager
def kubernetes(folder: Path) -> Iterator[Kubernetes]:
    """The stand-in, started; `config` is the file that KUBECONFIG has to name."""
    with Kubernetes(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
