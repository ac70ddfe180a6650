"""The README: its Python block runs, its links lead to files, and its commands have the flags that it shows."""
import re

import torch

from helpers import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_library_example_runs_and_its_samples_are_not_clipped():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    names = {}
    exec(code.replace("DiT-B/4", "DiT-S/8").replace("ddim50", "ddim2"), names)
    assert names["losses"]["loss"].shape == (8,) and names["samples"].shape == (8, 16, 32, 48)
    assert names["samples"].abs().max() > 1


def test_links_lead_to_files():
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)", text):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_code_spans_name_files_that_exist():
    for page in PAGES:
        for path in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|md|json))`", page.read_text()):
            assert (ROOT / path).exists() or (page.parent / path).exists(), f"{page.name}: {path}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) < 1200
