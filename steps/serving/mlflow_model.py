"""A trained run as an MLflow model: a folder that `mlflow models serve` serves, without this clone."""

import importlib.metadata
import os
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steps.common.files import atomic_path, sha256
from steps.serving.recommender import Recommender
from steps.serving.run import load_run, popular

_PROJECT = Path(__file__).resolve().parents[2]
#: The code that goes with a model, and files and folders of it that do not.
_CODE = (
    "steps/__init__.py",
    *(f"steps/{room}" for room in ("common", "data", "evaluation", "models", "serving", "tasks")),
)
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "description", "generators", "tools", "*.md")
#: What that code imports, and MLflow itself; those that are installed.
_LIBRARIES = ("mlflow", "numpy", "rapidfuzz", "safetensors", "torch", "triton")
_EXAMPLE_LENGTH = 3
_NO_TIME = "1970-01-01 00:00:00"  # so that the same content is the same bytes; a registry has times of its own


def save_model(run: Path, data: Path, output: Path) -> None:
    """Write a trained run into the folder `output` as an MLflow model of flavour `python_function`, atomically.

    run: `runs/<experiment>/<dataset>/<model>/<protocol>/seed-N`, trained, of any model. data: its
    `data/processed/<dataset>`. output: replaced if it is there; its name is free.

    The folder is complete: weights, config, items with their titles, the code that scores, the signature, an input
    example, and the exact versions of the libraries. Nothing of any user of the data is in it. It may be copied, such
    as by `client.log_artifacts(run_id, output, "model")`, and then be registered.

        model = mlflow.pyfunc.load_model(output)
        model.predict([{"history": ["The Matrix", "id:2571"]}], params={"k": 3})

    The input is a list of histories, the output a list with an object for each:

        {"understood": {typed: title}, "recommendations": [{"item": id, "title": title, "score": number}, ...]}

    `understood` has the titles that texts were taken for which are none as they stand. Optional in an input:
    `timestamps`, as many as items, and `at`, when to recommend, in seconds since 1970. Params: `k` (10), how many;
    `seen` (false), whether items of the history may be recommended. What is wrong with a request is one line of text
    and HTTP status 400.

    The same run, data, code and libraries give the same bytes. Raises StepError if run and data do not belong together.
    """
    recommender, users = load_run(run, data)
    write_model(recommender, popular(users.sequences, _EXAMPLE_LENGTH), output)


def write_model(recommender: Recommender, example: Sequence[int], output: Path) -> None:
    """What `save_model` writes, of a recommender. example: the items of the history that is the input example."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow.pyfunc  # late: seconds
    from mlflow.models import Model

    history = [recommender.catalogue.typed(item) for item in example]
    with tempfile.TemporaryDirectory() as temporary, atomic_path(output) as unfinished:
        staged = Path(temporary)
        (staged / "recommender").mkdir()
        recommender.save(staged / "recommender")
        _copy_code(staged)
        mlflow.pyfunc.save_model(
            unfinished,
            loader_module="steps.serving.pyfunc",
            data_path=str(staged / "recommender"),
            code_paths=[str(staged / "kernels"), str(staged / "steps")],
            mlflow_model=Model(signature=_signature(), model_uuid=_id(staged), utc_time_created=_NO_TIME),
            input_example=([{"history": history}], {"k": 3}),
            pip_requirements=_requirements(),
        )


def _copy_code(folder: Path) -> None:
    shutil.copytree(_PROJECT / "kernels", folder / "kernels", ignore=_LEFT_OUT)
    for name in _CODE:
        if (_PROJECT / name).is_dir():
            shutil.copytree(_PROJECT / name, folder / name, ignore=_LEFT_OUT)
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(_PROJECT / name, folder / name)


def _id(folder: Path) -> str:
    """An id that the content of the folder's files decides, where MLflow would draw one."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return uuid.uuid5(uuid.NAMESPACE_OID, " ".join(sha256(path) for path in files)).hex


def _signature() -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Map, Object, ParamSchema, ParamSpec, Property, Schema

    history = [
        Property("history", Array(DataType.string)),
        Property("timestamps", Array(DataType.long), required=False),
        Property("at", DataType.long, required=False),
    ]
    recommendation = [
        Property("item", DataType.string),
        Property("title", DataType.string),
        Property("score", DataType.double),
    ]
    answer = [Property("understood", Map(DataType.string)), Property("recommendations", Array(Object(recommendation)))]
    signature = ModelSignature(
        inputs=Schema([ColSpec(Object(history))]),
        outputs=Schema([ColSpec(Object(answer))]),
        params=ParamSchema([ParamSpec("k", DataType.long, 10), ParamSpec("seen", DataType.boolean, False)]),
    )
    # So that MLflow hands over what JSON holds, and leaves the checks to the model: its own put the whole request and
    # lines of links around what is wrong. Of a class with a typed `predict` MLflow sets it itself.
    signature._is_signature_from_type_hint = True
    return signature


def _requirements() -> list[str]:
    found = []
    for name in _LIBRARIES:
        try:
            version = importlib.metadata.version(name).partition("+")[0]  # no index has `2.13.0+cpu`
            found.append(f"{name}=={version}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
