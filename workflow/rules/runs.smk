# One run of an experiment: its config, its training, its ranks.


rule plan:
    input:
        "steps/plan.py",
        "steps/common/params.py",
    output:
        f"{RUN}/config.json",
    log:
        f"logs/plan/{RUN}.log",
    conda:
        "../../environment.yml"
    params:
        config=resolved,
    shell:
        "python -m steps.plan --experiment {wildcards.experiment} --dataset {wildcards.dataset}"
        " --model {wildcards.model} --protocol {wildcards.protocol} --seed {wildcards.seed}"
        " --output {output} 2>&1 | tee {log}"


rule train:
    input:
        "steps/train.py",
        "steps/data/sequences.py",
        "steps/data/holdout.py",
        MODEL_CODE,
        TRAINING_CODE,
        config=f"{RUN}/config.json",
        data="data/processed/{dataset}",
    output:
        f"{RUN}/history.jsonl",
        f"{RUN}/model.safetensors",
        f"{RUN}/training.json",
    log:
        f"logs/train/{RUN}.log",
    conda:
        "../../environment.yml"
    threads: workflow.cores
    resources:
        gpu=1,
    params:
        run=lambda wildcards, output: Path(output[0]).parent,
    shell:
        "python -m steps.train --run {params.run} --data {input.data} 2>&1 | tee {log}"


rule evaluate:
    input:
        "steps/evaluate.py",
        "steps/data/sequences.py",
        "steps/data/holdout.py",
        MODEL_CODE,
        f"{RUN}/config.json",
        f"{RUN}/history.jsonl",
        f"{RUN}/model.safetensors",
        f"{RUN}/training.json",
        data="data/processed/{dataset}",
    output:
        f"{RUN}/metrics.json",
        f"{RUN}/ranks.safetensors",
    log:
        f"logs/evaluate/{RUN}.log",
    conda:
        "../../environment.yml"
    threads: workflow.cores
    resources:
        gpu=1,
    params:
        run=lambda wildcards, output: Path(output[0]).parent,
    shell:
        "python -m steps.evaluate --run {params.run} --data {input.data} 2>&1 | tee {log}"
