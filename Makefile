# Two commands for a new machine with Python 3.11 or 3.12: `make reproduce` and `make test`.

EXPERIMENT ?= demo
CORES ?= 2
PYTHON ?= $(shell for p in python3 python3.11 python3.12; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
EXTRA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
INSTALLED := .venv/installed-$(EXTRA)

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: reproduce test lint types pytest clusters doctor experiments ui track clean environment.yml dvc share tables

reproduce: $(INSTALLED)  ## the experiment from raw data to its tables (EXPERIMENT=ml-1m for MovieLens-1M)
	@python -m steps.doctor || echo "going on with plain torch"
	snakemake --cores $(CORES) --quiet rules -- $(EXPERIMENT)
	@snakemake --cores 1 --quiet rules --report reports/$(EXPERIMENT)/report.html -- $(EXPERIMENT)
	@echo; cat reports/$(EXPERIMENT)/table.md; echo
	@echo "Report:       reports/$(EXPERIMENT)/report.html (and table.csv, table.html, curves.svg beside it)"
	@echo "MLflow store: 'make ui' shows it, and prints where runs are compared"

test: lint types pytest  ## what CI runs

lint: $(INSTALLED)
	ruff format --check .
	ruff check .
	snakefmt --check Snakefile workflow
	snakemake --lint

types: $(INSTALLED)
	mypy

pytest: $(INSTALLED)  ## a process for each core; a file's tests share one, and tests/conftest.py orders the files
	pytest -n $(CORES) --dist loadfile --no-loadscope-reorder

clusters: $(INSTALLED)  ## install what tests of clusters and object storage need; Slurm itself: .ci/run
	.venv/bin/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[clusters]'

doctor: $(INSTALLED)  ## does this machine's torch fit its triton, fbgemm and CUDA?
	python -m steps.doctor

experiments: $(INSTALLED)  ## list the experiments: what they are about, how long they take, the data they need
	@python -m steps.experiments

ui: $(INSTALLED)  ## compare runs in the MLflow UI
	@python -m steps.ui --address http://127.0.0.1:5000
	@case "$$MLFLOW_TRACKING_URI" in http*) ;; *) MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
		mlflow server --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" \
		--host 127.0.0.1 --port 5000 --workers 1 ;; esac

track: $(INSTALLED)  ## bring an experiment's committed records into the MLflow store (EXPERIMENT=ml-1m)
	python -m steps.track --experiment $(EXPERIMENT) --runs reports/$(EXPERIMENT)/records \
		--reports reports/$(EXPERIMENT) --output reports/$(EXPERIMENT)/mlflow.json

OF_CLUSTERS := aiobotocore|aioitertools|boto3|botocore|durationpy|dvc-s3|jmespath|kubernetes|moto|oauthlib|py-partiql|\
requests-oauthlib|responses|s3fs|s3transfer|snakemake-(executor|storage)-plugin|websocket-client|xmltodict
OF_TORCHREC := lightning-utilities|pyre-extensions|pyvers|tensordict|torchmetrics|torchrec
environment.yml: constraints.txt  ## write conda's pins again from constraints.txt
	@sed -i '/^      - /d' $@
	@grep -vE '^(#|pip==|fbgemm-gpu==|nvidia-ml-py==|$(subst | ,|,$(OF_CLUSTERS))|$(OF_TORCHREC))' $< | sed 's/^/      - /' >> $@

dvc: $(INSTALLED)  ## let DVC go through the runs of the experiment or study (EXPERIMENT=ml-1m), as params/ has them
	python -m workflow.generate $(EXPERIMENT)

share: dvc  ## let DVC take over what Snakemake made of the experiment, so that `dvc repro` trains nothing again
	@python -m steps.check --experiment $(EXPERIMENT) --listed workflow/runs.yaml --output runs/$(EXPERIMENT)/checked.json
	dvc commit --quiet --force --with-deps workflow/dvc.yaml:track@$(EXPERIMENT) workflow/dvc.yaml:crate@$(EXPERIMENT)

tables: $(INSTALLED)  ## rebuild the tables of every committed record, the studies', claims, crates, and the pages
	python -m workflow.rebuild --cores $(CORES)

clean:  ## remove what runs made; data stays
	rm -rf runs logs .snakemake mlflow.db mlartifacts
	find reports/demo -mindepth 1 -maxdepth 1 ! -name records ! -name recommendations.json -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: needs Python 3.11 or 3.12 (python3 on the PATH, or PYTHON=...)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	# Python 3.11's own pip takes twice as long. Modules are compiled when they are first imported: few ever are.
	.venv/bin/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt pip
	.venv/bin/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[$(EXTRA),dev]'
	@touch $@
