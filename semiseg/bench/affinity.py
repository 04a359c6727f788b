"""Row `affinity`: the edges and the boxes on the mask grid of a batch.

Straightforward: Lab on the host in numpy, all neighbours unfolded, boxes drawn at full resolution and then sampled,
and the affinity of an image copied to each of its instances. METHOD section 2.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from semiseg.bench.inputs import coco_like_boxes, picture, shared_out
from semiseg.bench.mask_losses import unfold_neighbours
from semiseg.bench.row import Place, Result, Row, Sizes, Task, array
from semiseg.losses.affinity import affinity_edges
from semiseg.losses.boxinst import box_cells, cell_profiles

STRIDE, SIZE, DILATION, THRESHOLD = 4, 3, 2, 0.3
BOTTOM_ROWS = 16  # that COCO's 10 become at this size
SRGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE_XYZ = (0.95047, 1.0, 1.08883)
DIFFERING_EDGES = 1e-5  # share of edges whose similarity may round to the other side of the threshold


def numpy_lab(rgb: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 sRGB -> (h, w, 3) float64 CIE Lab, D65 at 2 degrees."""
    value = rgb.astype(np.float64) / 255
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    xyz = linear @ np.array(SRGB_TO_XYZ).T / np.array(WHITE_XYZ)
    x, y, z = np.moveaxis(np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116), -1, 0)
    return np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), axis=-1)


def image_similarity(image: Tensor, *, rows_without: int) -> Tensor:
    """The similarity (K, h, w) of one image (3, H, W) uint8 to the neighbours of each cell, 0 where there is none."""
    small = F.avg_pool2d(image[None].float(), STRIDE)[0].to(torch.uint8)
    lab = torch.from_numpy(numpy_lab(small.permute(1, 2, 0).cpu().numpy())).permute(2, 0, 1).float().to(image.device)
    difference = lab[:, None] - unfold_neighbours(lab[None], SIZE, DILATION)[0]  # (3, K, h, w)
    valid = torch.ones(image.shape[1:], device=image.device)
    valid[image.shape[1] - rows_without :] = 0
    valid = valid[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]
    return (
        torch.exp(-torch.linalg.norm(difference, dim=0) / 2)
        * unfold_neighbours(valid[None, None], SIZE, DILATION)[0, 0]
    )


def sampled_box_mask(box_xyxy: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """(h, w) float: the box drawn on the whole image, then every fourth pixel of it."""
    full = torch.zeros(size_hw, device=box_xyxy.device)
    x0, y0, x1, y1 = box_xyxy.tolist()
    full[int(y0) : int(y1 + 1), int(x0) : int(x1 + 1)] = 1
    return full[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]


def straightforward_affinity(
    images: Tensor, boxes_xyxy: Tensor, image_index: Tensor, rows_without: int
) -> tuple[Tensor, Tensor]:
    """Similarity (N, K, h, w) and box masks (N, h, w), one of each per instance."""
    size_hw = (images.shape[2], images.shape[3])
    similarity, masks = [], []
    for number, image in enumerate(images):
        of_image = image_similarity(image, rows_without=rows_without)
        for box in boxes_xyxy[image_index == number]:
            similarity.append(of_image.clone())
            masks.append(sampled_box_mask(box, size_hw))
    return torch.stack(similarity), torch.stack(masks)


def _ours(sizes: Sizes, place: Place) -> Task:
    images, boxes, image_index = _inputs(sizes, place.device)
    image_sizes = torch.tensor([[sizes["height"], sizes["width"]]] * len(images), device=place.device)
    bottom = torch.full((len(images),), BOTTOM_ROWS, device=place.device)
    grid_hw = (sizes["height"] // STRIDE, sizes["width"] // STRIDE)

    def run() -> tuple[Tensor, Tensor]:
        edges = affinity_edges(
            images, image_sizes, bottom, stride=STRIDE, size=SIZE, dilation=DILATION, threshold=THRESHOLD
        )
        return edges, box_cells(boxes, stride=STRIDE, grid_hw=grid_hw)

    def result(returned: tuple[Tensor, Tensor]) -> Result:
        rows, columns = cell_profiles(returned[1], grid_hw)
        return {"edges": array(returned[0][image_index]), "boxes": array(rows[:, :, None] & columns[:, None, :])}

    return Task(run, result)


def _straightforward(sizes: Sizes, place: Place) -> Task:
    images, boxes, image_index = _inputs(sizes, place.device)

    def result(returned: tuple[Tensor, Tensor]) -> Result:
        return {"edges": array(returned[0] >= THRESHOLD), "boxes": array(returned[1])}

    return Task(lambda: straightforward_affinity(images, boxes, image_index, BOTTOM_ROWS), result)


def _inputs(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 3, H, W) uint8, boxes (N, 4), image of each (N,)."""
    size_hw = (sizes["height"], sizes["width"])
    images = torch.stack([picture(size_hw, seed=number) for number in range(sizes["images"])])
    count = sizes["images"] * sizes["boxes"]
    boxes = coco_like_boxes(count, size_hw, seed=3)
    return images.to(device), boxes.to(device), shared_out(count, sizes["images"]).to(device)


def _agree(ours: Result, straightforward: Result) -> bool:
    differing = np.mean(ours["edges"] != straightforward["edges"])
    return bool(differing <= DIFFERING_EDGES and np.array_equal(ours["boxes"], straightforward["boxes"]))


ROW = Row(
    name="affinity",
    sizes={"images": 2, "height": 800, "width": 1216, "boxes": 8},
    tiny={"height": 64, "width": 96},
    passes=12,
    quick_passes=6,
    ours=_ours,
    straightforward=_straightforward,
    agree=_agree,
)
