"""The house: imports go down only, `import distnorm` is light, the package is typed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import distnorm

pytestmark = pytest.mark.unit

ROOT = Path(distnorm.__file__).parent
LADDER = [
    ["errors", "positions", "drift.events", "drift.catalogue", "drift.thinning"],
    ["whereabouts", "lightning_names"],
    ["collectives", "spec", "evidence", "planner"],
    ["moments", "policy", "uneven", "feeding", "lookup"],
    ["norms"],
    ["changes", "flow", "selection", "conversion", "reading", "trained", "unsent"],
    ["biases", "identity", "before", "unseen"],
    ["owners"],
    ["convert", "fold"],
    [
        "population",
        "models",
        "drift.divergence",
        "drift.summary",
        "drift.record",
        "drift.capture",
        "drift.windows",
        "drift.losses",
        "agreement",
        "recording",
    ],
    [
        "swapping",
        "calibration",
        "checkpoint",
        "domains",
        "drift.noise",
        "drift.averages",
        "drift.health",
        "drift.gathering",
        "drift.gap",
        "drift.probes",
    ],
    ["drift.choice", "drift.alarms", "drift.measuring", "drift.snapshots", "drift.shift", "drift.precise"],
    ["drift.watch"],
    ["replay"],
    ["drift.questions"],
    [
        "data",
        "tasks",
        "drift.monitor",
        "drift.metric",
        "drift.wandb_file",
        "diagnosis",
        "freezing",
        "trainer_checks",
        "averaging",
        "layer_sync",
        "progress",
        "targets",
        "validation",
        "random_state",
        "loop_state",
        "study.design",
        "search.scales",
    ],
    ["evaluation"],
    ["settings", "search.design", "callbacks", "resume", "drift.history", "wandb_media"],
    ["drift.report", "search.plan"],
    ["launch.ranks", "figures"],
    [
        "launch.run_dir",
        "launch.console",
        "launch.endings",
        "launch.signals",
        "launch.comparison",
        "launch.environment",
        "launch.checkpoint_files",
    ],
    ["launch.preemption", "launch.requeue", "launch.failures", "launch.resumption"],
    ["launch.preflight"],
    ["wandb_logger", "search.rungs", "search.claims", "search.folder"],
    ["tracking", "launch.checkpoints", "launch.local", "launch.report", "launch.overrides", "launch.adaptation"],
    ["launch.trainer", "launch.compose", "study.workers", "study.training"],
    ["study.cells", "study.measure", "search.trials"],
    ["study.table", "launch.doctor"],
    ["study.claims", "study.figure"],
    ["study.conduct", "search.results", "search.figure", "sweep"],
    ["search.conduct"],
    ["launch.entry", "launch.slurm"],
    ["cli"],
]
HEAVY = {
    "lightning",
    "torchmetrics",
    "hydra",
    "omegaconf",
    "wandb",
    "sklearn",
    "matplotlib",
    "pydantic",
    "rich",
    "numpy",
}
LIGHT_ROOMS = {room for floor in LADDER[:13] for room in floor}


def room_of(module):
    """The ladder's name for `distnorm.a.b`: its longest listed prefix."""
    parts = module.removeprefix("distnorm").strip(".").split(".")
    names = {name for floor in LADDER for name in floor}
    return next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in names), None)


def imports():
    """Each (file, its room, a module it imports, whether at import time) of the package."""
    for file in sorted(ROOT.rglob("*.py")):
        module = "distnorm." + ".".join(file.relative_to(ROOT).with_suffix("").parts)
        module = module.removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from ((file, module, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: a relative import"
                submodules = [f"{node.module}.{alias.name}" for alias in node.names]
                is_module = [(ROOT.parent / Path(*name.split("."))).with_suffix(".py").exists() for name in submodules]
                yield from (
                    (file, module, name if found else node.module)
                    for name, found in zip(submodules, is_module, strict=True)
                )


def test_every_file_stands_on_the_ladder():
    for file in ROOT.rglob("*.py"):
        module = "distnorm." + ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if file.name != "__init__.py":
            assert room_of(module), f"{module} is not in the table"
        assert file.stem not in {"utils", "helpers", "common", "misc"}
        assert len(file.read_text().splitlines()) <= 300, f"{file} is too long"


def test_imports_go_down():
    floor = {name: height for height, names in enumerate(LADDER) for name in names}
    seen = 0
    for file, module, imported in imports():
        if not imported.startswith("distnorm") or file.name == "__init__.py" or imported == "distnorm":
            continue
        here, there = room_of(module), room_of(imported)
        seen += 1
        assert here == there or floor[there] < floor[here], f"{file}: {here} imports {there}, that is not below it"
    assert seen > 50


def test_no_cycle_inside_a_room_either():
    graph = {}
    for _, module, imported in imports():
        if imported.startswith("distnorm."):
            graph.setdefault(module, set()).add(imported)

    def visit(module, path):
        assert module not in path, f"cycle: {' → '.join([*path, module])}"
        for following in graph.get(module, ()):
            if following != module:
                visit(following, [*path, module])

    for module in graph:
        visit(module, [])


def test_light_rooms_import_torch_and_nothing_heavier():
    for file, module, imported in imports():
        top = imported.split(".")[0]
        if room_of(module) in LIGHT_ROOMS:
            assert top not in HEAVY, f"{file} imports {imported}"
        if room_of(module) in {"policy", "spec", "planner", "evidence"}:
            assert top in {*sys.stdlib_module_names, "distnorm"}
        if room_of(module) in {"positions", "whereabouts"}:
            assert top in {*sys.stdlib_module_names, "distnorm"}


def test_only_collectives_and_the_launcher_know_torch_distributed():
    for file, module, imported in imports():
        if imported.startswith("torch.distributed"):
            assert room_of(module) in {"collectives", "launch.local"}, f"{file} imports {imported}"


def test_only_settings_and_launch_know_hydra():
    for file, module, imported in imports():
        if imported.split(".")[0] in {"hydra", "omegaconf"}:
            assert module in {"distnorm.settings", "distnorm.targets"} or module.startswith("distnorm.launch"), (
                f"{file} imports {imported}"
            )


def test_importing_distnorm_loads_nothing_heavy():
    code = "import sys, torch; before = set(sys.modules); import distnorm; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "distnorm.norms.sync" in loaded
    assert not {name.split(".")[0] for name in loaded} & HEAVY


@pytest.mark.parametrize(
    "typed", ["norm=snyc", "norm.normalisation_batch=8", "data.device_batch=-1", "optimizer.lr=fast"]
)
def test_a_mistake_is_refused_before_what_takes_seconds_to_load(typed):
    command = [sys.executable, "-X", "importtime", "train.py", typed]
    said = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT.parent).stderr
    loaded = {
        line.split("|")[-1].strip().split(".")[0] for line in said.splitlines() if line.startswith("import time:")
    }
    assert {"torch", "hydra", "pydantic"} <= loaded
    assert not loaded & {"lightning", "torchmetrics", "wandb", "sklearn", "matplotlib", "scipy"}
    assert typed.split("=")[0] in said.splitlines()[-1] or typed.split("=")[0] in said.splitlines()[-2]


def test_public_names_are_few_and_documented():
    public = [name for name in vars(distnorm) if name[0] != "_" and not isinstance(getattr(distnorm, name), type(sys))]
    assert len(public) <= 20
    assert all(getattr(distnorm, name).__doc__ for name in public)


def test_the_package_is_typed_and_answers_its_version():
    assert (ROOT / "py.typed").exists()
    answer = subprocess.run(
        [sys.executable, "-m", "distnorm.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == f"distnorm {distnorm.__version__}"


def test_train_py_is_a_table_of_contents():
    lines = (ROOT.parent / "train.py").read_text().splitlines()
    assert len(lines) <= 80
    assert not [line for line in lines if line.strip().startswith("if ") and "norm" in line]
