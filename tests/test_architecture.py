"""The house keeps its order: imports go one way, files stay readable, importing is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys

from tests.conftest import ROOT

PACKAGE = ROOT / "recursive_jax"
#: Lowest first. A room may import itself and what stands below it.
ORDER = [
    {"errors", "model_config", "config", "allocator"},
    {"mesh"},
    {"models"},
    {"objectives", "data"},
    {"train", "curate"},
    {"generate"},
    {"collapse"},
    {"rounds"},
    {"recipes"},
    {"cli", "cli_generate", "cli_lab"},
]
RANK = {room: i for i, rooms in enumerate(ORDER) for room in rooms}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("recursive_jax"):
            names = [node.module] if node.module != "recursive_jax" else [f"recursive_jax.{a.name}" for a in node.names]
            yield from ((n.split(".") + [""])[1] for n in names)


def test_imports_go_down_only():
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        wrong += [f"{file.relative_to(ROOT)} imports {other}" for other in imports(file) if RANK[other] > RANK[room]]
    assert wrong == []


def test_files_stay_readable():
    long = [
        (str(f), n)
        for f in PACKAGE.rglob("*.py")
        if (n := len(f.read_text().splitlines())) > (150 if "recipes" in f.parts else 500)
    ]
    assert long == []


def test_importing_the_package_and_help_are_cheap():
    code = "import sys, recursive_jax; assert 'jax' not in sys.modules and len(recursive_jax.__all__) < 64"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys; sys.argv = ['recursive-jax', '--help']\n"
        "from recursive_jax import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


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
