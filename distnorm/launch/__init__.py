"""From a command line to ranks that train: the only rooms, with `settings`, that know Hydra."""

from distnorm.launch.entry import main as main
