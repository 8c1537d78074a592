# All runs of an experiment: tables, figures, and the MLflow store.


rule tabulate:
    input:
        "steps/tabulate.py",
        REPORTING_CODE,
        "params/paper.yaml",
        files_of_runs("config.json", "metrics.json"),
    output:
        shown_as("reports/{experiment}/table.html", RESULTS, "Tables of every model"),
        shown_as("reports/{experiment}/paper.html", RESULTS, "The paper's table, ours and theirs"),
        shown_as("reports/{experiment}/groups.svg", RESULTS, "By history length and popularity"),
        shown_as("reports/{experiment}/curves.svg", TRAINING, "Learning curves"),
        shown_as("reports/{experiment}/speed.svg", TRAINING, "Speed against quality"),
        "reports/{experiment}/table.md",
        shown_as("reports/{experiment}/table.csv", RESULTS, "Tables with all metrics, to save as csv"),
        "reports/{experiment}/runs.csv",
        "reports/{experiment}/paper.md",
        "reports/{experiment}/paper.csv",
        "reports/{experiment}/paper.tex",
        "reports/{experiment}/details.md",
        "reports/{experiment}/variants.csv",
        "reports/{experiment}/beyond.csv",
        "reports/{experiment}/curves.png",
        "reports/{experiment}/curves-dark.svg",
        "reports/{experiment}/curves-dark.png",
        "reports/{experiment}/groups.png",
        "reports/{experiment}/groups-dark.svg",
        "reports/{experiment}/groups-dark.png",
        "reports/{experiment}/speed.png",
        "reports/{experiment}/speed-dark.svg",
        "reports/{experiment}/speed-dark.png",
        "reports/{experiment}/metrics.json",
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
        shown_as("reports/{experiment}/intervals.svg", COMPARISONS, "Intervals of every model"),
        shown_as("reports/{experiment}/comparisons.html", COMPARISONS, "Differences, pair by pair"),
        "reports/{experiment}/comparisons.md",
        "reports/{experiment}/comparisons.csv",
        "reports/{experiment}/intervals.csv",
        "reports/{experiment}/parity.md",
        "reports/{experiment}/intervals.png",
        "reports/{experiment}/intervals-dark.svg",
        "reports/{experiment}/intervals-dark.png",
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
        "reports/{experiment}/intervals.csv",
        "reports/{experiment}/parity.md",
        "reports/{experiment}/paper.md",
        "reports/{experiment}/paper.csv",
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
        "steps/reporting/outcomes.py",
        "steps/reporting/pinned.py",
        "steps/reporting/records.py",
        code("steps/tracking", "steps/serving"),
        MODEL_CODE,
        files_of_runs("config.json", "metrics.json"),
        cards,
        stored_models,
        "reports/{experiment}/table.md",
        "reports/{experiment}/table.html",
        "reports/{experiment}/table.csv",
        "reports/{experiment}/runs.csv",
        "reports/{experiment}/curves.svg",
        "reports/{experiment}/curves.png",
        "reports/{experiment}/comparisons.md",
        "reports/{experiment}/comparisons.csv",
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
        " --reports reports/{wildcards.experiment:q} --data data/processed --output {output:q} 2>&1 | tee {log:q}"


rule claims:
    input:
        "steps/claims.py",
        REPORTING_CODE,
        "params/claims.yaml",
        "params/paper.yaml",
        tables_made,
    output:
        shown_as("reports/claims.html", COMPARISONS, "The paper's claims, with a verdict each"),
        "reports/claims.md",
        "reports/claims.csv",
        "reports/claims.json",
    log:
        "logs/claims.log",
    conda:
        "../../environment.yml"
    params:
        tables=tables_there,
    shell:
        "python -m steps.claims 2>&1 | tee {log:q}"
