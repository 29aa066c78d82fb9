"""The typed schema of conf/: every key, its type and range, and the checks across keys, before anything is built.

One pydantic model checks what Hydra has composed, whatever way a value came in; nodes with a `_target_` are checked
against the signature of what they build. An error names the key as one types it, the value, the rule and what to type
instead.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from distnorm import validation
from distnorm.errors import ConfigError
from distnorm.policy import TASKS, decide
from distnorm.spec import EVALUATIONS, KINDS, NormSpec
from distnorm.targets import Node, check_takes, check_target, check_value

DEFAULT_DEVICE_BATCH = 16
AtLeastOne = Annotated[int, Field(ge=1, strict=True, description="a whole number of at least 1", examples=[16])]
Many = Annotated[int, Field(ge=1, strict=True, description="a whole number of at least 1", examples=[1024])]
Flag = Annotated[bool, Field(description="true or false", examples=["true"])]
Seconds = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
Auto = Literal["auto"]
_PRECISIONS = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}


def _with_words_as_keys(value: Any) -> Any:
    """Take `0` and `0.1`, names of layers in an `nn.Sequential`, as the words they are."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RenormSettings(_Strict):
    """How far batch renormalization corrects, and from when."""

    r_max: Annotated[float, Field(ge=1, strict=True)] = Field(description="a factor of at least 1", examples=[3.0])
    d_max: Annotated[float, Field(ge=0, strict=True)] = Field(description="0 or more deviations", examples=[5.0])
    warmup: Annotated[int, Field(ge=0, strict=True)] = Field(description="a number of steps", examples=[200])
    ramp: Annotated[int, Field(ge=0, strict=True)] = Field(description="a number of steps", examples=[800])


class NormSettings(_Strict):
    """Who shares statistics: the arguments of `distnorm.decide`, and how many samples precise statistics take."""

    kind: Literal[KINDS]  # type: ignore[valid-type]  # pydantic reads it at run time
    normalization_batch: AtLeastOne
    min_normalization_batch: AtLeastOne
    exact: Flag
    sync_ranks: AtLeastOne | None
    groups: AtLeastOne
    renorm: RenormSettings
    task: Literal[TASKS]  # type: ignore[valid-type]
    pretrained: Flag
    iid: Flag
    foldable: Flag
    memory_bound: Flag
    max_overhead: Annotated[float, Field(ge=0, strict=True)] = Field(
        description="a share of the step's time, 0 or more", examples=[0.1]
    )
    internode_latency_us: Annotated[float, Field(gt=0, strict=True)] = Field(
        description="microseconds, above 0", examples=[5.0]
    )
    step_ms: Annotated[float, Field(gt=0, strict=True)] | None = Field(
        description="milliseconds, above 0", examples=[50.0]
    )
    momentum: Auto | Annotated[float, Field(gt=0, le=1, strict=True)] | None = Field(
        description="a number in (0, 1], auto, or null", examples=[0.1]
    )
    evaluation: Literal["auto", *EVALUATIONS]  # type: ignore[valid-type]
    calibration_samples: Many
    frozen_last: Annotated[float, Field(ge=0, lt=1, strict=True)] | None = Field(
        description="a share of the training, from 0 to below 1", examples=[0.2]
    )
    include: list[str] = Field(description="a list of globs of layer names", examples=["[layer4.*]"])
    exclude: list[str] = Field(description="a list of globs of layer names", examples=["[head]"])
    layers: Annotated[dict[str, Any] | None, BeforeValidator(_with_words_as_keys)] = Field(
        description="kinds by globs of layer names", examples=["{layer4.*: group}"]
    )


class TrainerSettings(_Strict):
    """On what, and for how long."""

    accelerator: Literal["auto", "cpu", "gpu"]
    devices: AtLeastOne | Auto = Field(description="a whole number of at least 1, or auto", examples=[2])
    num_nodes: AtLeastOne | Auto = Field(description="a whole number of at least 1, or auto", examples=[2])
    ranks_from: Literal["auto", "local", "torchrun", "slurm"]
    precision: Annotated[
        Literal["32-true", "64-true", "bf16-mixed", "16-mixed"],
        BeforeValidator(lambda value: _PRECISIONS.get(str(value), value)),
    ]
    max_epochs: AtLeastOne
    max_steps: AtLeastOne | Literal[-1] = Field(
        description="a whole number of at least 1, or -1 for no limit", examples=[1000]
    )
    check_val_every_n_epoch: AtLeastOne
    log_every_n_steps: AtLeastOne
    accumulate_grad_batches: AtLeastOne
    gradient_clip_val: Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)] | None = Field(
        description="a number above 0", examples=[1.0]
    )
    ema: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = Field(  # runs of before have none
        default=None, description="the decay of an average, above 0 and below 1, or null for none", examples=[0.999]
    )
    threads_per_rank: AtLeastOne | None
    timeout_s: Seconds = Field(description="seconds, above 0", examples=[300])
    checkpoint_every_s: Seconds = Field(description="seconds, above 0", examples=[600])
    time_limit_s: Seconds | None = Field(description="seconds, above 0, or null", examples=[3600])
    requeue: Flag
    progress_every_s: Seconds = Field(description="seconds, above 0", examples=[10])
    lightning: dict[str, Any]


class DriftSettings(_Strict):
    """Which drift measures, how often, and what an alarm does: arguments of `DriftMonitor`."""

    kind: Literal["none", "light", "full"]
    interval: AtLeastOne
    include: list[str] = Field(description="a list of globs of layer names", examples=["[layer4.*]"])
    exclude: list[str] = Field(description="a list of globs of layer names", examples=["[head]"])
    on_alarm: Literal["warn", "stop"]
    worst_layers: AtLeastOne
    gap_interval: AtLeastOne
    probe_interval: AtLeastOne | None


class LoggerSettings(_Strict):
    """Where wandb writes."""

    mode: Literal["offline", "online", "disabled"]
    project: str = Field(description="a name", examples=["distnorm"])
    entity: str | None
    name: str | None
    group: str | None
    tags: list[str]


class Settings(_Strict):
    """A whole run."""

    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = Field(
        description="a whole number from 0 to 4294967295", examples=[0]
    )
    ckpt_path: str | None
    debug: Flag
    runs_dir: str
    data: Node
    model: Node
    task: Node
    norm: NormSettings
    optimizer: Node
    trainer: TrainerSettings
    drift: DriftSettings
    logger: LoggerSettings
    study: Node | None = None
    search: Node | None = None

    @property
    def device_batch(self) -> int:
        """Samples one device sees per forward."""
        return int(self.data["device_batch"])

    def decide(self, world_size: int, ranks_per_node: int, channels: Sequence[int] = ()) -> NormSpec:
        """Ask the policy for these settings on so many ranks.

        Args:
            world_size: ranks.
            ranks_per_node: ranks on one machine.
            channels: of each batch norm of the model, for the price; none: ResNet-50's.
        """
        asked = self.norm.model_dump(exclude={"calibration_samples"})
        return decide(self.device_batch, world_size, ranks_per_node=ranks_per_node, channels=channels or None, **asked)

    def with_batches(self, world_size: int) -> "Settings":
        """Fill in what follows from the number of ranks: `device_batch` from `global_batch`, or the other way round.

        Raises:
            ConfigError: both are given and disagree, or the global batch does not divide over the ranks.
        """
        device, whole = self.data.get("device_batch"), self.data.get("global_batch")
        if device is None and whole is not None:
            if whole % world_size:
                raise ConfigError(
                    f"data.global_batch={whole} does not divide over {world_size} ranks. "
                    f"Use a multiple of {world_size}, e.g. data.global_batch={-(-whole // world_size) * world_size}.",
                )
            device = whole // world_size
        elif device is None:
            device = DEFAULT_DEVICE_BATCH
        elif whole is not None and whole != device * world_size:
            raise ConfigError(
                f"data.device_batch={device} on {world_size} ranks is {device * world_size} samples a step, and "
                f"data.global_batch={whole} asks for another number. Give one of the two.",
            )
        return self.model_copy(
            update={"data": {**self.data, "device_batch": device, "global_batch": device * world_size}}
        )

    def to_yaml(self) -> str:
        """Write the resolved settings, ready for `from_yaml`."""
        return OmegaConf.to_yaml(OmegaConf.create(self.model_dump()))


def check(config: DictConfig) -> Settings:
    """Turn a composed configuration into `Settings`, or say what is wrong with it.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        settings = Settings.model_validate(values)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} is missing, and has no default. Add {error.full_key}=…") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}. Give it a plain value.") from None
    except ValidationError as error:
        raise ConfigError(validation.in_words(error, Settings)) from None
    for name in ("device_batch", "global_batch"):
        check_value(f"data.{name}", settings.data.get(name), AtLeastOne | None)
    check_target("model", settings.model)
    check_target("optimizer", settings.optimizer, given=("params",))
    data = {key: value for key, value in settings.data.items() if key not in ("device_batch", "global_batch")}
    check_target("data", data, given=("device_batch",))  # from here on targets may load Lightning, which takes seconds
    check_takes("data", data, "device_batch")
    check_target("task", settings.task, given=("model", "optimizer"))
    return settings


def check_fit(settings: Settings, data: Any) -> None:
    """Compare the classes and channels of data that knows them with the arguments of the model that name them.

    Raises:
        ConfigError: the model is built for other data.
    """
    channels = data.input_shape[0] if hasattr(data, "input_shape") else None
    for key, has in {
        "num_classes": getattr(data, "num_classes", None),
        "in_channels": channels,
        "in_chans": channels,
    }.items():
        asked = settings.model.get(key)
        if None not in (has, asked) and has != asked:
            raise ConfigError(f"model.{key}={asked}, and the data has {has}. Use model.{key}={has}.")


def from_yaml(text: str) -> Settings:
    """Read what `Settings.to_yaml` wrote."""
    return Settings.model_validate(OmegaConf.to_container(OmegaConf.create(text)))
