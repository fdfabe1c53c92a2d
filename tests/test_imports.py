"""Imports point one way, from the programs down to the operators, wherever in a file they stand."""

import ast
from pathlib import Path

from programs import ROOT

# each may import itself and what stands before it
ORDER = [
    "involution.checks", "involution.pictures", "involution.cache", "involution.cores", "involution.outage",
    "involution.ops", "involution.unwatched", "involution.attention", "involution.kernel_generation",
    "involution.layers", "involution.sequence", "involution.calls", "involution.complexity", "involution.weights",
    "involution.conversion", "involution.models", "involution.folding", "involution.visualize", "involution.dense",
    "involution.loading", "involution.model_card", "involution.packages", "involution.export", "involution", "data",
    "involution.engine", "hydra_plugins", "scripts", "hubconf", "train", "eval",
]  # fmt: skip
UPWARDS = {("involution.models", "involution.dense")}  # create_model makes any network by its name
LEAVES = tuple(f"involution.{name}" for name in ("cache", "checks", "cores", "outage", "pictures"))  # of `data` too
CONFIGURATION = ("hydra", "omegaconf", "torch.distributed", "involution.engine")
LOOP = [f"involution.engine.{name}" for name in ("trainer", "learner", "evaluate", "meter", "guard")]


def within(module: str, packages: list[str] | tuple[str, ...]) -> list[str]:
    return [package for package in packages if f"{module}.".startswith(f"{package}.")]


def package(module: str) -> str | None:
    """The closest entry of ORDER; None: no module of ours. What `involution` itself offers belongs to it."""
    return max(within(module, ORDER), key=len, default=None)


def imports(path: Path, module: str) -> set[str]:
    """The modules that a file imports; a name taken from one counts as a module of it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = module.split(".")[: -node.level] if node.level else []
            found |= {".".join([*parent, *filter(None, [node.module]), each.name]) for each in node.names}
    return found


def test_imports_point_one_way():
    paths = [
        path for place in ("involution", "data", "hydra_plugins", "scripts") for path in (ROOT / place).rglob("*.py")
    ]
    paths += [ROOT / f"{name}.py" for name in ORDER[-3:]]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    wrong = []
    for module, path in modules.items():
        here, used = package(module.removesuffix(".__init__")), imports(path, module)
        upwards = [each for each in used if (other := package(each)) and ORDER.index(other) > ORDER.index(here)]
        wrong += [(module, each) for each in upwards if (here, package(each)) not in UPWARDS]
        if here == "data":
            wrong += [(module, each) for each in used if package(each) not in (None, "data", *LEAVES)]
        if ORDER.index(here) < ORDER.index("involution.engine"):
            wrong += [(module, each) for each in used if within(each, CONFIGURATION)]
    assert not wrong, "imports point downwards; a new module of involution has a place in ORDER"
    # the loop is told of tasks by their protocols alone
    tasks = {each for module in LOOP for each in imports(modules[module], module) if "engine.tasks" in each}
    protocols = ("Batch", "Evaluation", "Gallery", "Loader", "Task", "TrainLoader")
    assert tasks <= {f"involution.engine.tasks.{name}" for name in protocols}
    assert not {each for module in LOOP for each in imports(modules[module], module) if "engine.config" in each}
