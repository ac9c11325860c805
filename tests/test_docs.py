"""The code in the README and in the first steps runs when pasted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bayes_kfac import structures

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "docs/quickstart.md", "docs/laplace.md", "docs/loops.md", "docs/modules.md", "docs/optimizers.md"]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_one_after_another(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert blocks
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)
    assert capsys.readouterr().out
    assert (tmp_path / "posterior.safetensors").exists() == any(".save(" in block for block in blocks)


def test_the_page_of_structures_has_all_of_them():
    page = (ROOT / "docs" / "structures.md").read_text()
    for name in (*structures.available(), *structures.preconditioners()):
        assert f"### `{name}`" in page, "run benchmarks/report.py"


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
