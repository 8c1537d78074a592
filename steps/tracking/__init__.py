"""An experiment's finished runs in an MLflow store."""
