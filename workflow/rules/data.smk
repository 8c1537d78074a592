# From a publisher's archive, or a generated one, to sequences.


rule synthesize:
    input:
        "steps/synthesize.py",
    output:
        "data/synthetic/{dataset}.zip",
    log:
        "logs/synthesize/{dataset}.log",
    conda:
        "../../environment.yml"
    params:
        settings=lambda wildcards: DATASETS[wildcards.dataset]["synthesize"],
    shell:
        "python -m steps.synthesize --dataset {wildcards.dataset} --output {output} 2>&1 | tee {log}"


rule download:
    input:
        "steps/download.py",
        "steps/data/sources.py",
        published,
    output:
        directory("data/raw/{dataset}"),
    log:
        "logs/download/{dataset}.log",
    conda:
        "../../environment.yml"
    params:
        source=lambda wildcards: DATASETS[wildcards.dataset]["source"],
    shell:
        "python -m steps.download --dataset {wildcards.dataset} --output {output} 2>&1 | tee {log}"


rule validate:
    input:
        "steps/validate.py",
        "steps/data/readers.py",
        "steps/data/schemas.py",
        raw="data/raw/{dataset}",
    output:
        directory("data/valid/{dataset}"),
    log:
        "logs/validate/{dataset}.log",
    conda:
        "../../environment.yml"
    params:
        rules=lambda wildcards: [DATASETS[wildcards.dataset][key] for key in ("files", "checks")],
    shell:
        "python -m steps.validate --dataset {wildcards.dataset} --raw {input.raw} --output {output} 2>&1 | tee {log}"


rule preprocess:
    input:
        "steps/preprocess.py",
        "steps/data/splits.py",
        valid="data/valid/{dataset}",
    output:
        directory("data/processed/{dataset}"),
    log:
        "logs/preprocess/{dataset}.log",
    conda:
        "../../environment.yml"
    params:
        ties=lambda wildcards: DATASETS[wildcards.dataset]["ties"],
    shell:
        "python -m steps.preprocess --dataset {wildcards.dataset} --valid {input.valid} --output {output} 2>&1 | tee {log}"
