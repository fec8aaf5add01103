"""The house: imports point down, a run never sees a prediction, no file grows beyond one concept."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("theory", "simulators", "nets", "validation")
MAY_IMPORT = {
    "theory": {"theory"},
    "simulators": {"theory", "simulators"},
    "nets": {"theory", "nets"},
    "validation": set(FOLDERS),
}
VOCABULARY = {
    "theory", "theory.problem", "theory.schedule", "theory.trajectory", "theory.observables", "theory.minibatch",
    "theory.diagonal", "theory.streams", "theory.relu_network", "theory.relu_init", "theory.relu_problems",
    "theory.relu_published", "theory.sparsity", "theory.collapse_data", "theory.device", "theory.independent_neurons",
    "theory.lanes", "theory.normals", "theory.threads",
}  # fmt: skip


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = {p for p in parts if (ROOT / (p.replace(".", "/") + ".py")).exists()}
            found |= inside or {node.module}
    return {name for name in found if name.split(".")[0] in FOLDERS}


def modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).glob("*.py"))
    assert found, f"{folder}/ holds no module"
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_down(folder):
    for path in modules(folder):
        for name in imports(path):
            assert name.split(".")[0] in MAY_IMPORT[folder], f"{path.relative_to(ROOT)} imports {name}"


def test_a_run_never_sees_a_prediction():
    for path in modules("nets"):
        for name in imports(path):
            assert name in VOCABULARY or name.startswith("nets"), f"{path.relative_to(ROOT)} imports {name}"


def test_there_are_no_cycles_between_modules():
    graph = {path.stem: imports(path) for folder in FOLDERS for path in modules(folder) if path.stem != "__init__"}
    names = {f"{f}.{p.stem}": imports(p) for f in FOLDERS for p in modules(f)}
    assert graph
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in names.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in names:
        visit(name, ())


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_files_stay_readable(folder):
    for path in modules(folder):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, f"{path.relative_to(ROOT)} is too long"
