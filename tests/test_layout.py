"""The house: imports point downwards, in no circle, and no script imports another script."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = (  # from the ground up; a folder is one name
    {"kernels"},
    {"model", "flow", "checkpoint", "log", "masks", "windows", "common"},
    {"readers", "pretrained", "scenes"},
    {"pipeline", "data", "rewards", "measures", "benchmark"},
    {"factory"},
    {"train_reward", "train_scorer", "train_pefl", "train_omni", "make_cache", "make_pack", "make_prefs",
     "make_edits", "sample", "evaluate"},
    {"runs", "tests"},
)
FLOOR = {name: n for n, names in enumerate(FLOORS) for name in names}


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path, modules):
    """The modules of ours that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names <= modules else names | {node.module}  # of a package, or of a module
    return found & modules


def house():
    files = [p for p in ROOT.glob("*.py")]
    files += [p for name in ("kernels", "readers", "pretrained", "scenes", "factory", "runs", "tests",
                                                "tests/hostile")
              for p in (ROOT / name).glob("*.py")]
    modules = {module_of(p): p for p in files}
    return {name: imported(path, set(modules)) - {name} for name, path in modules.items()}


def floor(name):
    """A script that somebody adds, as a copy of one of ours, is a script."""
    return FLOOR.get(name.partition(".")[0], FLOOR["sample"])


def broken(arrows):
    """Arrows that climb, and those from script to script."""
    out = []
    for name, targets in arrows.items():
        here = floor(name)
        for target in targets:
            there = floor(target)
            scripts = here == there == FLOOR["sample"]
            if there > here or scripts:
                out.append(f"{name} -> {target}" + " (a script)" * scripts)
    return sorted(out)


def circle(arrows):
    """Names along a circle of imports, [] if there is none. A package's __init__ belongs to its modules."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name):] + [name]
        if name in done:
            return []
        path.append(name)
        for target in sorted(arrows[name]):
            if found := visit(target):
                return found
        done.add(path.pop())
        return []

    return next((found for name in sorted(arrows) if (found := visit(name))), [])


def test_imports_point_downwards():
    assert not broken(house())


def test_no_circle():
    assert not circle({k: v for k, v in house().items() if not k.startswith("tests")})


def test_the_test_sees_a_broken_house():
    arrows = {"common": {"data"}, "data": {"common"}, "sample": {"evaluate"}, "evaluate": set(),
              "train_mine": {"data", "sample"}}
    assert broken(arrows) == ["common -> data", "sample -> evaluate (a script)",
                              "train_mine -> sample (a script)"]
    assert circle(arrows) == ["common", "data", "common"]
