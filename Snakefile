"""The full reproduction: `snakemake --cores 2` makes the demo, `snakemake --cores 2 ml-1m` an experiment by name."""

from snakemake.utils import min_version

from steps.common import params

min_version("9.0")

EXPERIMENTS = params.experiments()
DATASETS = params.load("datasets")


wildcard_constraints:
    experiment="|".join(EXPERIMENTS),
    dataset="|".join(DATASETS),
    model="[^/]+",
    protocol="[^/]+",
    seed="[0-9]+",


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/runs.smk"
include: "workflow/rules/report.smk"


for experiment in EXPERIMENTS:

    rule:
        name:
            experiment
        default_target: experiment == "demo"
        input:
            f"reports/{experiment}/mlflow.json",
            f"reports/{experiment}/table.md",
