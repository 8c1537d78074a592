"""docs/kernels.md: its code runs and prints what it says; its pictures of masks are the masks."""

import re
from pathlib import Path

import pytest
import torch

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
    first, *rows = text.splitlines()
    tokens, *arguments = first.split(", ")
    given = {name: int(value) for name, value in (argument.split() for argument in arguments)}
    targets = torch.tensor([given["num_targets"]]) if "num_targets" in given else None
    assert given.keys() <= {"max_attn_len", "contextual_seq_len", "num_targets"}
    n = int(tokens.removesuffix(" tokens"))
    seen = visible(torch.tensor([0, n]), n, given.get("max_attn_len", 0), given.get("contextual_seq_len", 0), targets)
    assert [" ".join("x" if one else "." for one in row) for row in seen[0].tolist()] == rows
