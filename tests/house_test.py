"""The house's shape: imports go one way, calls stay narrow, summary lines are plain."""

import ast
import itertools
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "caprl_jax"
# Rooms from the ground up: each imports only itself and rooms of lower floors.
FLOORS = (
    ("errors", "files", "letters"),
    ("settings", "endpoint"),
    ("registry",),
    ("parallel",),
    ("models",),
    ("decode",),
    ("rl",),
    ("data",),
    ("report",),
    ("evaluate",),
    ("run", "config", "recipes"),
    ("commands",),
    ("train", "plan", "api"),
    ("adapters", "caption", "sweep"),
    ("curate", "similarity"),
    ("bench", "main", "protocols", ""),
    ("__main__",),  # a package's own program, too
)
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# Rooms of one floor that import one another: a config is made of run's settings.
NEIGHBOURS = {("run", "config"), ("config", "run"), ("recipes", "config")}


def modules():
    """(dotted name below caprl_jax, syntax tree) of every file of the package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield name, ast.parse(file.read_text())


TREES = dict(modules())


def imported(name, tree, anywhere=True):
    """Modules of the package that a module imports; those within functions too if anywhere."""
    nodes = ast.walk(tree) if anywhere else tree.body
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("caprl_jax"):
            base = node.module.removeprefix("caprl_jax").lstrip(".")
            for alias in node.names:
                full = f"{base}.{alias.name}".lstrip(".")
                yield full if full in TREES else base


def room(name):
    return "__main__" if name.endswith(".__main__") else name.split(".")[0]


def test_imports_go_one_way():
    wrong = [
        f"{name} imports {other}"
        for name, tree in TREES.items()
        for other in imported(name, tree)
        if name and other and room(name) != room(other)
        and FLOOR[room(other)] >= FLOOR[room(name)]
        and (room(name), room(other)) not in NEIGHBOURS
        and not (name == "" or other == "")
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_every_room_has_a_floor():
    rooms = {room(name) for name in TREES}
    assert rooms <= FLOOR.keys(), rooms - FLOOR.keys()


def test_no_modules_import_each_other_in_a_circle():
    graph = {n: set(imported(n, t, anywhere=False)) - {n, ""} for n, t in TREES.items()}
    done: set[str] = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for other in graph.get(name, ()):
            # A module's own package is imported with it, and must not need it back.
            visit(other, [*path, name])
        done.add(name)

    for name in graph:
        visit(name, [])


def functions():
    """(where, node, whether it is public) of every function of the package."""
    for name, tree in TREES.items():
        stack = [(tree, name, True)]
        while stack:
            parent, where, public = stack.pop()
            for node in ast.iter_child_nodes(parent):
                if isinstance(node, ast.ClassDef):
                    stack.append((node, f"{where}.{node.name}", public and node.name[0] != "_"))
                elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    inside = isinstance(parent, ast.Module | ast.ClassDef)
                    own = public and inside and (node.name[0] != "_" or node.name == "__init__")
                    yield f"{where}.{node.name}", node, own
                    stack.append((node, f"{where}.{node.name}", False))


def parameters(node):
    a = node.args
    names = [p.arg for p in itertools.chain(a.posonlyargs, a.args, a.kwonlyargs)]
    names += [p.arg for p in (a.vararg, a.kwarg) if p]
    return [n for n in names if n not in ("self", "cls")]


def test_no_public_function_has_more_than_six_parameters():
    wide = {w: len(parameters(n)) for w, n, public in functions() if public}
    assert len(wide) > 300  # or nothing was looked at
    assert not {w: n for w, n in wide.items() if n > 6}


def test_no_summary_line_opens_with_a_question_word():
    opening = re.compile(r"(Of|What|Which|Whose|Who|How|Where|Whether)\b")
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    found = [
        f"{name}: {doc.splitlines()[0]}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, kinds) and (doc := ast.get_docstring(node)) and opening.match(doc)
    ]
    assert not found, "\n".join(found)


def test_few_calls_are_laid_out_by_hand():
    mark = "# fmt" + ": skip"
    count = sum(f.read_text().count(mark) for f in ROOT.rglob("*.py") if ".venv" not in f.parts)
    assert count <= 15


def test_main_is_three_hops_from_the_reward():
    """main.py -> train.py -> rl/step.py -> rl/rewards."""
    hops = ("main", "train", "rl.step", "rl.rewards")
    for name, other in itertools.pairwise(hops):
        assert other in set(imported(name, TREES[name], anywhere=False)), (name, other)
    assert len((PACKAGE / "main.py").read_text().splitlines()) < 60
