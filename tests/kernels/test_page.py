"""docs/kernels.md: its code runs and prints what it says; its pictures of masks are the masks."""

import re
from pathlib import Path

import pytest
import torch

from kernels.hstu_attention.mask import Mask
from kernels.hstu_attention.naive import visible

PAGE = (Path(__file__).resolve().parents[2] / "docs/kernels.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
MASKS = [text for language, text in BLOCKS if language == "text"]


@pytest.mark.filterwarnings("ignore:_check_is_size:FutureWarning")  # fbgemm_gpu's
def test_the_code_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks one after the other: each may use what those before it have made."""
    code = [text for language, text in BLOCKS if language == "python"]
    assert len(code) == 2
    exec("\n".join(code), {})  # noqa: S102
    promised = re.findall(r"^print\(.*\)  # (.*)$", "\n".join(code), re.MULTILINE)
    assert len(promised) == 2
    assert capsys.readouterr().out.splitlines() == promised


@pytest.mark.parametrize("text", MASKS, ids=[text.split("\n")[0] for text in MASKS])
def test_a_picture_is_the_mask(text: str) -> None:
    """Its first line says how many tokens, or queries and keys, and the arguments."""
    first, *rows = text.splitlines()
    sizes, *arguments = first.split(", ")
    pairs = (argument.split() for argument in arguments)
    given = {name: value != "False" and int(value) for name, value in pairs}
    targets = torch.tensor([given.pop("num_targets")]) if "num_targets" in given else None
    counts = [int(number) for number in re.findall(r"\d+", sizes)]
    queries, keys = counts if len(counts) == 2 else counts * 2
    key_offsets = None if queries == keys else torch.tensor([0, keys])
    seen = visible(torch.tensor([0, queries]), max(counts), Mask(**given), targets, key_offsets)
    seen = seen[0, :queries, :keys]
    assert [" ".join("x" if one else "." for one in row) for row in seen.tolist()] == rows


def test_every_argument_of_a_mask_has_a_picture() -> None:
    headings = " ".join(text.splitlines()[0] for text in MASKS)
    assert [name for name in (*Mask._fields, "num_targets", "queries") if name not in headings] == []
