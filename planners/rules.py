"""The numbers of planning: one frozen `Rules` value for each preset, with every threshold in sight.

All presets share the rules of nnU-Net (Isensee et al., Nature Methods 2021) and differ in network and memory budget.
The budgets count activations, which needs no GPU; each stands for networks known to fill a card of `reference_gb`.
`unet` is nnU-Net's default planner; `resenc_m`, `resenc_l` and `resenc_xl` are its residual encoder presets (Isensee et
al., MICCAI 2024).
"""

from dataclasses import replace

from autoseg.records import record


@record
class Budget:
    """What one training step may cost, for configurations of one dimension."""

    activations: float
    """Convolution outputs for one sample at which a step of `batch` samples fills a card of `Rules.reference_gb`."""
    batch: int
    must_fit: int
    """The patch shrinks until this many samples fit. Below `batch`, a larger patch is preferred to a larger batch."""
    start_voxels: int
    """Voxels of the patch that shrinking starts from; large enough never to be the limit."""
    max_features: int


@record
class Rules:
    """Everything that a planner may vary. Thresholds on spacing are ratios, without unit."""

    name: str
    network: str
    """A name of `memory.ACTIVATIONS`, which is also the name in the network table."""
    encoder_blocks: tuple[int, ...]
    """Blocks a stage, highest resolution first; the last entry repeats for deeper stages."""
    decoder_blocks: int
    planar: Budget
    """Budget of 2D configurations."""
    spatial: Budget
    """Budget of 3D configurations."""
    reference_gb: float
    """GPU memory that the budgets stand for, and the default target."""
    coverage: float
    """A batch holds at most this fraction of the voxels of the dataset, against overfitting."""
    base_features: int = 32
    min_edge: int = 4
    """Shortest edge, in voxels, that downsampling may leave."""
    min_batch: int = 2
    anisotropy: float = 3.0
    """An axis this many times coarser, and this many times shorter, than both others is resampled to finer slices."""
    masked_below: float = 0.75
    """Median crop ratio under which z-score channels are normalised inside the non-zero region only."""
    lowres_below: float = 0.25
    """A patch that covers less of the median image asks for a low-resolution configuration."""
    lowres_step: float = 1.03
    """Factor by which the spacing grows until the patch covers enough."""
    lowres_gain: float = 2.0
    """The low-resolution image must have this many times fewer voxels to be worth a cascade."""

    def budget(self, dimension: int) -> Budget:
        """The budget of configurations of that dimension."""
        return self.planar if dimension == 2 else self.spatial

    def as_deep_as(self, network: str) -> "Rules":
        """With the blocks a stage of the presets of `network`; as they are if no preset has it."""
        preset = next((rules for rules in PLANNERS.values() if rules.network == network), self)
        return replace(self, encoder_blocks=preset.encoder_blocks, decoder_blocks=preset.decoder_blocks)


UNET = Rules(
    name="unet",
    network="unet",
    encoder_blocks=(2,),
    decoder_blocks=2,
    planar=Budget(activations=8.5e7, batch=12, must_fit=2, start_voxels=2048**2, max_features=512),
    spatial=Budget(activations=5.6e8, batch=2, must_fit=2, start_voxels=256**3, max_features=320),
    reference_gb=8.0,
    coverage=0.05,
)


def _resenc(name: str, planar: float, spatial: float, reference_gb: float) -> Rules:
    return replace(
        UNET,
        name=name,
        network="resenc",
        encoder_blocks=(1, 3, 4, 6),
        decoder_blocks=1,
        planar=replace(UNET.planar, activations=planar, must_fit=UNET.planar.batch),
        spatial=replace(UNET.spatial, activations=spatial),
        reference_gb=reference_gb,
        coverage=1.0,
    )


PLANNERS: dict[str, Rules] = {
    "unet": UNET,
    "resenc_m": _resenc("resenc_m", planar=1.35e8, spatial=6.8e8, reference_gb=8.0),
    "resenc_l": _resenc("resenc_l", planar=3.8e8, spatial=2.1e9, reference_gb=24.0),
    "resenc_xl": _resenc("resenc_xl", planar=5.6e8, spatial=3.6e9, reference_gb=40.0),
}
