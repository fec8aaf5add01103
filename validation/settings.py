"""What a user can set, as frozen dataclasses: the command line and configuration files show exactly these fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Size = Literal["quick", "standard", "paper"]
Device = Literal["auto", "cpu", "cuda"]
Style = Literal["plain", "state-of-the-art"]
BOUNCING = ("mlp", "residual-network", "diagonal", "sharpness")
COLLAPSE = ("quartic-well", "neuron", "teacher-student", "toy", "linear-network", "networks")
RELU = ("two-layer", "three-layer", "1d")


def option(default: Any, text: str) -> Any:
    """A field with a default and the sentence that ``--help`` shows for it."""
    return field(default=default, metadata={"help": text})


class SettingsError(ValueError):
    """A setting that cannot be used; the message is one sentence that says what to do."""


def _positive(name: str, *values: float) -> None:
    for value in values:
        if not 0 < value < float("inf"):
            raise SettingsError(f"{name} {value:g} is not usable: choose a positive number.")


def _chosen(experiments: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in experiments:
        if name not in known:
            raise SettingsError(f"there is no experiment '{name}': choose among {', '.join(known)}.")
    if not experiments:
        raise SettingsError(f"experiments must not be empty: choose among {', '.join(known)}.")


@dataclass(frozen=True)
class DiagonalSettings:
    """Suite ``diagonal``: label-noise SGD on diagonal linear networks."""

    n: int = option(80, "training samples of the Gaussian data")
    d: int = option(200, "features of the Gaussian data")
    nonzero: int = option(20, "non-zero coordinates of the sparse truth")
    initial_scale: float = option(0.1, "u = this, v = 0 at the start")
    steps: int = option(100_001, "SGD steps")
    step_sizes: tuple[float, ...] = option((0.05, 0.1, 0.15, 0.2, 0.25), "constant step sizes")
    large_step: float = option(0.282, "step size of the schedules that decay")
    decay_at: tuple[float, ...] = option((0.1, 0.3, 0.5), "fractions of the run at which they decay")
    decay_by: tuple[float, ...] = option((4.8, 3.4, 1.5), "factors by which they decay")
    table: str = option("", "CSV file of your own instead of the diabetes table")
    target: str = option("", "its target column")
    table_rows: int = option(20, "training rows drawn from the table")
    table_steps: int = option(100_001, "SGD steps on the table")
    table_step_sizes: tuple[float, ...] = option((0.02, 0.05, 0.1), "constant step sizes on the table")

    def __post_init__(self) -> None:
        for name in ("n", "d", "nonzero", "steps", "initial_scale", "large_step", "table_rows", "table_steps"):
            _positive(name.replace("_", " "), getattr(self, name))
        _positive("step size", *self.step_sizes, *self.table_step_sizes)
        _positive("decay factor", *self.decay_by)
        if self.nonzero > self.d:
            raise SettingsError(f"nonzero {self.nonzero} exceeds d {self.d}: choose nonzero <= d.")
        if self.n >= self.d:
            raise SettingsError(
                f"n {self.n} with d {self.d} leaves nothing to choose: the end-point theory needs n < d."
            )
        if len(self.decay_at) != len(self.decay_by):
            raise SettingsError("decay at and decay by differ in length: give one factor for each fraction.")
        if not self.step_sizes or not all(0 <= at <= 1 for at in self.decay_at):
            raise SettingsError("step sizes must not be empty and decay fractions lie in [0, 1].")
        if bool(self.table) != bool(self.target):
            raise SettingsError("a table needs its target column and the other way round: give both table and target.")


@dataclass(frozen=True)
class StabilizationSettings:
    """Suite ``stabilization``: Prop. 2, one-dimensional networks that bounce for ever."""

    samples: int = option(32, "distinct inputs x")
    spread: float = option(0.08, "inputs lie in [1, 1 + spread]")
    theta_star: float = option(1.0, "θ* of the labels y = θ*² x")
    start: float = option(0.01, "initial θ/θ*")
    steps: int = option(20_000, "SGD steps")

    def __post_init__(self) -> None:
        for name in ("samples", "theta_star", "start", "steps"):
            _positive(name.replace("_", " "), getattr(self, name))
        if not 0 <= self.spread < 1.25**0.5 - 1:
            raise SettingsError(f"spread {self.spread} leaves no admissible step size: choose it in [0, 0.118).")
        if not self.start < 0.65:
            raise SettingsError(f"start {self.start} is not below the band: choose it under 0.65.")


@dataclass(frozen=True)
class BouncingSettings:
    """Suite ``bouncing``: directions with ηλ > 1, the dynamics orthogonal to them, and the sharpest directions."""

    experiments: tuple[str, ...] = option(BOUNCING, "which to run")
    images: int = option(1504, "training images of the digits MLP; 47 batches of 32")
    steps: int = option(6000, "SGD steps of the MLPs before replicas set out")
    step_sizes: tuple[float, ...] = option((0.05, 0.1, 0.2), "step sizes at batch size 32")
    window: int = option(282, "steps for which replicas are watched; 6 epochs")
    burn_in: int = option(150, "steps before that, from the state they share")
    directions: int = option(48, "sharpest eigendirections that are followed")
    resnet_images: int = option(256, "training images of the residual network")
    resnet_steps: int = option(1000, "its SGD steps before replicas set out")

    def __post_init__(self) -> None:
        for name in ("images", "steps", "window", "burn_in", "resnet_images", "resnet_steps"):
            _positive(name.replace("_", " "), getattr(self, name))
        _positive("step size", *self.step_sizes)
        if not 64 <= self.images <= 1797 or self.images % 32:
            raise SettingsError(f"{self.images} images do not make epochs: choose a multiple of 32 from 64 to 1792.")
        if self.resnet_images > 1797:
            raise SettingsError(f"there are 1797 digits: choose resnet images up to that, not {self.resnet_images}.")
        if self.window < 60 or self.directions < 24:
            raise SettingsError("a window below 60 steps or fewer than 24 directions decides nothing: choose more.")
        _chosen(self.experiments, BOUNCING)


@dataclass(frozen=True)
class CollapseSettings:
    """Suite ``collapse``: noise that vanishes on an invariant set draws networks onto it."""

    experiments: tuple[str, ...] = option(COLLAPSE, "which to run")
    mu: float = option(1.5, "depth of the quartic well")
    paths: int = option(20_000, "paths that test its stationary law")
    samples: int = option(32, "samples of the single neuron")
    neuron_dt: float = option(0.01, "integration step of the single neuron")
    sigmas: tuple[float, ...] = option((5.0, 10.0, 15.0, 20.0), "gradient noise of linear teacher and student")
    toy_steps: int = option(10_000, "SGD steps of the two-unit toy")

    def __post_init__(self) -> None:
        for name in ("mu", "paths", "samples", "neuron_dt", "toy_steps"):
            _positive(name.replace("_", " "), getattr(self, name))
        _positive("sigma", *self.sigmas)
        if not self.sigmas or self.toy_steps < 6000:
            raise SettingsError("sigmas must not be empty, and the toy needs 6000 steps or more.")
        _chosen(self.experiments, COLLAPSE)


@dataclass(frozen=True)
class ReluSettings:
    """Suite ``relu``: ReLU networks, the label-noise SDE against SGD."""

    experiments: tuple[str, ...] = option(RELU, "which to run")
    two_layer_steps: int = option(14_126, "SGD steps of the two-layer teacher-student")
    three_layer_steps: int = option(10_001, "SGD steps of the three-layer teacher-student")
    one_dimensional_steps: int = option(31_623, "SGD steps of the one-dimensional regression")
    middle_step: float = option(0.6, "step size between the published 0.26 and 0.91, divided by 5 at half the run")
    seed_factor: int = option(5, "two-layer seeds for each seed of the other experiments: two thirds diverge")
    substeps: int = option(2, "Euler-Maruyama steps of the SDE for each step of SGD")

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if name != "experiments":
                _positive(name.replace("_", " "), getattr(self, name))
        _chosen(self.experiments, RELU)


@dataclass(frozen=True)
class ResnetSettings:
    """Suite ``resnet``: SVAG against SGD on a residual network, on digits and on images of your own."""

    images: int = option(1500, "training images")
    steps: int = option(600, "SGD steps")
    batch: int = option(8, "minibatch size")
    step_sizes: tuple[float, ...] = option((0.1, 0.4, 1.6), "step sizes, ascending; divided by 8 at 80 % of the run")
    svag: int = option(4, "SVAG steps for each step of SGD")
    group_norm_steps: int = option(50, "SGD steps of the network with GroupNorm")
    group_norm_step_size: float = option(1.0, "its large step size; a tenth of it is the small one")
    group_norm_batch: int = option(16, "its minibatch size")
    growth_steps: int = option(400, "SGD steps for which the growth of units is watched")
    growth_step_size: float = option(0.2, "step size meanwhile")
    growth_weight_decay: float = option(0.005, "weight decay meanwhile")
    growth_label_noise: float = option(0.3, "share of the labels that are redrawn for it")
    train: str = option("", "parquet file of training images (CIFAR-10's layout) for a published recipe besides")
    test: str = option("", "its test images")
    network: str = option("resnet18_plain", "network of that recipe, by name")
    width: int = option(64, "its width")
    style: Style = option("state-of-the-art", "that recipe: plain, or state-of-the-art")
    epochs: int = option(30, "its epochs")
    large_batch: int = option(256, "its minibatch size")
    large_svag: int = option(2, "its SVAG steps for each step of SGD")

    def __post_init__(self) -> None:
        for name, kind in self.__annotations__.items():
            if kind in ("int", "float") and name not in ("growth_weight_decay", "growth_label_noise"):
                _positive(name.replace("_", " "), getattr(self, name))
        if bool(self.train) != bool(self.test):
            raise SettingsError("images of your own are two files: give both train and test.")
        _positive("step size", *self.step_sizes)
        if len(self.step_sizes) < 2 or list(self.step_sizes) != sorted(set(self.step_sizes)):
            raise SettingsError("step sizes compare a small one with larger ones: give two or more, ascending.")
        largest = max(self.batch, self.group_norm_batch)
        if not 2 * largest <= self.images <= 1797:
            raise SettingsError(f"{self.images} images with batches of {largest}: choose 2 batches to 1797 images.")
        if min(self.steps, self.group_norm_steps) < 8 or self.growth_steps < 80:
            raise SettingsError("fewer than 8 steps, or 80 steps of growth, decide nothing: choose more.")
        if not (0 <= self.growth_weight_decay < float("inf") and 0 <= self.growth_label_noise <= 1):
            raise SettingsError("growth weight decay has to be >= 0 and growth label noise between 0 and 1.")


@dataclass(frozen=True)
class RunSettings:
    """One validation run."""

    suites: tuple[str, ...] = option((), "suites to run, all when empty")
    size: Size = option(
        "quick", "quick: minutes on two cores; standard: more seeds; paper: as many as the verdicts can use"
    )
    device: Device = option("auto", "where runs take place")
    seeds: int = option(0, "replicates of every stochastic run; 0 leaves it to the size")
    out: str = option("results", "output folder")
    diagonal: DiagonalSettings = field(default_factory=DiagonalSettings)
    stabilization: StabilizationSettings = field(default_factory=StabilizationSettings)
    collapse: CollapseSettings = field(default_factory=CollapseSettings)
    bouncing: BouncingSettings = field(default_factory=BouncingSettings)
    relu: ReluSettings = field(default_factory=ReluSettings)
    resnet: ResnetSettings = field(default_factory=ResnetSettings)

    def __post_init__(self) -> None:
        if self.seeds < 0:
            raise SettingsError(f"{self.seeds} seeds is not usable: choose 2 or more, or 0 for the size's own number.")
        if self.seeds == 1:
            raise SettingsError("one seed has no standard error: choose 2 or more.")

    @property
    def replicates(self) -> int:
        """Seeds of every stochastic run."""
        return self.seeds or {"quick": 32, "standard": 128, "paper": 512}[self.size]
