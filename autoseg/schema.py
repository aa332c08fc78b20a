"""The frozen records that are saved as JSON: fingerprint, plan, recipe, run.

Spatial tuples run in array order: (Z, Y, X) for 3D, (Y, X) for 2D configurations. In a Plan they run in *plan
order*, which is the order of `Plan.orientation` permuted by `Plan.axis_order`. Lengths are millimetres.
"""

from dataclasses import field, replace
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from autoseg.crops import Crop
from autoseg.labels import Labels
from autoseg.mirroring import EVERY_AXIS, Flips, Mirroring, other_index
from autoseg.records import SCHEMA_VERSION, AutosegError, hash_text, record

Dimension = Literal[2, 3]

Option = bool | int | float | str | tuple[int, ...]
"""What an option of a network or a loss may be."""

MOST_CONTEXT = 31
"""Slices that a 2D network may see at once; half of them are padded to both ends of an image."""

Orientation = Literal["canonical", "file", "ras"]
"""Which axes the networks see: the canonical ones (left-posterior-superior), those of each file as they are stored, or
right-anterior-superior. Plans made here are canonical; the others are those of imported models."""


@record
class ChannelStats:
    """Intensities of one channel over the foreground of all training cases."""

    mean: float
    median: float
    std: float
    minimum: float
    maximum: float
    percentile_00_5: float
    percentile_99_5: float


@record
class CaseFingerprint:
    """What one training case adds to the fingerprint; shape and spacing after the crop to non-zero, canonical order."""

    case: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    crop_ratio: float
    """Voxels after the crop divided by voxels before."""
    content_hash: str = ""
    """Of the files and of what dataset.json says about them; tells whether anything has changed since."""
    annotated: tuple[str, ...] | None = None
    """The classes that were annotated, where not all were."""
    across: dict[int, float] | None = None
    """Class (position in `Labels.names`) -> its centre of mass along the canonical X axis, 0 at the patient's right
    to 1 at the left end of the cropped image; only classes that the case has. None in fingerprints taken without."""
    voxels: dict[int, int] | None = None
    """Index of a label map -> how many voxels have it after the crop, ignored ones left out; None in fingerprints taken
    without."""


@record
class Fingerprint:
    """The measured facts of a dataset that planning needs. `dimension` 2: every image is a single slice (Z = 1)."""

    schema_version: int = SCHEMA_VERSION
    dataset: str
    dimension: Dimension
    channel_names: tuple[str, ...]
    cases: tuple[CaseFingerprint, ...]
    intensities: tuple[ChannelStats | None, ...]
    """One entry a channel; None where no case has foreground."""

    def data_hash(self) -> str:
        """One hash over the content of all cases."""
        return hash_text(*(case.content_hash for case in self.cases))

    def annotated(self) -> dict[str, tuple[str, ...]]:
        """Case -> classes that were annotated in it; only of cases where not all were."""
        return {case.case: case.annotated for case in self.cases if case.annotated is not None}


@record
class NetworkSpec:
    """Everything that builds a network, apart from its input channels and output heads. One entry a stage."""

    name: str
    dimension: Dimension
    features: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    """One entry fewer than the stages: the bottleneck has no decoder."""
    options: dict[str, Option] = field(default_factory=dict)
    """What the architecture has beside these, by name; none in the U-Nets of the presets."""

    @property
    def slices(self) -> int:
        """How many slices of an image it sees side by side; a 2D network that treats them apart says so itself."""
        told = self.options.get("context", 1)
        return told if isinstance(told, int) else 1


@record
class Resampling:
    """Interpolation orders and the anisotropy (largest / smallest spacing) above which the coarse axis is apart."""

    image_order: int = 3
    label_order: int = 1
    logit_order: int = 1
    through_plane_order: int = 0
    anisotropy_threshold: float = 3.0


@record
class ChannelNorm:
    """How one channel is normalised. `masked`: statistics and change only inside the non-zero region."""

    channel: str
    scheme: Literal["zscore", "zscore_minmax", "ct", "none", "rescale", "rgb"]
    """`zscore_minmax`: z-score, then min-max to 0 ... 1."""
    masked: bool
    stats: ChannelStats | None
    outliers: PositiveFloat | None = None
    """Voxels further from the mean than so many standard deviations become the mean, before anything else."""


@record
class Preparation:
    """What is done to an image between the crop to content and its normalisation, in this order; most often nothing."""

    combined: tuple[str, ...] = ()
    """The channels of the files whose root of the sum of squares is the one channel of the plan; empty: as they are."""
    thin: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 1, 1)
    """So many neighbouring voxels along each canonical axis (Z, Y, X) become one: slices thicker ones. It has the root
    of the sum of their squares, and their labels, see `Labels.union`."""
    crops: tuple[Crop, ...] = ()
    function: str | None = None
    """A function of one's own as `package.module:name`: called with the image, float32 (C, Z, Y, X) in canonical axes,
    and its spacing in mm (Z, Y, X), it gives an image of the same shape."""


@record
class Configuration:
    """One trainable configuration, written out in full. Tuples are in plan order, two entries long in 2D."""

    name: str
    dimension: Dimension
    spacing_mm: tuple[float, ...]
    median_shape: tuple[float, ...]
    patch: tuple[PositiveInt, ...]
    batch_size: PositiveInt
    batch_dice: bool
    network: NetworkSpec
    resampling: Resampling = Resampling()
    previous_stage: str | None = None
    """The configuration whose predictions are extra inputs (cascade), or None."""
    prior: Literal["logits", "labels"] = "logits"
    """What of the previous stage is brought onto the grid of this one when predicting: its logits, or its labels on the
    grid of the file, as nnU-Net does with the files that its first stage has written."""
    mirror_axes: tuple[int, ...] | None = None
    """Positions in `patch` along which there may be mirror images, in training and prediction; None: all of them. What
    `Plan.mirroring` forbids is forbidden all the same."""
    context: PositiveInt = 1
    """Slices that a 2D network sees: its own in the middle, and as many neighbours on either side; odd."""
    prepared: str
    """The configuration whose prepared cases are read; its own name unless data are shared."""

    def __post_init__(self) -> None:
        if len(self.patch) != self.dimension:
            raise ValueError(f"the patch of {self.name} has {self.dimension} edges, found {len(self.patch)}")
        if self.context % 2 == 0 or self.context > MOST_CONTEXT:
            raise ValueError(f"context is an odd number of slices up to {MOST_CONTEXT}, found {self.context}")
        if self.context > 1 and self.dimension == 3:
            raise ValueError(f"context is for 2D networks; {self.name} is 3D and sees its neighbouring slices anyway")
        # A network that treats slices in a way of its own has to be told how many there are.
        if (told := self.network.options.get("context", self.context)) != self.context:
            raise ValueError(f"the network is told of {told} slices in its options, and context is {self.context}")


@record
class Reason:
    """Why a planning decision came out as it did."""

    decision: str
    rule: str
    inputs: str
    outcome: str


@record
class Request:
    """What was asked of the planner by options; None and empty: nothing. It holds for later plans of the same name."""

    preset: str | None = None
    """Where none ever was asked for: unet."""
    network: str | None = None
    """In place of the preset's: `name(key=value, ...)` or `package.module:Name`."""
    gpu_memory_gb: float | None = None
    spacing_mm: tuple[float, float, float] | None = None
    context: int | None = None
    """Slices that 2D networks see."""
    crops: tuple[Crop, ...] = ()
    combine: str | None = None
    """`rss`: all channels become one, the root of the sum of their squares."""
    thin: tuple[PositiveInt, ...] = ()
    """Voxels that become one, along slices or along each axis (Z, Y, X)."""
    merge: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Class -> the labels that it is made of, each by name or value, see `merging.merge`."""
    like: str | None = None
    """The absolute path of the model whose plan is taken over: a file, the folder of a configuration, or of a fold."""
    changes: dict[str, str] = field(default_factory=dict)
    """Field of the plan -> its value as JSON, as given by --set; made by `settings.in_json`."""


@record
class Plan:
    """All that preprocessing, training and prediction need to know about the data and the network."""

    schema_version: int = SCHEMA_VERSION
    name: str = "default"
    dataset: str
    preset: str
    network: str | None = None
    """What was asked for by --network; None: the network of the preset."""
    gpu_memory_gb: float | None
    """What a training step was planned to fill; None if the plan was made elsewhere."""
    dimension: Dimension
    axis_order: tuple[int, int, int]
    """Plan axis i is axis axis_order[i] of `orientation`; the coarsest axis comes first."""
    orientation: Orientation = "canonical"
    preparation: Preparation = Preparation()
    channels: tuple[ChannelNorm, ...]
    labels: Labels
    data_hash: str = ""
    """Of the cases that it was made from."""
    mirroring: Mirroring = EVERY_AXIS
    configurations: tuple[Configuration, ...]
    reasons: tuple[Reason, ...] = ()
    planned: dict[str, str] = field(default_factory=dict)
    """Configuration (and `channels`, and `plan`: the rest) -> hash as it was planned; any other one: edited by hand."""
    request: Request = Request()

    def __post_init__(self) -> None:
        if self.preparation.combined and len(self.channels) > 1:
            raise ValueError("channels that are combined make one, which is normalised in one way")
        if self.dimension == 2 and any(configuration.context > 1 for configuration in self.configurations):
            raise ValueError("context is for slices of 3D images; 2D images have no neighbouring slices")
        if not self.mirroring.swapped:
            return
        try:
            other_index(self.labels, self.mirroring.swapped)
        except ValueError as error:
            raise ValueError(f"mirroring.swapped: {error}") from None

    @property
    def sources(self) -> tuple[str, ...]:
        """The channels that the images have in their files, in order."""
        return self.preparation.combined or tuple(channel.channel for channel in self.channels)

    def in_channels(self, configuration: Configuration) -> int:
        """Input channels of a configuration's network: the images, and in a cascade one mask a foreground class.

        Each of them comes `context` times, its slices side by side.
        """
        masks = len(self.labels.foreground) if configuration.previous_stage else 0
        return (len(self.channels) + masks) * configuration.context

    def concerning(self, *names: str) -> "Plan":
        """What the plan says about these configurations and those they read from; for telling whether plans agree.

        Other configurations may come and go while runs of these exist.
        """
        known = {configuration.name: configuration for configuration in self.configurations}
        kept = list(names)
        for name in kept:
            if name in known:
                read = (known[name].prepared, known[name].previous_stage)
                kept += [other for other in read if other is not None and other not in kept]
        chosen = tuple(configuration for configuration in self.configurations if configuration.name in kept)
        return replace(self, configurations=chosen, reasons=(), planned={}, request=Request())

    def flips(self, configuration: Configuration) -> Flips:
        """The mirror images of a configuration's patches, in training and prediction."""
        return self.mirroring.flips(self.labels, configuration.dimension, configuration.mirror_axes)

    def configuration(self, name: str) -> Configuration:
        """The configuration called `name`; raises AutosegError that lists the ones there are."""
        for configuration in self.configurations:
            if configuration.name == name:
                return configuration
        known = ", ".join(configuration.name for configuration in self.configurations)
        raise AutosegError(f"the plan {self.name!r} of {self.dataset} has no configuration {name!r}; it has {known}")


@record
class Recipe:
    """How a network is trained. Defaults follow nnU-Net v2 (Isensee et al., Nature Methods 2021)."""

    epochs: PositiveInt = 1000
    budget_seconds: PositiveFloat | None = None
    """Training time over all sessions, in place of `epochs`; the two numbers below are then the largest allowed."""
    steps_per_epoch: PositiveInt = 250
    validation_steps: NonNegativeInt = 50
    """Batches of held-out patches after an epoch: others each time, or always the same ones where the run goes by their
    loss (`schedule=plateau`, `stop_patience`, `weights=best`). Else 1/5 of a stated `steps_per_epoch`, at most 50."""
    seed: NonNegativeInt = 0
    batch_size: PositiveInt | None = None
    """Patches a step; None: as planned, or fewer where a budget leaves few steps: `pipeline.recipe.for_time`."""
    loss: str = "dice_ce"
    """A key of `losses.LOSSES`, or a sum of such: `0.5*ce+tversky(alpha=0.3,beta=0.7)`; or `package.module:Name`."""
    deep_supervision: bool = True
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "sgd"
    """`sgd` has Nesterov momentum. A short run takes `adamw` unless told otherwise: `pipeline.recipe.for_length`."""
    learning_rate: NonNegativeFloat = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Of `sgd` only."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises from near 0 to the schedule's."""
    freeze_encoder_epochs: NonNegativeInt = 0
    """Epochs at the beginning in which the encoder stays as it is, norms included."""
    encoder_rate: PositiveFloat = 1.0
    """The encoder's learning rate as a multiple of the others'."""
    weight_decay: NonNegativeFloat = 3e-5
    schedule: str = "poly"
    """A name of `rates.SCHEDULES`, with its options: `step(factor=0.8, period=1)`, `plateau(patience=5)`, `wsd`."""
    poly_exponent: NonNegativeFloat = 0.9
    """Of `poly` only."""
    stop_patience: NonNegativeInt = 0
    """Epochs without a new lowest validation loss after which the run ends; 0: none."""
    weights: Literal["last", "best", "ema"] = "last"
    """Which the run keeps: of the last step, of the epoch of the lowest validation loss, or a moving average. What is
    chosen by held-out cases (`best`, `stop_patience`) scores a little too well on them."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Of `ema` only: the average is over about 1 / (1 - ema_decay) steps."""
    clip_norm: NonNegativeFloat = 12.0
    """Norm to which a longer gradient is shortened; 0: none is."""
    patch_position: str = "default"
    """Where patches of training lie, a key of `placement.POSITIONS`; those of the pseudo-validation as by default."""
    foreground_fraction: Annotated[float, Field(ge=0, le=1)] = 0.33
    """Share of the patches that are centred on foreground, where the position mixes them with others: rounded, but at
    least one of each batch; of batches of one patch so many."""
    redraw_empty: NonNegativeInt = 0
    """How often at most a patch of training without foreground is drawn again, within a case that has some."""
    augmentation: str = "default"
    """`default`, `none`, `desai`, `strong`, `mr_artefacts`, `batchgenerators`, or `package.module:name` of a transform
    of your own. Held-out patches are never changed."""
    offline_copies: NonNegativeInt = 0
    """How many fixed augmented copies there are of each case (in 2D: of each slice) beside itself; 0: it is drawn anew
    each time."""
    match_steps: bool = True
    """Whether copies leave the number of steps as it is; otherwise epochs are as many times longer as the data are."""
    loader_threads: PositiveInt = 2
    tune: bool = True
    """Whether probes at the start may choose precision, layout and compilation; without them float32, eager."""
    checkpoint_minutes: PositiveFloat = 5.0
    keep_probabilities: bool = True
    """Whether those of held-out cases stay beside the fold for `find_best`, which predicts anew what is not there."""
    max_bad_steps: PositiveInt = 5
    """Consecutive non-finite losses after which the run stops."""


@record
class Fold:
    """One cross-validation fold: case identifiers of both sides."""

    train: tuple[str, ...]
    val: tuple[str, ...]


@record
class Tuning:
    """How training computes on one machine: chosen by probes at its start, used again whenever the run goes on."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """What convolutions compute in; weights and their gradients are float32 throughout."""
    compiled: bool = False
    channels_last: bool = False
    keep_freed: bool = False
    """The system's allocator keeps freed memory instead of giving it back after every large tensor."""
    threads: int
    seconds_a_step: float | None = None
    """As probed, on a batch that is ready; None if nothing was probed."""
    device: str
    torch: str
    notes: tuple[str, ...] = ()
    """One line a decision, with its numbers."""


@record
class Run:
    """The facts of one training run, saved as run.json beside its weights."""

    schema_version: int = SCHEMA_VERSION
    autoseg_version: str
    versions: dict[str, str]
    dataset: str
    configuration: str
    fold: int | Literal["all"]
    cases: Fold
    plan: Plan
    recipe: Recipe
    data_hash: str
    pretrained: str | None = None
    """Where the weights came from that training started with; None: drawn from the seed."""
    device: str
    started: str
    finished: str | None = None
    ended: str | None = None
    """Why training ended before its length; None if it did not."""
    validation_seconds: float = 0.0
    """What predicting and scoring the held-out cases took."""
    tuning: Tuning | None = None
    """None until the first probes have ended."""
