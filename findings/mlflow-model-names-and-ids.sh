#!/usr/bin/env bash
# mlflow 3.17.2: what a client says of a model, its registry and its artifacts do not fit together.
#
# `create_logged_model` refuses a name with a dot, which `create_registered_model` takes: a registered model cannot have
# a logged model of its name. `create_model_version` looks the logged model up in the process's own tracking store and
# not in the client's: without `set_tracking_uri` it does not find what the same client has just made. It takes the
# model's id, and every later read of the version gives None for it: the id has to be cut out of `source`. A relative
# `artifact_location` becomes an absolute one in `create_experiment`: a folder that moves with its SQLite store loses
# its artifacts.
#
# Seen: logged model a.b refused; version by the client alone: not found; model_id None, source models:/m-...; location
# file:///.../artifacts/first
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment mlflow==3.17.2
python - <<'PYTHON'
import os

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

client = MlflowClient("sqlite:///store.db", "sqlite:///store.db")
experiment = client.create_experiment("first", artifact_location="artifacts/first")
location = client.get_experiment(experiment).artifact_location
try:
    client.create_logged_model(experiment, "a.b")
    logged = "taken"
except MlflowException:
    logged = "refused"
client.create_registered_model("a.b")
run = client.create_run(experiment).info.run_id
model = client.create_logged_model(experiment, "a_b", run)
client.finalize_logged_model(model.model_id, "READY")
made = {"source": f"models:/{model.model_id}", "run_id": run, "model_id": model.model_id}
try:
    client.create_model_version("a.b", **made)
    alone = "found"
except MlflowException as error:
    alone = "not found" if "not found" in str(error) else str(error)
mlflow.set_tracking_uri("sqlite:///store.db")
client.create_model_version("a.b", **made)
version = client.get_model_version("a.b", "1")
print(f"logged model a.b {logged}; version by the client alone: {alone}; model_id {version.model_id}, "
      f"source {version.source}; location {location}")
assert logged == "refused", "changed: both kinds of names follow one rule"
assert alone == "not found", "changed: the registry asks the client's own store"
assert version.model_id is None, "changed: the version knows its model"
assert version.source == f"models:/{model.model_id}"
assert location != "artifacts/first", "changed: a relative location stays relative"
PYTHON
