# From a publisher's archive, or a generated one, to sequences.

from steps.common.datasets import TOLD


rule synthesize:
    input:
        "steps/synthesize.py",
        code("steps/data/generators"),
    output:
        "data/synthetic/{dataset}.zip",
    log:
        "logs/synthesize/{dataset}.log",
    conda:
        "../../environment.yml"
    params:
        settings=lambda wildcards: DATASETS[wildcards.dataset]["synthesize"],
    shell:
        "python -m steps.synthesize --dataset {wildcards.dataset:q} --output {output:q} 2>&1 | tee {log:q}"


rule download:
    input:
        "steps/download.py",
        "steps/data/sources.py",
        published,
    output:
        [] if STORAGE else "data/raw/{dataset}/manifest.json",
        folder=directory("data/raw/{dataset}"),
    log:
        "logs/download/{dataset}.log",
    conda:
        "../../environment.yml"
    params:
        source=lambda wildcards: DATASETS[wildcards.dataset]["source"],
    shell:
        "python -m steps.download --dataset {wildcards.dataset:q} --output {output.folder:q} 2>&1 | tee {log:q}"


rule validate:
    input:
        "steps/validate.py",
        "steps/data/blocks.py",
        "steps/data/delimited.py",
        "steps/data/filters.py",
        "steps/data/log.py",
        "steps/data/readers.py",
        "steps/data/records.py",
        "steps/data/schemas.py",
        "steps/data/values.py",
        folder_or("data/raw/{dataset}", "manifest.json"),
    output:
        made_folder_or("data/valid/{dataset}", "interactions.parquet", "items.parquet", "validation.json"),
    log:
        "logs/validate/{dataset}.log",
    conda:
        "../../environment.yml"
    params:
        rules=lambda wildcards: [DATASETS[wildcards.dataset].get(key) for key in ("files", "checks", "filters")],
        raw=state_of_raw_files,
    shell:
        "python -m steps.validate --dataset {wildcards.dataset:q} --raw data/raw/{wildcards.dataset:q}"
        " --output data/valid/{wildcards.dataset:q} 2>&1 | tee {log:q}"


rule preprocess:
    input:
        "steps/preprocess.py",
        "steps/data/build.py",
        "steps/data/features.py",
        "steps/data/filters.py",
        "steps/data/log.py",
        "steps/data/tensors.py",
        valid_of,
    output:
        made_folder_or(
            "data/processed/{dataset}",
            "sequences.safetensors",
            "users.parquet",
            "items.parquet",
            "made_of.json",
            "manifest.json",
        ),
    log:
        "logs/preprocess/{dataset}.log",
    conda:
        "../../environment.yml"
    params:
        ties=lambda wildcards: DATASETS[wildcards.dataset]["ties"],
        valid=lambda wildcards: f"data/valid/{params.valid_of(wildcards.dataset)}",
    shell:
        "python -m steps.preprocess --dataset {wildcards.dataset:q} --valid {params.valid:q}"
        " --output data/processed/{wildcards.dataset:q} 2>&1 | tee {log:q}"


rule card:
    input:
        "steps/card.py",
        code("steps/cards"),
        "steps/common/svg.py",
        raw_of,
        valid_of,
        folder_or("data/processed/{dataset}", "manifest.json"),
    output:
        shown_as("reports/datasets/{dataset}/card.html", DATA, lambda wildcards: DATASETS[wildcards.dataset]["title"]),
        "reports/datasets/{dataset}/card.json",
        "reports/datasets/{dataset}/croissant.json",
    log:
        "logs/card/{dataset}.log",
    conda:
        "../../environment.yml"
    params:
        told=lambda wildcards: [DATASETS[wildcards.dataset].get(key) for key in TOLD],
        valid=lambda wildcards: params.valid_of(wildcards.dataset),
    shell:
        "python -m steps.card --dataset {wildcards.dataset:q} --raw data/raw/{params.valid:q}"
        " --valid data/valid/{params.valid:q} --processed data/processed/{wildcards.dataset:q}"
        " --output reports/datasets/{wildcards.dataset:q} 2>&1 | tee {log:q}"
