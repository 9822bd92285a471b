"""The laws of the house, read from the sources: imports, cycles, sizes, documentation."""

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest

import pallas_kernels
import wush_jax

ROOT = Path(wush_jax.__file__).parents[1]
PACKAGES = ("wush_jax", "pallas_kernels")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
}


def imports(module, path):
    """Names imported anywhere in a file, functions included: submodules where there are such."""
    base = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text("utf8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parts = base.split(".")
                source = ".".join([*parts[: len(parts) + 1 - node.level], *filter(None, [source])])
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield name if name in FILES else source


IMPORTS = {module: set(imports(module, path)) for module, path in FILES.items()}


def roots(module):
    return {name.partition(".")[0] for name in IMPORTS[module]}


def test_the_sources_are_here():
    assert {"wush_jax", "wush_jax.formats", "pallas_kernels.reference"} <= set(FILES)
    assert "pallas_kernels.reference" in IMPORTS["wush_jax.transforms"]


def test_kernels_import_only_jax():
    """They receive the format as an argument; numpy and the standard library are everywhere."""
    allowed = {"jax", "jaxlib", "numpy", "pallas_kernels", *sys.stdlib_module_names}
    strangers = {m: roots(m) - allowed for m in FILES if m.startswith("pallas_kernels")}
    assert not {m: names for m, names in strangers.items() if names}


CORE = "numerics scales formats linalg moments transforms rtn gptq scale_search recipe linear"


@pytest.mark.parametrize("room", CORE.split())
def test_the_mathematics_works_without_flax(room):
    """Neither imported here nor by anything that is imported here."""
    seen, todo = set(), [f"wush_jax.{room}"]
    while todo:
        name = todo.pop()
        assert not {"flax", "optax", "rich", "matplotlib"} & roots(name), name
        seen.add(name)
        todo += IMPORTS[name] & set(FILES) - seen


def test_no_import_cycles():
    graph = {m: names & set(FILES) - {m} for m, names in IMPORTS.items()}
    state = {}

    def visit(module, path):
        if state.get(module) == "done":
            return
        assert state.get(module) != "open", f"cycle: {' -> '.join([*path, module])}"
        state[module] = "open"
        for name in sorted(graph[module]):
            visit(name, [*path, module])
        state[module] = "done"

    for module in sorted(graph):
        visit(module, [])


def public(package):
    return {
        name: value
        for name, value in vars(package).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }


@pytest.mark.parametrize("package", [wush_jax, pallas_kernels], ids=PACKAGES)
def test_public_names_are_few(package):
    """The budget is about 25 things to learn; formats are one of them."""
    names = [n for n, v in public(package).items() if callable(v)]
    assert len(names) <= 30, sorted(names)


@pytest.mark.parametrize("package", [wush_jax, pallas_kernels], ids=PACKAGES)
def test_public_names_are_documented(package):
    missing = [
        name
        for name, value in public(package).items()
        if callable(value)
        and not re.search(r">>> |Args:\n|Attributes:\n", inspect.getdoc(value) or "")
    ]
    assert not missing


def test_files_are_small():
    budget = {"wush_jax": 350, "pallas_kernels": 400}
    lines = {m: len(path.read_text("utf8").splitlines()) for m, path in FILES.items()}
    assert not {m: n for m, n in lines.items() if n > budget[m.partition(".")[0]]}


def test_nothing_is_left_to_do():
    marker = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"]))
    folders = [*PACKAGES, "tests", "examples", "docs"]
    paths = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".md")]
    assert paths
    assert not [str(p) for p in paths if marker.search(p.read_text("utf8"))]
