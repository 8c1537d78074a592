"""The profiles of clusters, and object storage: real jobs, against what tests/clusters.py starts on this machine."""

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steps.common import yaml_files
from tests import clusters
from tests.conftest import ROOT, copy_project, run, step
from tests.reduced import keep_one_run

RUN = "runs/demo/demo/most-popular/strict/seed-0"
INTO_BUCKET = ("snakemake", "--default-storage-provider", "s3", "--default-storage-prefix", "s3://bucket/here")


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A job is two or three processes of Snakemake: compile its modules once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONDONTWRITEBYTECODE", "")
        patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("compiled")))
        yield


def new_project(folder: Path) -> Path:
    """A copy of the project whose demo is one run; git lists its files, as a checkout's."""
    folder.mkdir(exist_ok=True)
    project = copy_project(folder)
    keep_one_run(project)
    subprocess.run(["git", "init", "--quiet"], cwd=project, check=True)
    subprocess.run(["git", "add", "--all"], cwd=project, check=True)
    return project


@pytest.mark.slow
@pytest.mark.slurm
def test_slurm_runs_the_steps_and_gives_a_gpu_to_those_that_train(tmp_path: Path) -> None:
    project = new_project(tmp_path)
    step("synthesize", "--dataset", "demo", "--output", "data/synthetic/demo.zip", cwd=project)
    step("download", "--dataset", "demo", "--output", "data/raw/demo", cwd=project)
    step("validate", "--dataset", "demo", "--raw", "data/raw/demo", "--output", "data/valid/demo", cwd=project)
    with tempfile.TemporaryDirectory() as folder, clusters.one_node_slurm(Path(folder)) as environment:
        command = ["snakemake", "--workflow-profile", "workflow/profiles/slurm"]
        command += ["--slurm-init-seconds-before-status-checks", "1", "--default-resources", "slurm_partition=main"]
        run(*command, "--", f"{RUN}/training.json", cwd=project, **environment)
        jobs = clusters.slurm_jobs(environment)
    assert {rule: job["JobState"] for rule, job in jobs.items()} == {"preprocess": "COMPLETED", "train": "COMPLETED"}
    assert jobs["train"]["TresPerJob"] == "gres:gpu:1"
    assert "TresPerJob" not in jobs["preprocess"]
    assert [jobs[rule]["NumCPUs"] for rule in ("preprocess", "train")] == ["1", "4"]
    assert [jobs[rule]["TimeLimit"] for rule in ("preprocess", "train")] == ["00:30:00", "04:00:00"]
    assert {job["MinMemoryNode"] for job in jobs.values()} == {"8000M"}
    assert (project / RUN / "model.safetensors").is_file()


def test_every_profile_names_the_rules_that_it_runs_elsewhere() -> None:
    """A rule that a profile does not name runs with Snakemake's 1 GB, and on Slurm for as long as the cluster says."""
    written = "".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    here = re.search(r"^localrules:\n((?:    \w+,\n)+)", written, re.M)
    assert here
    elsewhere = set(re.findall(r"^rule (\w+):", written, re.M)) - set(re.findall(r"\w+", here[1]))
    for name, rules in (("slurm", elsewhere), ("kubernetes", elsewhere - {"card"})):  # a card is made beside storage
        profile = yaml_files.read(ROOT / f"workflow/profiles/{name}/config.yaml")
        assert set(profile["set-resources"]) == rules
        assert set(profile["set-threads"]) == {"train", "evaluate", "study"}


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """The environment of commands that reach a new S3 server with an empty bucket called `bucket`."""
    with clusters.s3_server() as address:
        environment = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        client(environment).create_bucket(Bucket="bucket")
        yield environment


def client(s3: dict[str, str]) -> Any:
    import boto3

    keys = {"aws_access_key_id": s3["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": s3["AWS_SECRET_ACCESS_KEY"]}
    return boto3.client("s3", endpoint_url=s3["AWS_ENDPOINT_URL"], region_name="us-east-1", **keys)


def names_in_bucket(s3: dict[str, str]) -> set[str]:
    return {one["Key"] for one in client(s3).list_objects_v2(Bucket="bucket")["Contents"]}


@pytest.fixture(scope="module")
def stored(s3: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose data and one run were made into the bucket."""
    project = new_project(tmp_path_factory.mktemp("stored"))
    run(*INTO_BUCKET, "--cores", "2", "--", f"{RUN}/metrics.json", cwd=project, **s3)
    return project


@pytest.mark.slow
@pytest.mark.s3
def test_a_bucket_holds_data_and_runs_and_another_checkout_goes_on_from_there(
    s3: dict[str, str], stored: Path, tmp_path: Path
) -> None:
    names = names_in_bucket(s3)
    folders = {"raw": "manifest.json", "valid": "validation.json", "processed": "sequences.safetensors"}
    wanted = {f"here/data/{kind}/demo/{name}" for kind, name in folders.items()} | {"here/data/synthetic/demo.zip"}
    wanted |= {f"here/{RUN}/{name}" for name in ("config.json", "history.jsonl", "model.safetensors", "metrics.json")}
    assert wanted <= names
    assert {name.split("/")[1] for name in names} == {"data", "runs", "logs"}
    again = run(*INTO_BUCKET, "--cores", "2", "--", f"{RUN}/metrics.json", cwd=stored, **s3)
    assert "Nothing to be done" in again.stdout + again.stderr

    # Of a new checkout all code is newer than the bucket; times are left out of what is compared.
    project = new_project(tmp_path)
    for path in (project / "steps").rglob("*.py"):
        path.touch()
    command = [*INTO_BUCKET, "--cores", "2", "--rerun-triggers", "params", "input"]
    run(*command, "--", "reports/demo/table.md", cwd=project, **s3)
    assert "most popular" in (project / "reports/demo/table.md").read_text().lower()
    made = {path.name for path in (project / "logs").rglob("*.log")}
    assert made == set()  # they are in the bucket
    assert names_in_bucket(s3) - names == {"here/logs/tabulate/demo.log"}  # and nothing else was made


@pytest.mark.s3
def test_a_bucket_is_named_and_not_mixed_with_data_of_the_checkout(s3: dict[str, str], tmp_path: Path) -> None:
    project = new_project(tmp_path)
    for without in (INTO_BUCKET[:3], [*INTO_BUCKET[:4], "bucket/here"]):
        refused = run(*without, "--cores", "1", cwd=project, check=False, **s3)
        assert refused.returncode == 1
        assert refused.stderr.endswith("s3 wants --default-storage-prefix, as s3://BUCKET/FOLDER\n")
    (project / "data").mkdir()
    refused = run(*INTO_BUCKET, "--cores", "1", cwd=project, check=False, **s3)
    assert refused.returncode == 1
    assert (
        "snakemake: data/ is here, and --default-storage-provider keeps it in s3://bucket/here/data" in refused.stderr
    )
    assert list((project / "data").iterdir()) == []

    # What is linked to one bucket is neither taken for another's, nor filled without one.
    (project / "data").rmdir()
    for name in ("data", "runs"):
        local = project / ".snakemake/storage/s3/typo/here" / name
        local.mkdir(parents=True)
        (project / name).symlink_to(local.relative_to(project))
    refused = run(*INTO_BUCKET, "--cores", "1", cwd=project, check=False, **s3)
    assert refused.returncode == 1
    assert "in s3://bucket/here/data: `rm data runs` if nothing runs here, or take a new checkout\n" in refused.stderr
    refused = run("snakemake", "--cores", "1", cwd=project, check=False)
    assert refused.returncode == 1
    assert "snakemake: data is a link to what a bucket keeps: name the bucket again" in refused.stderr


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.kubernetes
def test_kubernetes_is_asked_for_jobs_with_gpus_that_get_code_and_data_from_the_bucket(
    s3: dict[str, str], stored: Path, tmp_path: Path
) -> None:
    project = new_project(tmp_path)
    command = ["snakemake", "--workflow-profile", "workflow/profiles/kubernetes", "--container-image", "hstu:1"]
    command += ["--default-storage-prefix", "s3://bucket/here", "--storage-s3-endpoint-url", s3["AWS_ENDPOINT_URL"]]
    command += ["--seconds-between-status-checks", "1", "--forcerun", "preprocess", "train"]
    target = ["--", f"{RUN}/training.json"]
    (tmp_path / "cluster").mkdir()
    with clusters.kubernetes(tmp_path / "cluster") as cluster:
        environment = s3 | {"KUBECONFIG": str(cluster.config), "HSTU_COMMIT": "0123abc"}
        planned = run(*command, "--dry-run", *target, cwd=project, **environment).stdout
        assert "gpu=1, gpu_manufacturer=nvidia" in planned
        assert cluster.jobs == []
        done = run(*command, *target, cwd=project, check=False, **environment)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{cluster.logs()}"
    [preprocess, train] = [job["spec"]["template"]["spec"]["containers"][0] for job in cluster.jobs]
    assert preprocess["image"] == train["image"] == "hstu:1"
    assert "preprocess" in preprocess["args"][1]
    assert preprocess["resources"]["requests"]["memory"] == train["resources"]["limits"]["memory"] == "8000M"
    assert not [key for key in preprocess["resources"]["requests"] if "gpu" in key]
    # The API server refuses a GPU that is requested without an equal limit.
    assert train["resources"]["requests"]["nvidia.com/gpu"] == train["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert cluster.secrets["aws_access_key_id"] == s3["AWS_ACCESS_KEY_ID"]
    training = client(s3).get_object(Bucket="bucket", Key=f"here/{RUN}/training.json")["Body"].read()
    assert json.loads(training)["commit"] == "0123abc"  # a pod has no git


@pytest.mark.slow
@pytest.mark.s3
def test_dvc_pushes_data_and_runs_to_a_bucket_and_pulls_them_elsewhere(s3: dict[str, str], tmp_path: Path) -> None:
    project, target = new_project(tmp_path), "workflow/dvc.yaml:evaluate@demo-demo-most-popular-strict-0"
    run("dvc", "remote", "add", "--default", "store", "s3://bucket/dvc", cwd=project, **s3)
    run("dvc", "repro", target, cwd=project, **s3)
    run("dvc", "push", cwd=project, **s3)
    kept = (project / ".dvc/config").read_text()
    assert s3["AWS_ENDPOINT_URL"] not in kept  # as credentials, it comes from the environment
    assert "key" not in kept

    other = new_project(tmp_path / "other")
    for name in (".dvc/config", "workflow/dvc.lock"):  # what git brings
        shutil.copyfile(project / name, other / name)
    run("dvc", "pull", "--with-deps", target, cwd=other, **s3)
    made = {path.relative_to(project): path.read_bytes() for path in data_and_runs(project)}
    assert made == {path.relative_to(other): path.read_bytes() for path in data_and_runs(other)}
    assert Path(RUN, "model.safetensors") in made
    assert Path("data/raw/demo/manifest.json") in made


def data_and_runs(project: Path) -> list[Path]:
    """The files but what `check` writes, which no remote keeps."""
    found = [path for name in ("data", "runs") for path in (project / name).rglob("*") if path.is_file()]
    return [path for path in found if path.name != "checked.json"]
