"""The code in the documentation runs as it stands, one block after another."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("page", ["docs/checkpoints.md", "docs/offload.md", "docs/precision.md", "docs/weights.md"])
def test_code_of_a_page_runs(page):
    text = (ROOT / page).read_text()
    names = {}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], page, "exec"), names)  # so that an error names the page's own line
    assert names, "the page has no code"
