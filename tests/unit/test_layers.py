"""The layout: an import goes down a layer or stays inside its package, and the mathematics touches nothing else."""
import ast
import re
import sys

import pytest

from helpers import ROOT

# From the bottom up. A package imports itself and packages of lower layers.
LAYERS = [
    {"common"},
    {"models", "networks", "diffusion"},
    {"data", "autoencoder"},
    {"training", "sampling"},
    {"evaluation"},
    {"train", "sample", "sample_ddp", "evaluate", "extract_features", "download", "tools", "experiments", "benchmarks"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MATHEMATICS = {"models": set(), "networks": {"models"}, "diffusion": set()}  # what these may import of the project
LEAVES = {"tools": set(), "experiments": {"tools"}, "benchmarks": {"tools"}}  # the top layer: imported by nothing below
TOP_FILES = {f"{name}.py" for name in ("models", "train", "sample", "sample_ddp", "evaluate", "extract_features", "download")}


def project_files():
    skipped = {".venv", "tests", "demo"}
    return [path for path in sorted(ROOT.rglob("*.py")) if not skipped & set(path.relative_to(ROOT).parts)]


def package_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_modules(path):
    """Full names of the modules that a file imports, at any depth; relative imports stay inside their package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def imported_packages(path):
    return {name.split(".")[0] for name in imported_modules(path)}


@pytest.mark.parametrize("path", project_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_a_layer(path):
    package = package_of(path)
    assert package in LEVEL, f"{path} belongs to no layer: add its package to LAYERS"
    others = {name for name in imported_packages(path) if name in LEVEL and name != package}
    allowed = MATHEMATICS.get(package, {name for name in LEVEL if LEVEL[name] < LEVEL[package]}
                              | LEAVES.get(package, set()))
    assert others <= allowed


def test_top_level_holds_only_commands_and_models():
    assert {path.name for path in ROOT.glob("*.py")} == TOP_FILES


def test_no_import_cycle():
    """Depth first over the modules of the project; a package is its `__init__`."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
               for path in project_files()}
    finished, active = set(), []

    def visit(name):
        if name in finished or name not in modules:
            return
        assert name not in active, f"import cycle: {' -> '.join([*active[active.index(name):], name])}"
        active.append(name)
        for imported in top_level_imports(modules[name]):
            visit(imported)
        active.pop()
        finished.add(name)

    for name in modules:
        visit(name)


def top_level_imports(path):
    """Modules that are imported when the file is: not those that a function imports when it is called."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[:len(package) - node.level + 1], *([node.module] if node.module else [])]
                            if node.level else [node.module])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def test_mathematics_knows_no_files_and_no_command_line():
    for path in project_files():
        if package_of(path) in MATHEMATICS:
            assert not {"os", "sys", "argparse", "pathlib", "accelerate"} & imported_packages(path), path


def test_requirements_name_every_import():
    """Each package that the code imports is required, and environment.yml takes the same list."""
    required = set(re.findall(r"^([\w-]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    package = {"PIL": "pillow", "sklearn": "scikit-learn", "torch_fidelity": "torch-fidelity"}
    imported = {name for path in project_files() for name in imported_packages(path)}
    foreign = {name for name in imported if name not in sys.stdlib_module_names and name not in LEVEL}
    assert {package.get(name, name) for name in foreign} <= required
    assert "-r requirements.txt" in (ROOT / "environment.yml").read_text()
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text()
