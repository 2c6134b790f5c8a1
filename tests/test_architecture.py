"""The house rules that a reader should be able to rely on without reading everything."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("fedmix", "server", "client", "simulations")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
RUNS_CODE = {"eval", "exec", "compile", "__import__", "runpy.run_path", "os.system"}
RUNS_CODE |= {f"builtins.{name}" for name in ("eval", "exec", "compile", "__import__")}
UNPICKLES = {"torch.load", "torch.jit.load", "torch.hub.load", "pandas.read_pickle", "numpy.lib.format.read_array"}
UNPICKLES |= {f"yaml.{name}" for name in ("load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all")}
UNPICKLES |= {f"yaml.{name}" for name in ("Loader", "CLoader", "FullLoader", "CFullLoader", "UnsafeLoader", "CUnsafeLoader")}
UNPICKLES |= {  # these pickle what they send, and unpickle what comes
    f"torch.distributed.{name}"
    for name in ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list")
}


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Every import as (name in this file, full name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name.split(".")[0], alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    """``np.load`` as ``numpy.load``, whatever the file calls its imports; empty where it is no plain name."""
    if isinstance(node, ast.Attribute):
        owner = full_name(node.value, names)
        return f"{owner}.{node.attr}" if owner else ""
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def dangers(source: str) -> list[str]:
    """What in a file could run code that came as data."""
    tree = ast.parse(source)
    names = {name: full for name, full in imported(tree) if name != full.split(".")[0]}
    found = [full for _, full in imported(tree) if full.split(".")[0] in PICKLES or full in UNPICKLES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):  # called or handed on, as in map(eval, texts)
            found += [name] if (name := full_name(node, names)) in UNPICKLES | RUNS_CODE else []
        elif isinstance(node, ast.Call) and full_name(node.func, names) == "numpy.load":
            # Numpy reads arrays and nothing else, unless its third argument allows pickles; ** may hold that.
            found += ["numpy.load"] if len(node.args) > 2 or any(each.arg is None for each in node.keywords) else []
        elif isinstance(node, ast.keyword):
            is_false = isinstance(node.value, ast.Constant) and node.value.value is False
            found += [node.arg] if node.arg in ("allow_pickle", "trust_remote_code", "shell") and not is_false else []
    return found


def test_import_contracts_are_kept() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 broken" in result.stdout


def test_no_file_unpickles_or_runs_data() -> None:
    found = {str(path.relative_to(ROOT)): dangers(path.read_text()) for path in FILES}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib as j",
        "import torch as t\nt.load(p)",
        "from torch import load",
        "from torch import load as read\nread(p)",
        "import yaml\nyaml.load(t, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load",
        "import numpy as np\nnp.load(p, allow_pickle=True)",
        "import numpy as np\nnp.load(p, None, True)",
        "eval(text)",
        "exec(text)",
        "f = lambda: compile(t, '', 'exec')",
        "values = map(eval, texts)",
        "import builtins\nbuiltins.exec(text)",
        "import torch\nread = torch.load",
        "import torch.distributed as dist\ndist.broadcast_object_list(values)",
        "import torch\ntorch.jit.load(p)",
        "from yaml import SafeLoader, UnsafeLoader",
        "import numpy as np\nnp.load(p, **options)",
        "import subprocess\nsubprocess.run(t, shell=True)",
    ],
)
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import yaml\nyaml.safe_load(t)",
        "import numpy as np\nnp.load(p)",
        "import numpy as np\nnp.load(p, allow_pickle=False)",
        "import re\nre.compile('x')",
        "self.load(state)",
        "import numpy as np\nnp.load(p, mmap_mode='r')",
        "import torch.distributed as dist\ndist.broadcast(tensor)",
        "import subprocess\nsubprocess.run(words, shell=False)",
    ],
)
def test_the_search_lets_harmless_calls_pass(source: str) -> None:
    assert not dangers(source)


def test_nothing_inside_fedmix_imports_flower() -> None:
    science = [path for path in FILES if path.is_relative_to(ROOT / "fedmix")]
    found = {str(path): [full for _, full in imported(ast.parse(path.read_text())) if "flwr" in full] for path in science}
    assert {path: names for path, names in found.items() if names} == {}


def test_there_is_a_file_in_every_room() -> None:
    """An empty search would pass every test above."""
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(ROOMS)


def test_nothing_that_runs_at_a_site_reads_the_sex_or_age_of_a_shard() -> None:
    reading = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("sex", "age_band")
    }
    made_with = {
        *("fedmix/data/shard.py", "fedmix/data/shard_writer.py", "fedmix/data/layouts/table.py"),
        *("fedmix/data/prepare/pipeline.py", "fedmix/data/prepare/reading.py"),
    }
    assert reading == made_with | {"server/held_out.py"}  # preparing a shard, and the coordinator's own held-out set
