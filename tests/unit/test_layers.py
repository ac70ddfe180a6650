"""The layout: an import goes down a layer or stays in its package, and the mathematics depends on nothing else."""
import ast
import itertools
import re
import sys

import pytest

from helpers import ROOT

COMMANDS = {"train", "sample", "sample_ddp", "evaluate", "extract_features", "download", "convert"}
# From the bottom up. A package imports itself and packages of lower layers.
LAYERS = [
    {"common"},
    {"models", "networks", "diffusion", "transport"},
    {"data", "autoencoder"},
    {"training", "sampling"},
    {"evaluation"},
    COMMANDS | {"tools", "experiments", "benchmarks"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# All that they may import of the project.
MATHEMATICS = {"models": set(), "networks": {"models"}, "diffusion": set(), "transport": set()}
OPTIONAL = {"torchdiffeq"}  # packages imported where they are used; requirements-dev.txt names them
USES_TOOLS = {"experiments", "benchmarks"}  # the only imports between packages of the top layer


def project_files():
    skipped = {".venv", "tests"}
    return [path for path in sorted(ROOT.rglob("*.py")) if not skipped & set(path.relative_to(ROOT).parts)]


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_of(path):
    return module_name(path).split(".")[0]


def import_nodes(path):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]


def imported_modules(path):
    """List the full names of what a file imports, at any depth: modules, and names in them that may be modules."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in import_nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            continue
        parents = package[:len(package) - node.level + 1] if node.level else ()
        base = ".".join([*parents, *([node.module] if node.module else [])])
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_packages(path):
    return {name.split(".")[0] for name in imported_modules(path)}


@pytest.mark.parametrize("path", project_files(), ids=module_name)
def test_imports_go_down_a_layer(path):
    package = package_of(path)
    assert package in LEVEL, f"{path} belongs to no layer: add its package to LAYERS"
    lower = {name for name in LEVEL if LEVEL[name] < LEVEL[package]}
    allowed = MATHEMATICS.get(package, lower | ({"tools"} if package in USES_TOOLS else set()))
    assert (imported_packages(path) & LEVEL.keys()) - {package} <= allowed


@pytest.mark.parametrize("path", project_files(), ids=module_name)
def test_imports_are_absolute_outside_the_processes(path):
    if package_of(path) not in ("diffusion", "transport"):
        assert not [node.lineno for node in import_nodes(path) if getattr(node, "level", 0)]


def test_no_module_imports_a_test():
    """Only the soak test, a tool, shares the helpers of the tests."""
    for path in project_files():
        tests = {name for name in imported_packages(path) if re.match(r"(test_.*|tests|conftest|helpers)$", name)}
        assert tests <= ({"helpers"} if module_name(path) == "tools.soak" else set()), path


def test_top_level_holds_only_commands_and_models():
    assert {path.stem for path in ROOT.glob("*.py")} == COMMANDS | {"models"}


def test_no_import_cycle():
    """Also not by an import inside a function. Depth first over the modules; a package is its `__init__`."""
    modules = {module_name(path): path for path in project_files()}
    finished, active = set(), []
    def visit(name):
        if name in finished or name not in modules:
            return
        assert name not in active, f"import cycle: {' -> '.join([*active[active.index(name):], name])}"
        active.append(name)
        for imported in imported_modules(modules[name]):
            if imported != name:  # `from . import x` in an `__init__` names the package itself
                visit(imported)
        active.pop()
        finished.add(name)

    for name in modules:
        visit(name)


def test_mathematics_knows_no_files_and_no_command_line():
    for path in project_files():
        if package_of(path) in MATHEMATICS:
            assert not {"os", "sys", "argparse", "pathlib", "accelerate"} & imported_packages(path), path


def test_models_is_short_and_knows_one_block_type():
    text = (ROOT / "models.py").read_text()
    assert len(text.splitlines()) < 350
    others = ("in-context", "incontext", "cross-attention", "crossattention", "single", "vitblock", "pixart",
              "conditionings", "block_types")
    assert not [name for name in others if name in text.lower()]


def test_requirements_name_every_import():
    required = set(re.findall(r"^([\w-]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    package = {"PIL": "pillow", "sklearn": "scikit-learn", "torch_fidelity": "torch-fidelity"}
    imported = set(itertools.chain.from_iterable(imported_packages(path) for path in project_files()))
    foreign = imported - LEVEL.keys() - set(sys.stdlib_module_names) - {"helpers"} - OPTIONAL
    assert {package.get(name, name) for name in foreign} <= required
    for_tests = (ROOT / "requirements-dev.txt").read_text()
    assert "-r requirements.txt" in (ROOT / "environment.yml").read_text() and "-r requirements.txt" in for_tests
    assert set(re.findall(r"^([\w-]+)", for_tests, re.MULTILINE)) >= OPTIONAL
