"""Another domain's statistics for a model that a run has trained, from the command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distnorm import checkpoint
from distnorm.calibration import calibrate
from distnorm.domains import load_statistics, save_statistics
from distnorm.errors import ConfigError
from distnorm.launch.run_dir import RunFolder
from distnorm.settings import Settings
from distnorm.targets import Node, build, check_target

FILE = "statistics.pt"


def adapt(run: str | Path, name: str, data: Sequence[str] = (), num_samples: int = 1024) -> Path:
    """Measure evaluation statistics of a run's model on other data, unlabelled, and keep them in its folder by name.

    Args:
        run: the run's folder; its last checkpoint is taken.
        name: of the domain.
        data: overrides of the run's data, `data.root=/other/images`; its training split is measured.
        num_samples: samples to measure.

    Returns:
        The file, `statistics.pt` in the folder, that `distnorm.domains.load_statistics` reads; sets of other names that
        it holds stay.

    Collective: none.

    Raises:
        ConfigError: there is no run, an override is none of the data's, or `calibrate` refuses.
    """
    folder = RunFolder(Path(run))
    if not (folder.path / "config.yaml").is_file():
        raise ConfigError(
            f"{str(run)!r} is no folder of a run: it has no config.yaml. "
            "Give one that train.py printed, e.g. runs/<run>."
        )
    settings = folder.read_settings()
    module = build(_overridden(settings, data), device_batch=settings.device_batch)
    module.setup("fit")
    model = checkpoint.load(build(settings.model), folder.path)
    statistics = calibrate(model, module.train_dataloader(), num_samples)
    file = folder.path / FILE
    save_statistics(file, {**(load_statistics(file) if file.exists() else {}), name: statistics})
    return file


def _overridden(settings: Settings, data: Sequence[str]) -> Node:
    """Change the run's data as the overrides say."""
    for change in data:
        key, equals, _ = change.partition("=")
        if not (equals and key.startswith("data.")):
            raise ConfigError(
                f"{change!r} is no override of the data. Write data.<key>=<value>, e.g. data.root=/images."
            )
    try:
        changes = OmegaConf.from_dotlist([change.removeprefix("data.") for change in data])
        values: Any = OmegaConf.to_container(changes)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"{' '.join(data)}: {str(error).splitlines()[0]}. Give each key a plain value.") from None
    own = {key: value for key, value in settings.data.items() if key not in ("device_batch", "global_batch")}
    node: Node = own | values
    check_target("data", node, given=("device_batch",))
    return node
