"""Specifications of encoders whose first stage strides: what they must be, and strides that become dilation.

In ResNets and their kin the stem strides already, unlike in U-Nets. What a specification states is checked here, since
it may come with a file of unknown origin: neither a stride nor a dilation shows in the shape of any tensor.
"""

from typing import Literal

from autoseg.networks.base import spec_problems
from autoseg.schema import NetworkSpec

OutputStride = Literal[4, 8, 16, 32]
Strides = tuple[tuple[int, ...], ...]


def check_stages(spec: NetworkSpec, *, levels: int) -> None:
    """Raise ValueError, with all problems, unless `spec` has three stages or more that such an encoder can be built of.

    levels: how many entries `decoder_blocks` has.
    """
    count = len(spec.features)
    problems = [] if count > 2 else [f"features: three or more stages are needed, found {count}"]
    problems += spec_problems(spec, levels)
    if problems:
        raise ValueError(f"the network specification {spec.name!r} is wrong:\n  " + "\n  ".join(problems))


def hold_resolution(strides: Strides, output_stride: int) -> tuple[Strides, Strides]:
    """(strides, dilations) of stages that shrink by no more than `output_stride` along any axis (Chen et al., 2018).

    Where a stage would, it keeps its resolution, and whatever follows is dilated by the stride that was left out.
    """
    steps, gaps = [], []
    done, gap = [1] * len(strides[0]), [1] * len(strides[0])
    for stride in strides:
        taken = []
        for axis, step in enumerate(stride):
            fits = done[axis] * step <= output_stride
            taken.append(step if fits else 1)
            done[axis] *= taken[-1]
            gap[axis] *= 1 if fits else step
        steps.append(tuple(taken))
        gaps.append(tuple(gap))
    return tuple(steps), tuple(gaps)
