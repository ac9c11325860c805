"""The code on the pages of the documentation runs when pasted, and gives what the pages say."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import torch

from bayes_kfac import structures

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "README.md",
    "docs/active.md",
    "docs/active_gaussian.md",
    "docs/botorch.md",
    "docs/cheat_sheet.md",
    "docs/gotchas.md",
    "docs/laplace.md",
    "docs/loops.md",
    "docs/metrics.md",
    "docs/migrating.md",
    "docs/modules.md",
    "docs/optimizers.md",
    "docs/plotting.md",
    "docs/predicting.md",
    "docs/pyro.md",
    "docs/quickstart.md",
    "docs/saving.md",
    "docs/sklearn.md",
    "docs/uncertainty.md",
]
#: Pages whose examples show their results, ``>>>``.
WORKED = ["docs/scale.md"]


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


@pytest.mark.parametrize("page", WORKED)
def test_worked_examples_give_what_they_say(page):
    tried = doctest.testfile(str(ROOT / page), module_relative=False)
    assert tried.attempted
    assert not tried.failed


def test_the_page_of_structures_has_all_of_them():
    page = (ROOT / "docs" / "structures.md").read_text()
    for name in (*structures.available(), *structures.preconditioners()):
        assert f"### `{name}`" in page, "run benchmarks/report.py"


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_a_table_of_contents():
    """Sphinx says so too, where it is installed."""
    entries = re.findall(r"^(?:.*<)?(\w+)>?$", (ROOT / "docs" / "index.md").read_text(), flags=re.MULTILINE)
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} <= set(entries)


def test_the_landing_page_runs_after_the_first_steps():
    first, landing = (
        re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), flags=re.DOTALL)[0]
        for name in ("quickstart.md", "index.md")
    )
    namespace: dict = {}
    for block in (first, landing.replace("epochs=40", "epochs=1")):
        exec(compile(block, "index.md", "exec"), namespace)
