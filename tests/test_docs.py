"""The Python code of the documentation runs: each page from top to bottom, in a new process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[1]


def code_of(page: str) -> list[str]:
    """Return a page's Python blocks."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def run(code: str, folder: Path) -> str:
    script = folder / "page.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script.name], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", ["docs/plugging_in.md", "docs/verifying_kernels.md", "docs/writing_a_pass.md"])
def test_a_guide_runs_from_top_to_bottom(page: str, tmp_path: Path) -> None:
    assert run("\n".join(code_of(page)), tmp_path)


def test_the_readme_runs_from_top_to_bottom(tmp_path: Path) -> None:
    tiny.save(tmp_path / "path" / "to" / "model")
    (tmp_path / "notes.txt").write_text(tiny.TEXT * 2000)
    summary, *blocks = code_of("README.md")
    assert "parofx.quantize(model" in summary  # the two lines at the top, in which nothing is defined
    # What the reader has is a model and a text; this one's is small.
    code = "\n".join(blocks).replace(
        "parofx.quantize(model, ", "parofx.quantize(model, parofx.ParoConfig(group_size=32), "
    )
    assert "quantized 14 linears" in run(code, tmp_path)
