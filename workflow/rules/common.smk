# What the rules share: the parameters they depend on, and names of files.

import re
import sys
from functools import cache
from pathlib import Path

from steps.common import claims, params, studies
from steps.common.cli import StepError
from steps.common.files import read_json, sha256
from steps.common.threads import cpu_threads


localrules:
    plan,
    tabulate,
    compare,
    claims,
    crate,
    track,
    plan_study,
    report_study,


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
    "steps/common/paired.py",
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
