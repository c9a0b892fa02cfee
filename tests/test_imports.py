"""Rules on imports and on calls that could run foreign code, checked in the syntax trees."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from conftest import ROOT

SCRIPTS = ["prepare", "train", "sample"]
FILES = {path.stem: path for path in ROOT.glob("*.py")}
FILES |= {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.glob("glyphgpt/**/*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
OTHERS = [
    path for path in ROOT.glob("*/**/*.py") if path.parts[len(ROOT.parts)] in ("bench", "docs", "config", "lessons")
]

FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "importlib"}
FORBIDDEN_BUILTINS = {"eval", "exec", "__import__"}
FORBIDDEN_FUNCTIONS = {"torch.load", "torch.save", "os.system", "os.popen"}
FORBIDDEN_KEYWORDS = {"shell", "allow_pickle"}


def outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        type_checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not (type_checking or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            yield node
            yield from outside_functions(node)


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Return the modules that import statements name; `from a import b` names both a and a.b."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def own_imports(nodes: Iterator[ast.AST]) -> set[str]:
    """Return the imported modules that are scripts or belong to the package."""
    return imported(nodes) & TREES.keys()


ALL_IMPORTS = {name: own_imports(ast.walk(tree)) for name, tree in TREES.items()}
IMPORT_TIME = {name: own_imports(outside_functions(tree)) for name, tree in TREES.items()}


def test_modules_are_found() -> None:
    assert {*SCRIPTS, "model", "glyphgpt.settings", "glyphgpt.cli", "glyphgpt.data.dataset"} < TREES.keys()


@pytest.mark.parametrize("name", TREES)
def test_import_directions(name: str) -> None:
    """Scripts import the model and the package; the package imports no script, and the model in functions only."""
    allowed = {module for module in TREES if module.partition(".")[0] == "glyphgpt"}
    if name == "model":
        allowed = set()
    elif name in SCRIPTS:
        allowed |= {"model"}
    assert IMPORT_TIME[name] <= allowed
    assert ALL_IMPORTS[name] <= allowed | ({"model"} if name.startswith("glyphgpt.") else set())
    assert not [module for module in imported(ast.walk(TREES[name])) if module.startswith(".")]


def test_prepare_does_not_import_the_model() -> None:
    assert "model" not in ALL_IMPORTS["prepare"]


def test_no_import_cycles() -> None:
    dependencies = {name: modules - {"glyphgpt"} for name, modules in ALL_IMPORTS.items()}
    assert set(TopologicalSorter(dependencies).static_order()) >= TREES.keys() - {"glyphgpt"}


def test_prepare_does_not_import_torch() -> None:
    reached, new = set(), {"prepare"}
    while new:
        reached |= new
        new = set().union(*(IMPORT_TIME[name] for name in new)) - reached
    assert {"glyphgpt.data.recipes", "glyphgpt.data.tokenizers", "glyphgpt.errors"} < reached
    for name in reached:
        assert not [m for m in imported(outside_functions(TREES[name])) if m.partition(".")[0] == "torch"]


def find_dangers(tree: ast.AST) -> set[str]:
    """Return the modules, functions and keywords in a syntax tree that could run foreign code."""
    found = {module.partition(".")[0] for module in imported(ast.walk(tree))} & FORBIDDEN_MODULES
    found |= imported(ast.walk(tree)) & FORBIDDEN_FUNCTIONS
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_BUILTINS:
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in FORBIDDEN_FUNCTIONS:
            found.add(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_KEYWORDS and ast.unparse(node.value) != "False":
            found.add(node.arg)
    return found


@pytest.mark.parametrize("path", [*FILES.values(), *OTHERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_foreign_code(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    allowed = {"torch.load"} if path == FILES["glyphgpt.convert.nanogpt"] else set()
    assert find_dangers(tree) == allowed
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if ast.unparse(call.func) == "torch.load":
            assert ast.unparse(call).endswith("weights_only=True)"), "torch.load must not unpickle objects"


@pytest.mark.parametrize(
    ("code", "danger"),
    [
        ("import pickle", "pickle"),
        ("def f():\n    from pickle import loads", "pickle"),
        ("import importlib.util", "importlib"),
        ("torch.load(path, weights_only=True)", "torch.load"),
        ("from torch import load", "torch.load"),
        ("read = torch.load", "torch.load"),
        ("eval(text)", "eval"),
        ("run = exec", "exec"),
        ("os.system(text)", "os.system"),
        ("subprocess.run(text, shell=True)", "shell"),
        ("subprocess.run(text, shell=wanted)", "shell"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
    ],
)
def test_find_dangers(code: str, danger: str) -> None:
    assert find_dangers(ast.parse(code)) == {danger}


@pytest.mark.parametrize(
    "code", ["model.eval()", "torch.compile(model)", "np.load(path, allow_pickle=False)", "run(words, shell=False)"]
)
def test_find_dangers_ignores_harmless_calls(code: str) -> None:
    assert find_dangers(ast.parse(code)) == set()
