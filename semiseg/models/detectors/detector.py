"""What a detector is in the network: from the levels of the pyramid to boxes with classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from semiseg.structures.outputs import Candidates, Outputs


class Detector(nn.Module, ABC):
    """Predicts at the locations of some levels; how it is trained is an `engine.detection.DetectorStep`.

    Attributes:
        num_classes: C.
        strides: of the levels at which it predicts, finest first.
    """

    num_classes: int
    strides: tuple[int, ...]

    @abstractmethod
    def predict(
        self, levels: Mapping[int, Tensor], padded_size_hw: tuple[int, int], image_sizes_hw: Tensor
    ) -> tuple[Outputs, Sequence[Tensor]]:
        """The same in training and evaluation, without control flow that depends on the images.

        Args:
            levels: (B, channels, h, w) of the pyramid, by stride.
            padded_size_hw: height and width of the padded images.
            image_sizes_hw: (B, 2) int64, before padding.

        Returns:
            The predictions, still without `mask_inputs`; and (B, F', h, w) of each level, the features from which a
            mask head may predict at a location, where the detector has any.
        """

    @abstractmethod
    def candidates(
        self,
        outputs: Outputs,
        image_sizes_hw: Tensor,
        *,
        score_threshold: float,
        candidates_per_level: int,
        nms_threshold: float,
        max_detections: int,
        size_divisor: int,
    ) -> list[Candidates]:
        """The detections of each image, under the limits of `config.InferenceConfig`."""
