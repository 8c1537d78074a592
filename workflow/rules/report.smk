# All runs of an experiment: tables, figures, and the MLflow store.


rule tabulate:
    input:
        "steps/tabulate.py",
        REPORTING_CODE,
        "params/paper.yaml",
        files_of_runs("config.json", "metrics.json"),
    output:
        report("reports/{experiment}/table.html", caption="../report/table.rst", category="{experiment}"),
        report("reports/{experiment}/curves.svg", caption="../report/curves.rst", category="{experiment}"),
        "reports/{experiment}/table.md",
        "reports/{experiment}/table.csv",
        "reports/{experiment}/runs.csv",
        "reports/{experiment}/curves.png",
        "reports/{experiment}/details.md",
        "reports/{experiment}/variants.csv",
        "reports/{experiment}/beyond.csv",
    log:
        "logs/tabulate/{experiment}.log",
    conda:
        "../../environment.yml"
    params:
        shown=shown,
    shell:
        "python -m steps.tabulate --experiment {wildcards.experiment:q} --runs runs/{wildcards.experiment:q}"
        " --output reports/{wildcards.experiment:q} 2>&1 | tee {log:q}"


rule compare:
    input:
        "steps/compare.py",
        "steps/evaluation/metrics.py",
        REPORTING_CODE,
        "params/paper.yaml",
        files_of_runs("config.json", "metrics.json"),
    output:
        report("reports/{experiment}/intervals.svg", caption="../report/intervals.rst", category="{experiment}"),
        "reports/{experiment}/comparisons.md",
        "reports/{experiment}/comparisons.csv",
        "reports/{experiment}/claims.md",
        "reports/{experiment}/intervals.png",
    log:
        "logs/compare/{experiment}.log",
    conda:
        "../../environment.yml"
    params:
        shown=shown,
    shell:
        "python -m steps.compare --experiment {wildcards.experiment:q} --runs runs/{wildcards.experiment:q}"
        " --output reports/{wildcards.experiment:q} 2>&1 | tee {log:q}"


rule crate:
    input:
        "steps/crate.py",
        code("steps/crates"),
        REPORTING_CODE,
        "CITATION.cff",
        "Snakefile",
        RULES,
        files_of_runs("config.json", "metrics.json"),
        "reports/{experiment}/table.md",
        "reports/{experiment}/table.csv",
        "reports/{experiment}/runs.csv",
        "reports/{experiment}/details.md",
        "reports/{experiment}/variants.csv",
        "reports/{experiment}/beyond.csv",
        "reports/{experiment}/curves.svg",
        "reports/{experiment}/comparisons.md",
        "reports/{experiment}/comparisons.csv",
        "reports/{experiment}/intervals.svg",
    output:
        "reports/{experiment}/crate/ro-crate-metadata.json",
    log:
        "logs/crate/{experiment}.log",
    conda:
        "../../environment.yml"
    params:
        shown=shown,
    shell:
        "python -m steps.crate --experiment {wildcards.experiment:q} --runs runs/{wildcards.experiment:q}"
        " --reports reports/{wildcards.experiment:q} --output reports/{wildcards.experiment:q}/crate 2>&1 | tee {log:q}"


rule track:
    input:
        "steps/track.py",
        "steps/common/params.py",
        "steps/common/dotted.py",
        "steps/reporting/pinned.py",
        "steps/reporting/records.py",
        files_of_runs("config.json", "metrics.json"),
        cards,
        "reports/{experiment}/table.md",
        "reports/{experiment}/table.html",
        "reports/{experiment}/curves.svg",
        "reports/{experiment}/curves.png",
        "reports/{experiment}/comparisons.md",
        "reports/{experiment}/intervals.svg",
    output:
        "reports/{experiment}/mlflow.json",
    log:
        "logs/track/{experiment}.log",
    conda:
        "../../environment.yml"
    params:
        shown=shown,
    shell:
        "python -m steps.track --experiment {wildcards.experiment:q} --runs runs/{wildcards.experiment:q}"
        " --reports reports/{wildcards.experiment:q} --output {output:q} 2>&1 | tee {log:q}"
