"""The full reproduction: `snakemake --cores 2` makes the demo, `snakemake --cores 2 ml-1m` an experiment or a
study by name."""

from snakemake.utils import min_version

min_version("9.0")


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/storage.smk"
include: "workflow/rules/command.smk"


wildcard_constraints:
    experiment=any_of(EXPERIMENTS),
    study=any_of(STUDIES),
    dataset=any_of(DATASETS),
    model="[^/]+",
    protocol="[^/]+",
    seed="[0-9]+",


include: "workflow/rules/data.smk"
include: "workflow/rules/runs.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/studies.smk"


for experiment in EXPERIMENTS:

    rule:
        name:
            experiment
        default_target: experiment == "demo"
        input:
            f"reports/{experiment}/mlflow.json",
            f"reports/{experiment}/crate/ro-crate-metadata.json",
            f"reports/{experiment}/table.md",
            "reports/claims.html",


for study in STUDIES:

    rule:
        name:
            study
        input:
            f"reports/studies/{study}/table.md",


workflow._prepare_dag = prepared(workflow._prepare_dag)


onstart:
    refuse_to_share(workflow.dag)
