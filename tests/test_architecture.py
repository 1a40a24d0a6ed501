"""The house keeps its order: imports go one way and in no circle, files stay readable, importing is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys

from tests.conftest import ROOT

PACKAGE = ROOT / "recursive_jax"
#: Lowest first. A room may import itself and what stands below it.
ORDER = [
    {"errors", "identity", "storage", "csv_text", "config", "allocator", "waiting", "hosts"},
    {"mesh", "environment"},
    {"models"},
    {"data"},
    {"objectives"},
    {"train"},
    {"generate"},
    {"curate", "serve"},
    {"collapse"},
    {"rounds"},
    {"recipes"},
    {"plan"},
    {"cli"},
]
RANK = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
MODULES = {
    ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in PACKAGE.rglob("*.py")
}


def imports(file):
    """Modules of the package that a file imports, those inside functions included."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("recursive_jax"):
            for a in node.names:
                inner = f"{node.module}.{a.name}"
                found = inner if inner in MODULES else node.module
                if found != "recursive_jax":
                    yield found


def test_imports_go_down_only():
    wrong = []
    for name, file in MODULES.items():
        parts = name.split(".")
        if len(parts) == 1:
            continue
        wrong += [f"{name} imports {other}" for other in imports(file) if RANK[other.split(".")[1]] > RANK[parts[1]]]
    assert wrong == []


def test_no_module_imports_itself_by_a_detour():
    """Not even inside functions: a circle is two modules that cannot be understood apart. A package's own names
    (`__init__`) may come from its modules."""
    edges = {name: {o for o in imports(file) if o != name} for name, file in MODULES.items()}
    found, done = [], set()

    def visit(name, path):
        if name in path:
            found.append(" -> ".join([*path[path.index(name) :], name]))
            return
        if name in done:
            return
        for other in sorted(edges[name]):
            visit(other, [*path, name])
        done.add(name)

    for name in sorted(edges):
        visit(name, [])
    assert found == []


def test_files_stay_readable():
    long = [
        (str(f), n)
        for f in PACKAGE.rglob("*.py")
        if (n := len(f.read_text().splitlines())) > (150 if "recipes" in f.parts else 500)
    ]
    assert long == []


def test_importing_the_package_and_help_are_cheap():
    code = "import sys, recursive_jax; assert 'jax' not in sys.modules and len(recursive_jax.__all__) < 85"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys; sys.argv = ['recursive-jax', '--help']\n"
        "from recursive_jax import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'jax', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_rooms_that_are_verbs_are_modules_too():
    """`import recursive_jax.train.step as s` works as any import does, before and after the verb was used."""
    code = (
        "import recursive_jax as rj\n"
        "assert callable(rj.train) and callable(rj.generate) and callable(rj.collapse)\n"
        "import recursive_jax.train.step as s; import recursive_jax.generate.engine as e\n"
        "from recursive_jax.train import loop; import recursive_jax.collapse.suite as u\n"
        "assert s.step_program and e.Engine and loop.train and u.TEXT\n"
        "import inspect; assert 'objective' in inspect.signature(rj.train).parameters\n"
        "assert rj.objectives.DPO and rj.rewards.REWARDS and rj.rules.RULES and rj.recipes.RECIPES\n"
        "assert callable(rj.train)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist_and_are_documented():
    import recursive_jax

    for name in recursive_jax.__all__:
        assert getattr(recursive_jax, name).__doc__, name


def test_no_torch_or_tensorflow_in_the_core():
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not any(n.split(".")[0] in ("torch", "tensorflow") for n in names), file


def test_the_platform_comes_from_the_mesh():
    """`jax.default_backend()` is asked in one place, where there is no mesh to ask."""
    asking = [str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py") if "default_backend(" in f.read_text()]
    assert asking == ["mesh.py"]
