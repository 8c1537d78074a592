"""Recommendations of a trained run: for users of its data, for typed histories, and as a model that MLflow serves."""
