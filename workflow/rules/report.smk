# All runs of an experiment: tables, figures, and the MLflow store.


rule tabulate:
    input:
        "steps/tabulate.py",
        REPORTING_CODE,
        "params/paper.yaml",
        files_of_runs("config.json", "history.jsonl", "metrics.json"),
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
    shell:
        "python -m steps.tabulate --experiment {wildcards.experiment} --runs runs/{wildcards.experiment}"
        " --output reports/{wildcards.experiment} 2>&1 | tee {log}"


rule compare:
    input:
        "steps/compare.py",
        REPORTING_CODE,
        "params/paper.yaml",
        files_of_runs("config.json", "history.jsonl", "metrics.json", "ranks.safetensors"),
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
    shell:
        "python -m steps.compare --experiment {wildcards.experiment} --runs runs/{wildcards.experiment}"
        " --output reports/{wildcards.experiment} 2>&1 | tee {log}"


rule track:
    input:
        "steps/track.py",
        files_of_runs("config.json", "history.jsonl", "metrics.json", "model.safetensors"),
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
    shell:
        "python -m steps.track --experiment {wildcards.experiment} --runs runs/{wildcards.experiment}"
        " --reports reports/{wildcards.experiment} --output {output} 2>&1 | tee {log}"
