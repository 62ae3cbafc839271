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


PAGES = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))


def prose_of(page: str) -> str:
    """Return a page without its code."""
    return re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: str) -> set[str]:
    """Return what links may name of a page: its headings in lower case, with dashes, without punctuation."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links_of(page: str) -> list[str]:
    """Return the links within the repository that name a file or a heading that is not there."""
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose_of(page)):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors_of(str(target))):
            broken.append(link)
    return broken


def test_links_within_the_repository_lead_somewhere() -> None:
    assert {page: broken for page in PAGES if (broken := broken_links_of(page))} == {}


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
