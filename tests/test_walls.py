"""Arrows between the project's files point one way, and the guard that says so sees every form of import."""

from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.import_graph import ROOMS, circles, graph, is_step, wrong_arrows


@pytest.fixture(scope="module")
def project() -> dict[str, set[str]]:
    return graph(ROOT)


def test_every_folder_of_steps_is_a_room_with_arrows_of_its_own() -> None:
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "steps").rglob("*.py")}
    assert folders - {"steps"} == ROOMS - {"kernels"}, "name the room and what it may import in tests/import_graph.py"


def test_arrows_between_rooms_point_one_way_and_no_step_imports_another(project: dict[str, set[str]]) -> None:
    assert wrong_arrows(project) == []


def test_no_import_leads_back(project: dict[str, set[str]]) -> None:
    assert circles(project) == []


def test_a_step_is_what_has_a_command_line(project: dict[str, set[str]]) -> None:
    with_one = {name for name in project if '__name__ == "__main__"' in (ROOT / name).read_text()}
    assert {name for name in project if is_step(name)} == {name for name in with_one if name.startswith("steps/")}


RANKS, LOOP, OP = "steps/evaluation/exact_ranks.py", "steps/training/loop.py", "kernels/a/op.py"
FILES, SPLIT = "steps/common/files.py", "steps/data/split.py"
MODELS, HSTU = "steps/models/__init__.py", "steps/models/hstu.py"
#: A file, what is planted in it, and what that imports.
WRONG = {
    "import a": (OP, "import steps", "steps/__init__.py"),
    "import of a folder alone": (OP, "import tests", "tests"),
    "import a.b": (OP, "import steps.common.files", FILES),
    "import a.b as c": (OP, "import torch, workflow.generate as g", "workflow/generate.py"),
    "from a import b": (OP, "from tests import runs", "tests/runs.py"),
    "from a.b import c": (FILES, "from steps.data.split import cut", SPLIT),
    "from a.b import module": (FILES, "from steps.data import split", SPLIT),
    "from package import name": (SPLIT, "from steps.models import build", MODELS),
    "one of several": (SPLIT, "from steps import (\n    common,\n    models,\n)", MODELS),
    "relative, of a module": (HSTU, "from ..training.loop import run", LOOP),
    "relative, of a name": (HSTU, "from ..training import loop", LOOP),
    "relative, in a package": (MODELS, "from ..evaluation import exact_ranks", RANKS),
    "in a function": (RANKS, "def f():\n    import steps.training.loop", LOOP),
    "in a branch": (RANKS, "if 0:\n    import steps.training.loop", LOOP),
    "a name in quotes": (OP, "importlib.import_module('steps.models')", MODELS),
    "a name in quotes, by a bare function": (OP, "import_module('steps.data.split')", SPLIT),
    "a relative name in quotes": (SPLIT, "import_module('..models.hstu', __package__)", HSTU),
    "a name in quotes, by __import__": (OP, "x = __import__('steps.data.split')", SPLIT),
    "a step by a step": ("steps/train.py", "from steps import evaluate", "steps/evaluate.py"),
    "a step's function by a step": ("steps/train.py", "from .evaluate import main", "steps/evaluate.py"),
    "a step by a room": (LOOP, "from steps.evaluate import main", "steps/evaluate.py"),
    "a step by a study": ("steps/studies/kernels.py", "from steps.preprocess import main", "steps/preprocess.py"),
    "another step by the study of two": ("steps/studies/preprocessing.py", "import steps.train", "steps/train.py"),
    "reports by a study": ("steps/studies/kernels.py", "import steps.reporting.task", "steps/reporting/task.py"),
    "a step by the workflow": ("workflow/generate.py", "import steps.train", "steps/train.py"),
    "tests by a step": ("steps/train.py", "import tests.runs", "tests/runs.py"),
    "the workflow by a step": ("steps/train.py", "import workflow.generate", "workflow/generate.py"),
}
RIGHT = {
    "steps/train.py": "from steps.training.loop import run\nfrom steps.common import files",
    "steps/training/loop.py": "from steps.models import build\nfrom steps.evaluation import exact_ranks",
    "steps/models/__init__.py": "from steps.models.hstu import HSTU",
    "steps/models/hstu.py": "from kernels.a import op\nfrom steps.data import split",
    "steps/studies/preprocessing.py": "from steps import preprocess, validate\nfrom steps.common.files import read",
    "kernels/a/__init__.py": "from .op import attention\nimport steps_of_others, testsuite",
    "tests/runs.py": "from steps.train import main",
    "workflow/generate.py": "from steps.common import files",
}


def planted(root: Path, **more: str) -> dict[str, set[str]]:
    """The graph of a small tree that breaks no rule, but for the imports that are planted in it."""
    files = RIGHT | {
        file: ""
        for _, (file, _, other) in WRONG.items()
        for file in (file, other)
        if file not in RIGHT and file != "tests"
    }
    files |= {f"steps/{name}/__init__.py": "" for name in ("common", "data", "evaluation", "training")}
    files |= {"steps/__init__.py": "", "steps/validate.py": "", "kernels/__init__.py": ""}
    for file, text in (files | more).items():
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{files.get(file, '')}\n{text}\n" if file in more else text)
    return graph(root)


def test_a_tree_that_breaks_no_rule_is_said_to(tmp_path: Path) -> None:
    found = planted(tmp_path)
    assert (wrong_arrows(found), circles(found)) == ([], [])
    assert found["steps/studies/preprocessing.py"] == {"steps/preprocess.py", "steps/validate.py", FILES}
    assert found["kernels/a/__init__.py"] == {"kernels/a/op.py"}


@pytest.mark.parametrize(("file", "text", "other"), WRONG.values(), ids=WRONG)
def test_a_planted_wrong_import_is_named(file: str, text: str, other: str, tmp_path: Path) -> None:
    assert wrong_arrows(planted(tmp_path, **{file: text})) == [f"{file} imports {other}"]


@pytest.mark.parametrize(
    ("planting", "circle"),
    [
        ({"steps/models/hstu.py": "from . import build"}, ["steps/models/__init__.py", "steps/models/hstu.py"]),
        ({"kernels/a/op.py": "def f():\n    from kernels.a import late"}, ["kernels/a/__init__.py", "kernels/a/op.py"]),
        (
            {"steps/data/split.py": "import steps.data.b", "steps/data/b.py": "from .c import x",
             "steps/data/c.py": "from .split import y"},
            ["steps/data/b.py", "steps/data/c.py", "steps/data/split.py"],
        ),
    ],
    ids=["package", "in a function", "of three"],
)  # fmt: skip
def test_a_planted_circle_is_named(planting: dict[str, str], circle: list[str], tmp_path: Path) -> None:
    assert circles(planted(tmp_path, **planting)) == [" -> ".join([*circle, circle[0]])]
