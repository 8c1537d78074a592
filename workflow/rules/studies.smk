# Studies: what is measured beside experiments, and its reports.


rule plan_study:
    input:
        "steps/plan_study.py",
        "steps/common/params.py",
        "steps/common/dotted.py",
        "steps/common/config.py",
        "steps/common/studies.py",
    output:
        "runs/studies/{study}/settings.json",
    log:
        "logs/plan_study/{study}.log",
    conda:
        "../../environment.yml"
    params:
        settings=settings_of,
    shell:
        "python -m steps.plan_study --study {wildcards.study:q} --output {output:q} 2>&1 | tee {log:q}"


rule study:
    input:
        "steps/study.py",
        "steps/common/device.py",
        "steps/common/threads.py",
        "steps/studies/rows.py",
        "runs/studies/{study}/settings.json",
        data_of_study,
    output:
        "runs/studies/{study}/rows.json",
    log:
        "logs/study/{study}.log",
    conda:
        "../../environment.yml"
    threads: ALL_CORES
    resources:
        gpu=lambda wildcards: int(settings_of(wildcards)["device"] == "cuda"),
    shell:
        "python -m steps.study --settings runs/studies/{wildcards.study:q}/settings.json"
        " --output {output:q} 2>&1 | tee {log:q}"


rule report_study:
    input:
        "steps/report_study.py",
        "steps/common/params.py",
        "steps/common/dotted.py",
        "steps/common/svg.py",
        "steps/reporting/figures.py",
        "steps/common/paired.py",
        "steps/studies/rows.py",
        lambda wildcards: sorted(map(str, Path("steps/studies").glob(f"{settings_of(wildcards)['module']}_*.py"))),
        "runs/studies/{study}/rows.json",
    output:
        shown_as("reports/studies/{study}/figure.svg", MEASURED, "Figure"),
        update("reports/studies/{study}/rows.json"),
        "reports/studies/{study}/table.md",
        "reports/studies/{study}/table.csv",
        "reports/studies/{study}/figure.png",
        "reports/studies/{study}/figure-dark.svg",
        "reports/studies/{study}/figure-dark.png",
    log:
        "logs/report_study/{study}.log",
    conda:
        "../../environment.yml"
    params:
        shown=lambda wildcards: params.load(f"studies/{wildcards.study}"),
    shell:
        "python -m steps.report_study --study {wildcards.study:q} --rows runs/studies/{wildcards.study:q}/rows.json"
        " --output reports/studies/{wildcards.study:q} 2>&1 | tee {log:q}"
