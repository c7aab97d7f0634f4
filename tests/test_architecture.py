"""What may import what, read from the source."""

import ast
import graphlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import mistral_eqx


PACKAGE = Path(mistral_eqx.__file__).parent
NAME = PACKAGE.name

# What every room sees: the exception, signals, bounded reading of files, declared checks, checks of JAX's keys and
# precisions, locks, the library of the C++ kernels; each sees those before it.
GROUND = ("errors", "interrupts", "documents", "checks", "arguments", "locks", "kernel_library")
# What each room sees, besides itself, the ground and other people's packages. A room that is not here sees nothing.
SEES = {
    "environment": set(),
    "rope": set(),
    "config": {"rope"},
    "presets": {"config", "rope"},
    "parallel": {"config"},
    "nn": {"rope", "config", "parallel"},
    "quant": {"config", "parallel", "nn"},
    "lora": {"config", "parallel", "nn", "quant"},
    "checkpoint": {"rope", "config", "presets", "parallel", "nn", "quant", "lora"},
    # A tokenizer is found and its GGUF header read as a model's is.
    "text": {"config", "presets", "checkpoint"},
    # From one checkpoint to another, its tokenizer included.
    "conversion": {"checkpoint", "text"},
    "pretrained": {"parallel", "nn", "quant", "checkpoint", "text"},
    "generation": {"config", "parallel", "nn"},
    "engine": {"config", "parallel", "nn", "lora", "generation", "text"},
    # HTTP, without JAX.
    "server": {"config", "engine", "text"},
    "train": {"config", "parallel", "nn", "quant", "lora"},
    "evaluate": {"config", "parallel", "nn", "generation"},
    "planning": {"config", "presets", "parallel", "nn", "quant", "generation", "train"},
}
# `python -m mistral_eqx`, and what it runs, see everything; the public names come from everywhere but there.
EVERYTHING = {"cli", "__main__"}
# The public names, and the package that has each of them, see all but those two.
PUBLIC = {"__init__", "public"}

# Functions of `jax.lax` that exchange something between devices.
COLLECTIVES = {
    "psum",
    "pmean",
    "pmax",
    "pmin",
    "psum_scatter",
    "all_gather",
    "all_to_all",
    "ppermute",
    "pshuffle",
    "pswapaxes",
    "pbroadcast",
    "ragged_all_to_all",
}


def _files():
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def _room(file):
    return file.removesuffix(".py").split("/")[0]


def _imported(file, tree):
    """The full names of all modules and names that a file imports, wherever in it, with the statement's line."""
    package = [NAME, *file.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def _edges(file, tree):
    """The rooms that a file sees; `__init__` stands for the package itself."""
    for name, line in _imported(file, tree):
        parts = name.split(".")
        if parts[0] == NAME:
            room = parts[1] if len(parts) > 1 else "__init__"
            inside = (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").exists()
            yield (room if inside else "__init__"), line


def _violations(files):
    for file, tree in files.items():
        room = _room(file)
        for seen, line in _edges(file, tree):
            if room == seen or room in EVERYTHING:
                continue
            below = GROUND[: GROUND.index(room)] if room in GROUND else GROUND
            allowed = seen not in EVERYTHING if room in PUBLIC else seen in {*below, *SEES.get(room, set())}
            if not allowed:
                yield f"{file}:{line} imports {seen}"


def test_imports_run_downward_only():
    files = _files()
    assert {"nn/model.py", "parallel/strategy.py", "checkpoint/loading.py", "generation/loop.py"} <= files.keys()
    assert {_room(file) for file in files} - EVERYTHING - {*PUBLIC, *GROUND} <= SEES.keys()
    assert list(_violations(files)) == []


def test_the_page_has_the_same_table():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `")]
    assert {room.strip(" `"): set(seen.replace("`", "").split()) for room, _, seen in rows} == SEES


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("nn/x.py", "from ..generation import loop"),
        ("nn/x.py", "from ..checkpoint.hub import locate"),
        ("nn/deep/x.py", "from ...text import load_tokenizer"),
        ("nn/x.py", "def f():\n    import mistral_eqx.quant"),
        ("nn/x.py", "from .. import presets"),
        ("nn/x.py", "from mistral_eqx import load"),
        ("parallel/x.py", "from ..nn import Linear"),
        ("generation/x.py", "from ..checkpoint import load"),
        ("checkpoint/x.py", "from ..cli.errors import fail"),
        ("config.py", "from .presets import PRESETS"),
        ("__init__.py", "from .cli import main"),
        ("newroom/x.py", "from ..nn import Linear"),
        ("errors.py", "from .documents import read_json"),
        ("checks.py", "from .config import MistralConfig"),
    ],
)
def test_an_import_upward_would_be_seen(file, line):
    found = list(_violations({file: ast.parse(line)}))
    # The name of a room that is not built yet counts as the package's own.
    assert len(found) == 1


def _file(name, files):
    """The file of the package that a full name stands for or stands in."""
    parts = name.split(".")[1:]
    for length in range(len(parts), 0, -1):
        module = "/".join(parts[:length])
        for file in (f"{module}.py", f"{module}/__init__.py"):
            if file in files:
                return file
    return "__init__.py"


def _when_loaded(tree):
    """A file without the bodies of its functions: what they import, they import when they are called."""

    class Bodies(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return ast.Pass()

    return Bodies().visit(ast.parse(ast.unparse(tree)))


def _circle(files):
    """Files that import each other in a circle when they are loaded or checked for types; `None` without one."""
    graph = {
        file: {
            seen
            for name, _ in _imported(file, _when_loaded(tree))
            if name.split(".")[0] == NAME and (seen := _file(name, files)) != file
        }
        for file, tree in files.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_no_files_import_each_other_in_a_circle():
    assert _circle(_files()) is None
    circle = {"nn/x.py": ast.parse("from .y import f"), "nn/y.py": ast.parse("if TYPE_CHECKING:\n  from .x import X")}
    assert set(_circle(circle)) == {"nn/x.py", "nn/y.py"}


@pytest.mark.slow
def test_torch_and_transformers_stay_out():
    found = {
        (file, name.split(".")[0])
        for file, tree in _files().items()
        for name, _ in _imported(file, tree)
        if name.split(".")[0] in ("torch", "transformers")
    }
    assert found == {("checkpoint/pth.py", "torch")}
    # There it is imported in functions alone: without torch the package still imports.
    top = [node for node in _files()["checkpoint/pth.py"].body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("torch" in ast.unparse(node) for node in top)


def _collectives(tree):
    """The lines on which a collective is named, as an attribute or by an import from JAX."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr in COLLECTIVES
            and ast.unparse(node.value) in ("lax", "jax.lax")
        ):
            yield node.lineno
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax"):
            yield from (node.lineno for alias in node.names if alias.name in COLLECTIVES)


def test_no_public_function_hides_its_file():
    """Else `import mistral_eqx.evaluate.score` would give the function."""
    functions = [value for name in mistral_eqx.__all__ if inspect.isfunction(value := getattr(mistral_eqx, name))]
    assert len(functions) > 20
    assert not [one for one in functions if one.__module__.split(".")[-1] == one.__name__]


def test_one_file_names_collectives():
    named = {file for file, tree in _files().items() if list(_collectives(tree))}
    assert named == {"parallel/collectives.py"}
    for text in ("y = jax.lax.all_gather(x, 'tp')", "from jax.lax import psum", "lax.ppermute"):
        assert list(_collectives(ast.parse(text)))


def _classes(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def _is_abstract(node):
    return any(
        "abstractmethod" in ast.unparse(decorator)
        for method in node.body
        if isinstance(method, ast.FunctionDef)
        for decorator in method.decorator_list
    )


def _inherit_wrongly(classes):
    """Modules that inherit from one that is not abstract, or are abstract under another name than `Abstract...`."""
    by_name = {node.name: node for node in classes}
    modules = {"Module"}
    while more := {
        name
        for name, node in by_name.items()
        if name not in modules and any(ast.unparse(base).split(".")[-1] in modules for base in node.bases)
    }:
        modules |= more
    for name in modules - {"Module"}:
        node = by_name[name]
        if _is_abstract(node) != name.startswith("Abstract"):
            yield f"{name} is abstract or has an abstract name, but not both"
        for base in node.bases:
            parent = ast.unparse(base).split(".")[-1]
            if parent in by_name and not _is_abstract(by_name[parent]):
                yield f"{name} inherits from {parent}, which is final"
        if "super()" in ast.unparse(node):
            yield f"{name} calls super()"


def test_every_module_is_abstract_or_final():
    classes = [node for tree in _files().values() for node in _classes(tree)]
    assert {"Linear", "AbstractWeight", "DenseWeight", "Mistral", "Cache"} <= {node.name for node in classes}
    assert list(_inherit_wrongly(classes)) == []


@pytest.mark.parametrize(
    "text",
    [
        "class A(eqx.Module): x: int\nclass B(A): y: int",
        "class A(eqx.Module):\n    @abc.abstractmethod\n    def f(self): ...",
        "class AbstractA(eqx.Module): x: int",
        "class A(eqx.Module):\n    def __init__(self):\n        super().__init__()",
    ],
)
def test_a_module_that_is_neither_would_be_seen(text):
    assert list(_inherit_wrongly(_classes(ast.parse(text))))


def test_modules_do_not_ask_where_they_run_or_what_they_have():
    asked = {
        (file, ast.unparse(node.func))
        for file, tree in _files().items()
        for node in ast.walk(tree)
        if _room(file) == "nn" and isinstance(node, ast.Call)
    }
    asked = {(file, name) for file, name in asked if name in ("hasattr", "isinstance", "jax.default_backend")}
    # A cache is made before there is an array that could tell its device; a tangent that is zero is told by its type,
    # and so are the layers of a model that have a weight. A block does not expect more of a layer of the user's than
    # that it can be called.
    found = {(f"nn/{file}.py", "isinstance") for file in ("block", "layers", "kernels/dense", "kernels/grouped")}
    assert asked == {("nn/buffer.py", "jax.default_backend"), *found}


def test_importing_the_package_starts_no_device():
    """A program may still choose its platform and its number of devices afterwards."""
    check = (
        "import sys, mistral_eqx\n"
        "assert 'jax' not in sys.modules\n"
        "mistral_eqx.generate\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
        "import jax\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "assert jax.device_count() == 3\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_trap_tests_needed_the_7b_weights():
    """What the tests bring along is small, and so is the one model that they fetch."""
    files = [path for path in Path(__file__).parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) > 50
    assert sum(path.stat().st_size for path in files) < 5 * 2**20
