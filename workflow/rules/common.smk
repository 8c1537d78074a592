# What the rules share: the parameters they depend on, names of files, and how Snakemake behaves around them.

import fcntl
import os
import re
import signal
import sqlite3
import sys
from contextlib import closing
from functools import cache
from pathlib import Path

from snakemake.path_modifier import PathModifier

from steps.common import claims, params, studies
from steps.common.cli import StepError
from steps.common.datasets import TOLD
from steps.common.files import read_json, sha256
from steps.common.provenance import commit
from steps.common.threads import cpu_threads
from steps.tracking.store import LOCAL, shown_uri, tracking_uri
from workflow.display import Display


localrules:
    plan,
    tabulate,
    compare,
    claims,
    crate,
    track,
    plan_study,
    report_study,


STORAGE = workflow.storage_settings.default_storage_provider  # of --default-storage-provider: s3, or None
STORED = ("data/", "runs/", "logs/")  # what it holds; code and reports are in the checkout
if STORAGE:

    localrules:
        card,  # its reports are read from the checkout


try:
    EXPERIMENTS = params.experiments()
    STUDIES = params.studies()
    DATASETS = params.load("datasets")
except StepError as error:
    sys.exit(f"snakemake: {error}")


def code(*folders):
    """The Python files below the folders."""
    return sorted(str(path) for folder in folders for path in Path(folder).rglob("*.py"))


# What changes a model's numbers: all that train and evaluate compute with.
MODEL_CODE = [
    "steps/common/device.py",
    "steps/common/threads.py",
    "steps/common/top.py",
    "steps/data/before.py",
    "steps/data/fields.py",
    "steps/data/sequences.py",
    "steps/data/split.py",
    "steps/data/stochastic_length.py",
    *code("steps/models", "steps/tasks", "steps/evaluation"),
    "kernels/common.py",
    *code(*(path for path in Path("kernels").iterdir() if path.is_dir() and path.name != "tools")),
    "kernels/configurations.json",
    "kernels/tensor_cores.py",
]
TRAINING_CODE = code("steps/training")
REPORTING_CODE = [
    "steps/common/params.py",
    "steps/common/dotted.py",
    "steps/common/svg.py",
    "steps/evaluation/names.py",
    *code("steps/reporting"),
]
RULES = sorted(str(path) for path in Path("workflow/rules").glob("*.smk"))
RUN = "runs/{experiment}/{dataset}/{model}/{protocol}/seed-{seed}"
ALL_CORES = 1024  # Snakemake gives as many as there are


# The sections of Snakemake's report, in the order in which one reads them.
RESULTS, COMPARISONS, TRAINING = "1. Results", "2. Comparisons and claims", "3. Training"
DATA, MEASURED = "4. Data sets", "5. Studies"


def only_what_is_stored(apply):
    """Snakemake's own application of the default storage, which takes every path for one that is there."""
    return lambda modifier, path: apply(modifier, path) if str(path).startswith(STORED) else path


def link_to_storage(name):
    """Let `data` and `runs`, which commands name, be what Snakemake fetches from the storage, and brings there."""
    query = f"{workflow.storage_settings.default_storage_prefix.rstrip('/')}/{name}"
    local = workflow.storage_registry.default_storage_provider.object(query).local_path()
    local.mkdir(parents=True, exist_ok=True)
    link = Path(name)
    if not link.is_symlink() and not link.exists():
        link.symlink_to(local)
    if link.resolve() != local.resolve():
        relink = "`rm data runs` if nothing runs here, or " if link.is_symlink() else ""
        sys.exit(
            f"snakemake: {name}/ is here, and --default-storage-provider keeps it in {query}: {relink}take a new checkout"
        )


def refuse_without_storage(name):
    """Here the folder is a copy of a part of the storage, which would later count as fetched from there."""
    if Path(name).is_symlink() and os.readlink(name).startswith(".snakemake/storage/"):
        sys.exit(
            f"snakemake: {name} is a link to what a bucket keeps: "
            "name the bucket again (--default-storage-provider, --default-storage-prefix), or take a new checkout"
        )


if STORAGE:
    if not re.match("s3://[^/]" if STORAGE == "s3" else ".", workflow.storage_settings.default_storage_prefix or ""):
        sys.exit(
            f"snakemake: --default-storage-provider {STORAGE} wants --default-storage-prefix, as s3://BUCKET/FOLDER"
        )
    PathModifier.apply_default_storage = only_what_is_stored(PathModifier.apply_default_storage)
    link_to_storage("data")
    link_to_storage("runs")
    os.environ.setdefault("HSTU_COMMIT", commit())  # machines that fetch the code from the storage have no git

    envvars:
        "HSTU_COMMIT",

else:
    refuse_without_storage("data")
    refuse_without_storage("runs")


def fetched(*paths):
    """What a step reads besides its small inputs, which have the hashes of it: storage has to be told."""
    return list(paths) if STORAGE else []


def folder_or(folder, *files):
    """The files of a data set's folder. In storage the folder is one object, and has what some data sets have beside
    them: Snakemake takes a folder for fetched as soon as one file of it is there, so both do not go together."""
    return [folder] if STORAGE else [f"{folder}/{name}" for name in files]


def made_folder_or(folder, *files):
    """The same, of an output."""
    return [directory(folder)] if STORAGE else folder_or(folder, *files)


def any_of(names):
    """A regular expression of exactly these names."""
    return "|".join(map(re.escape, names))


def published(wildcards):
    """What `download` waits for: the generated archive of a synthesized data set, nothing for others."""
    made = "synthesize" in DATASETS[wildcards.dataset]
    return f"data/synthetic/{wildcards.dataset}.zip" if made else []


@cache  # hashes every file
def edited(dataset):
    """The raw files that are no longer as they were downloaded; none before the download."""
    folder = Path("data/raw", dataset)
    manifest = folder / "manifest.json"
    files = read_json(manifest)["files"] if manifest.is_file() else {}
    return [name for name, digest in files.items() if not (folder / name).is_file() or sha256(folder / name) != digest]


def state_of_raw_files(wildcards):
    """`validate` runs again, and says what to do, when this changes: an edit is no output of `download`."""
    names = edited(wildcards.dataset)
    return f"edited: {', '.join(names)}" if names else "as downloaded"


config_of = cache(params.resolve)  # several rules ask for it


def resolved(wildcards):
    """The run's config: `plan` runs again when this changes, not when any parameter file is touched."""
    run = params.Run(wildcards.experiment, wildcards.dataset, wildcards.model, wildcards.protocol, int(wildcards.seed))
    return config_of(run)


def threads_of_run(wildcards):
    """As many as the run gains from."""
    return cpu_threads(resolved(wildcards), ALL_CORES)


plan_of = cache(studies.plan)


def settings_of(wildcards):
    """The study's settings, and the hash of the code that measures it: `plan_study` runs again when these change."""
    return plan_of(wildcards.study)


def shown(wildcards):
    """What tables show besides results, in their order: titles and labels."""
    content = params.load(f"experiments/{wildcards.experiment}")
    titles = [content["title"], *(DATASETS[name]["title"] for name in content["datasets"])]
    labels = {run.model: params.label(run.model) for run in params.runs(wildcards.experiment)}
    return [titles, list(labels.items())]


WANTED = []  # the experiments and studies of the command line; filled before Snakemake asks for inputs


def tables_of(names):
    """The tables by which claims about these experiments and studies are decided."""
    claimed, measured = claims.experiments(), claims.studies()
    tables = [f"reports/{name}/{table}.csv" for name in names if name in claimed for table in claims.TABLES]
    return tables + [f"reports/studies/{name}/table.csv" for name in names if name in measured]


def tables_made(wildcards):
    """What `claims` waits for: the tables of what is being made. Others it takes as they are."""
    return tables_of(WANTED)


def tables_there(wildcards):
    """The hashes of the other tables that are there: a claim does not make an experiment run."""
    found = tables_of([name for name in (*EXPERIMENTS, *STUDIES) if name not in WANTED])
    return {path: sha256(Path(path)) for path in found if Path(path).is_file()}


def about(wildcards):
    """The title of what an output belongs to, or all; none for data sets, which are items of their own."""
    for key, kind in (("experiment", "experiments"), ("study", "studies")):
        if key in wildcards.keys():
            return params.load(f"{kind}/{wildcards[key]}")["title"]
    return None if "dataset" in wildcards.keys() else "All experiments"


def shown_as(path, section, item):
    """An output that Snakemake's report shows as an item of a section; its caption has the file's name.

    item: what it is called there, or a function of the wildcards that says so.
    """
    caption = f"../report/{Path(path).name}.rst"
    labels = lambda wildcards: {"item": item(wildcards) if callable(item) else item}
    return report(path, caption=caption, category=section, subcategory=about, labels=labels)


def cards(wildcards):
    """The card of each data set of the experiment, which has the hashes of the page and the metadata beside it."""
    return [
        f"reports/datasets/{name}/card.json" for name in params.load(f"experiments/{wildcards.experiment}")["datasets"]
    ]


def files_of_runs(*names):
    """The named files of every run of the experiment: small ones, which hold the hashes of the large ones beside them.

    Snakemake compares these by content, so that new times (of `dvc checkout`, of a copy) change nothing.
    """
    names += tuple(fetched("history.jsonl", "training.json", "outcomes.safetensors"))
    return lambda wildcards: [
        f"runs/{wildcards.experiment}/{run.path}/{name}" for run in params.runs(wildcards.experiment) for name in names
    ]


def raw_of(wildcards):
    """What was downloaded of the data set, or of the one that it is a variant of."""
    return folder_or(f"data/raw/{params.valid_of(wildcards.dataset)}", "manifest.json")


def valid_of(wildcards):
    """What was validated of it."""
    return folder_or(f"data/valid/{params.valid_of(wildcards.dataset)}", "validation.json")


def data_of_study(wildcards):
    """The data sets that the study reads."""
    manifests = map(Path, studies.manifests(wildcards.study))
    return [path for manifest in manifests for path in folder_or(str(manifest.parent), manifest.name)]


def stored_models(wildcards):
    """The weights of the experiment's runs and the data that they were trained on, which a registered model has."""
    runs = list(params.runs(wildcards.experiment))
    weights = {f"runs/{wildcards.experiment}/{run.path}/model.safetensors" for run in runs}
    return fetched(*sorted(weights | {f"data/processed/{run.dataset}" for run in runs}))


def prepared(prepare):
    """Snakemake's own making of the graph, preceded by what has to know the command line.

    That is known only after this file is read, which is why a method of Snakemake's is wrapped (tests hold it to this).
    """

    def settled(*args, **kwargs):
        settings = workflow.dag_settings
        if workflow.is_main_process:
            check_targets(settings.targets)
            wanted = set(settings.targets) or {"demo"}
            WANTED.extend(name for name in (*EXPERIMENTS, *STUDIES) if name in wanted)
            check_parameters(name for name in EXPERIMENTS if name in wanted)
            settings.forcerun = {*settings.forcerun, *lost_from_the_store(settings.targets)}
            settings.force_incomplete = True  # what a killed Snakemake did not finish is made again
            settings.max_checksum_file_size = 2**40  # files are compared by content: generated archives are large
        prepare(*args, **kwargs | {"nolock": True})  # its locks outlive it; see refuse_to_share
        workflow.persistence.incomplete = begun

    return settled


async def begun(job):
    """The outputs of a job that was begun and not ended, also those that are not there.

    Snakemake asks for those that are there, and takes what was made of an earlier training for valid where a killed one
    had begun anew; its orphan then removes them.
    """
    keys = {workflow.persistence._get_key(file): file for file in job.output}
    return [keys[key] for key in workflow.persistence._filter_incomplete_keys(keys)]


def check_parameters(experiments):
    """Say in one line which parameter no run of these experiments can have; Snakemake would show a trace besides."""
    try:
        for experiment in experiments:
            for run in params.runs(experiment):
                config_of(run)
    except StepError as error:
        sys.exit(f"snakemake: {error}")


def check_targets(targets):
    """Say which names there are where a target is neither one of them nor a file."""
    for target in targets:
        path = workflow.modifier.path_modifier.modify(os.path.relpath(target))
        if workflow.is_rule(target) or os.path.isfile(path) or any(made.is_producer(path) for made in workflow.rules):
            continue
        sys.exit(
            f"snakemake: {target} is no experiment, study, step or file that can be made. "
            f"Experiments: {', '.join(EXPERIMENTS)}. Studies: {', '.join(STUDIES)}. Data sets: {', '.join(DATASETS)}."
        )


LOCKS = []


def refuse_to_share(dag):
    """Hold each experiment, study and data set that has jobs to do; refuse those that another Snakemake holds.

    The kernel drops these locks when the process ends, however it ends. Jobs do not inherit them.
    """
    wildcards = [job.wildcards for job in dag.needrun_jobs()]
    names = {given.get("experiment") or given.get("study") or given.get("dataset") for given in wildcards} - {None}
    for name in sorted(names):
        LOCKS.append(Path(".snakemake", f"{name}.lock").open("a"))
        try:
            fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"snakemake: another one is making {name} in this folder; wait until it ends")


def is_tracked(experiment):
    """Whether the MLflow store has the runs that were brought there; true before they are.

    A server is not asked. It lacks them where it did not answer, or where MLFLOW_TRACKING_URI names another store.
    """
    made = Path("reports", experiment, "mlflow.json")
    if not made.is_file():
        return True
    content = read_json(made)
    if "pending" in content or content["store"] != shown_uri(tracking_uri()):
        return False
    if content["store"] != LOCAL:
        return True
    try:
        with closing(sqlite3.connect("file:mlflow.db?mode=ro", uri=True)) as store:
            there = {row[0] for row in store.execute("SELECT run_uuid FROM runs WHERE lifecycle_stage = 'active'")}
    except sqlite3.Error:
        return False
    return there.issuperset([content.get("parent"), *content["runs"].values()])


def lost_from_the_store(targets):
    """The mlflow.json files to make again, as the MLflow store, no output of one experiment, lost their runs."""
    made = {name: f"reports/{name}/mlflow.json" for name in EXPERIMENTS}
    wanted = set(targets) or {"demo"}
    return [path for name, path in made.items() if wanted & {name, path} and not is_tracked(name)]


display = Display(workflow.output_settings.quiet or (), dry=lambda: workflow.dryrun)
if workflow.is_main_process:
    logger.addFilter(display)
    signal.signal(signal.SIGINT, display.interrupt)
    if display.brief:
        shell.prefix("set -euo pipefail; exec >/dev/null; ")  # the steps' words go to their logs
