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
    assert {"wush_jax", "wush_jax.formats.format", "pallas_kernels.reference"} <= set(FILES)
    assert "pallas_kernels.reference" in IMPORTS["wush_jax.transforms.pair"]


def test_kernels_import_only_jax():
    """They receive the format as an argument; numpy and the standard library are everywhere."""
    allowed = {"jax", "jaxlib", "numpy", "pallas_kernels", *sys.stdlib_module_names}
    strangers = {m: roots(m) - allowed for m in FILES if m.startswith("pallas_kernels")}
    assert not {m: names for m, names in strangers.items() if names}


# Floors, lowest first: an import goes to a lower floor or stays on its own.
FLOORS = [
    "storage",
    "formats",
    "transforms",
    "solvers",
    "layers",
    "models",
    "checkpoints",
    "calibration",
    "evaluation",
    "commands",
]
KERNEL_FLOORS = ["shared", "hopper", "library", "dispatch", "benchmarks"]
MATHEMATICS = ("formats", "transforms", "solvers")


def floor(module):
    """The folder of a module; the roofs are those that people call, above all floors."""
    package, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    if package == "wush_jax":
        return FLOORS.index(room) if room in FLOORS else len(FLOORS)
    shared = ("reference", "normed", "checks", "repack", "fragments", "stacks")
    if room in (*shared, "exactly", "folded", "precision", "tuned"):
        room = "shared"
    return KERNEL_FLOORS.index(room) if room in KERNEL_FLOORS else len(KERNEL_FLOORS)


def test_every_folder_is_a_floor_with_a_door():
    folders = {p.name for p in (ROOT / "wush_jax").iterdir() if (p / "__init__.py").exists()}
    assert folders == set(FLOORS)
    files = {p.name for p in (ROOT / "wush_jax").glob("*.py")}
    assert files == {"__init__.py", "__main__.py", "cli.py"}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_down(package):
    up = [
        f"{module} -> {name}"
        for module in FILES
        if module.startswith(f"{package}.")
        for name in IMPORTS[module] & set(FILES)
        if name.partition(".")[0] == package and floor(name) > floor(module)
    ]
    assert not up
    assert floor("wush_jax.storage.tensor_file") < floor("wush_jax.formats.scales")  # teeth
    assert floor("wush_jax.cli") > floor("wush_jax.commands.demo")


@pytest.mark.parametrize("room", MATHEMATICS)
def test_the_mathematics_works_without_flax(room):
    """Neither imported there nor by anything that is imported there."""
    seen, todo = set(), [name for name in FILES if name.startswith(f"wush_jax.{room}.")]
    assert todo
    while todo:
        name = todo.pop()
        assert not {"flax", "optax", "rich", "matplotlib"} & roots(name), name
        seen.add(name)
        todo += IMPORTS[name] & set(FILES) - seen


def test_doors_only_open():
    """A floor's ``__init__`` hands names on and computes nothing."""
    doors = [FILES[f"wush_jax.{name}"] for name in FLOORS] + [FILES["wush_jax"]]
    for path in doors:
        for node in ast.parse(path.read_text("utf8")).body:
            listed = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert listed or text or isinstance(node, ast.ImportFrom), (path, ast.unparse(node))


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
    """The budget is about 45 things to learn."""
    names = [n for n, v in public(package).items() if callable(v)]
    assert len(names) <= 45, sorted(names)


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
    for folder in ("tests", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            lines[f"wush_jax.{folder}.{path.stem}"] = len(path.read_text("utf8").splitlines())
    assert not {m: n for m, n in lines.items() if n > budget[m.partition(".")[0]]}


def public_definitions(node, prefix):
    """Functions, classes and their methods that are nobody's secret, with their names."""
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.ClassDef) or child.name.startswith("_"):
            continue
        yield f"{prefix}.{child.name}", child
        if isinstance(child, ast.ClassDef):
            yield from public_definitions(child, f"{prefix}.{child.name}")


TREES = {module: ast.parse(path.read_text("utf8")) for module, path in FILES.items()}
DEFINITIONS = [pair for module, tree in TREES.items() for pair in public_definitions(tree, module)]


def test_everything_public_has_a_docstring():
    assert len(DEFINITIONS) > 300
    missing = [name for name, node in DEFINITIONS if not ast.get_docstring(node)]
    missing += [module for module, tree in TREES.items() if not ast.get_docstring(tree)]
    assert not missing


def own_lines(node):
    """Lines of a function's body behind its docstring, without the functions inside it."""
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    inner = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.FunctionDef)]
    nested = sum(n.end_lineno - n.lineno + 1 for n in inner)
    return node.end_lineno - body[0].lineno + 1 - nested


def test_functions_are_short():
    """About 40 lines; a function that needs more than 50 is two."""
    functions = [
        (module, node)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    sizes = {f"{module}.{node.name}": own_lines(node) for module, node in functions}
    assert not {name: lines for name, lines in sizes.items() if lines > 50}


# Identical code of so many lines in two files is one function that is missing.
REPEATED = 12


def code_lines(path):
    """Lines of code without blanks, comments, docstrings and imports, indentation removed."""
    text = path.read_text("utf8")
    skipped = set()
    for node in ast.walk(ast.parse(text)):
        string = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if string or isinstance(node, ast.Import | ast.ImportFrom):
            skipped.update(range(node.lineno, node.end_lineno + 1))
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if n not in skipped]
    return [(n, line) for n, line in lines if line and not line.startswith("#")]


def repeated(paths, length):
    """Places of blocks that are in two files: (file, line) pairs."""
    seen, found = {}, []
    for path in paths:
        lines = code_lines(path)
        for i in range(len(lines) - length + 1):
            block = tuple(line for _, line in lines[i : i + length])
            first = seen.setdefault(block, (path, lines[i][0]))
            if first[0] != path:
                found.append((first, (path, lines[i][0])))
    return found


def test_no_code_is_there_twice(tmp_path):
    folders = [*PACKAGES, "tests", "examples"]
    paths = sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))
    assert not [tuple(f"{p.name}:{line}" for p, line in two) for two in repeated(paths, REPEATED)]
    for name, indent in (("a.py", ""), ("b.py", "    ")):  # the check has teeth
        body = "".join(f"{indent}x{i} = {i}\n" for i in range(REPEATED))
        (tmp_path / name).write_text(f"if True:\n{body}" if indent else body)
    assert len(repeated(sorted(tmp_path.iterdir()), REPEATED)) == 1


def texts():
    """All that people read: code, tests, pages, settings; not this file's own patterns."""
    folders = [*PACKAGES, "tests", "examples", "docs"]
    paths = [p for f in folders for p in (ROOT / f).rglob("*")] + list(ROOT.glob("*.*"))
    kinds = (".py", ".md", ".toml", ".json", ".yml", ".txt")
    return [p for p in paths if p.suffix in kinds and p.is_file() and p.name != "test_house.py"]


# Folders of somebody's machine, and names of tools that are no part of the work.
FOREIGN = re.compile(
    r"/work/|/tmp/\w|/home/\w|/Users/\w|/root/|"
    r"\b(claude|anthropic|chatgpt|openai|copilot|co-authored-by|language model wrote)\b",
    re.IGNORECASE,
)


def test_nothing_tells_of_the_machine_or_of_who_wrote_it():
    found = {
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in texts()
        for match in FOREIGN.finditer(path.read_text("utf8"))
    }
    assert len(texts()) > 100
    assert not found


def test_nothing_is_left_to_do():
    marker = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"]))
    folders = [*PACKAGES, "tests", "examples", "docs"]
    paths = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".md")]
    assert paths
    assert not [str(p) for p in paths if marker.search(p.read_text("utf8"))]
