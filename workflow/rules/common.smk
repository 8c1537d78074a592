# What the rules share: names of files, and the parameters they depend on.

from pathlib import Path


localrules:
    plan,
    tabulate,
    compare,
    track,


MODEL_CODE = [
    *sorted(
        str(path) for folder in ("steps/models", "steps/ranking", "kernels") for path in Path(folder).rglob("*.py")
    ),
    "kernels/configurations.json",
]
TRAINING_CODE = sorted(str(path) for path in Path("steps/training").glob("*.py"))
RUN = "runs/{experiment}/{dataset}/{model}/{protocol}/seed-{seed}"


REPORTING_CODE = sorted(str(path) for path in Path("steps/reporting").glob("*.py"))


def published(wildcards):
    """What `download` waits for: the generated archive of a synthesized data set, nothing for others."""
    made = "synthesize" in DATASETS[wildcards.dataset]
    return f"data/synthetic/{wildcards.dataset}.zip" if made else []


def resolved(wildcards):
    """The run's config: `plan` runs again when this changes, not when any parameter file is touched."""
    run = params.Run(wildcards.experiment, wildcards.dataset, wildcards.model, wildcards.protocol, int(wildcards.seed))
    return params.resolve(run)


def files_of_runs(*names):
    """The named files of every run of the experiment."""
    return lambda wildcards: [
        f"runs/{wildcards.experiment}/{run.path}/{name}" for run in params.runs(wildcards.experiment) for name in names
    ]
