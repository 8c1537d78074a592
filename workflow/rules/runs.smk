# One run of an experiment: its config, its training, its ranks.


rule plan:
    input:
        "steps/plan.py",
        "steps/common/params.py",
        "steps/common/dotted.py",
        "steps/data/split_hash.py",
        folder_or("data/processed/{dataset}", "manifest.json"),
    output:
        f"{RUN}/config.json",
    log:
        f"logs/plan/{RUN}.log",
    conda:
        "../../environment.yml"
    params:
        config=resolved,
    shell:
        "python -m steps.plan --experiment {wildcards.experiment:q} --dataset {wildcards.dataset:q}"
        " --model {wildcards.model:q} --protocol {wildcards.protocol:q} --seed {wildcards.seed}"
        " --data data/processed/{wildcards.dataset:q} --output {output:q} 2>&1 | tee {log:q}"


rule train:
    input:
        "steps/train.py",
        MODEL_CODE,
        TRAINING_CODE,
        f"{RUN}/config.json",
        folder_or("data/processed/{dataset}", "manifest.json"),
    output:
        f"{RUN}/history.jsonl",
        f"{RUN}/mllog.txt",
        f"{RUN}/model.safetensors",
        f"{RUN}/training.json",
    log:
        f"logs/train/{RUN}.log",
    conda:
        "../../environment.yml"
    threads: threads_of_run
    resources:
        gpu=1,
    params:
        run=lambda wildcards, output: Path(output[0]).parent,
    shell:
        "python -m steps.train --run {params.run:q} --data data/processed/{wildcards.dataset:q}" " 2>&1 | tee {log:q}"


rule evaluate:
    input:
        "steps/evaluate.py",
        MODEL_CODE,
        f"{RUN}/config.json",
        f"{RUN}/training.json",
        fetched(f"{RUN}/history.jsonl", f"{RUN}/model.safetensors"),
        folder_or("data/processed/{dataset}", "manifest.json"),
    output:
        f"{RUN}/metrics.json",
        f"{RUN}/outcomes.safetensors",
    log:
        f"logs/evaluate/{RUN}.log",
    conda:
        "../../environment.yml"
    threads: threads_of_run
    resources:
        gpu=1,
    params:
        run=lambda wildcards, output: Path(output[0]).parent,
    shell:
        "python -m steps.evaluate --run {params.run:q} --data data/processed/{wildcards.dataset:q}"
        " 2>&1 | tee {log:q}"
