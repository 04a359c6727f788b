"""What the mask losses compare with, on grids that are regions: box cells and edges of each mask.

Letters: N masks, B images, K neighbours (see `affinity`), (h, w) the cells of a region. A cell stands for its centre,
and takes part in a box, in the image or in a mask as the input pixel that holds this point.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import roi_align

from semiseg.losses.affinity import edges_of, inside_of_neighbours, rgb_to_lab
from semiseg.structures.grids import Regions
from semiseg.structures.masks import EncodedMasks


def region_cells(boxes_xyxy: Tensor, regions: Regions, *, pixels: bool = True) -> Tensor:
    """As `boxinst.box_cells`, each box (N, 4) on the grid of its own region: (N, 4) int64, half open.

    Without `pixels` the cells whose centres lie in the box itself, which is BBTP's rule.
    """
    low, high = boxes_xyxy[:, None, :2], boxes_xyxy[:, None, 2:]  # (N, 1, xy)
    rows, columns = regions.centres()
    if pixels:
        low, high, rows, columns = low.floor(), (high + 1).floor(), rows.floor(), columns.floor()
    counts = [(place < bound[..., axis]).sum(1) for axis, place in ((1, rows), (0, columns)) for bound in (low, high)]
    cells = torch.stack(counts, dim=1)  # row0, row1, column0, column1
    empty = (cells[:, 0] >= cells[:, 1]) | (cells[:, 2] >= cells[:, 3])
    cells[empty, 1], cells[empty, 3] = cells[empty, 0], cells[empty, 2]
    return cells


def crop_cells(boxes_xyxy: Tensor, regions: Regions) -> tuple[Tensor, Tensor]:
    """YOLACT's crops on grids of whole images: the cells that begin in the box (N, 4) or a cell beside it.

    Returns:
        (N, 4) int64, half open; and (N,) float, the area of the box itself in cells.
    """
    bounds, area = [], torch.ones_like(boxes_xyxy[:, 0])
    for axis, count in ((1, regions.size_hw[0]), (0, regions.size_hw[1])):
        start, end = regions.boxes_xyxy[:, axis], regions.boxes_xyxy[:, axis + 2]
        low, high = ((boxes_xyxy[:, side] - start) * count / (end - start) for side in (axis, axis + 2))
        bounds += [(low - 1).ceil().clamp(min=0), (high + 1).ceil().clamp(max=count)]
        area = area * (high - low)
    return torch.stack(bounds, dim=1).long(), area


def shrunk_cells(regions: Regions, masks: EncodedMasks, known: EncodedMasks | None = None) -> Tensor:
    """(M, h, w) bool: where masks, interpolated bilinearly at cells' centres, exceed one half: of four pixels three.

    Args:
        regions: one for each mask; known: the pixels of the masks that count, None = all.
    """
    # twice as many rows and columns: of each two, one is half a pixel before a cell's centre and one as far behind it
    step = regions.boxes_xyxy.new_tensor([-0.5, 0.5])
    rows, columns = ((centre[..., None] + step).flatten(1) for centre in regions.centres())
    pixels = masks.at(rows, columns)
    if known is not None:
        pixels &= known.at(rows, columns)
    height, width = regions.size_hw
    inside: Tensor = pixels.view(-1, height, 2, width, 2).sum((2, 4))
    return inside > 2


def region_inside(
    regions: Regions, image_index: Tensor, image_sizes_hw: Tensor, bottom_rows: Tensor, *, size: int, dilation: int
) -> Tensor:
    """As `affinity.neighbour_inside`, of each region's cells: (N, K, h, w) bool.

    Args:
        image_index: (N,) the image of each region; others as there.
    """
    rows, columns = (centre.floor() for centre in regions.centres())
    limit = (image_sizes_hw[:, 0] - bottom_rows)[image_index, None]
    row_in, column_in = (rows >= 0) & (rows < limit), (columns >= 0) & (columns < image_sizes_hw[image_index, 1:])
    return inside_of_neighbours(row_in, column_in, size=size, dilation=dilation)


@torch.no_grad()
def region_edges(
    images: Tensor,
    regions: Regions,
    image_index: Tensor,
    image_sizes_hw: Tensor,
    bottom_rows: Tensor,
    *,
    size: int,
    dilation: int,
    threshold: float,
) -> Tensor:
    """As `affinity.affinity_edges`, of each region's cells, whose colours are means over cells: (N, K, h, w) bool."""
    where = torch.cat([image_index[:, None].to(regions.boxes_xyxy.dtype), regions.boxes_xyxy], dim=1)
    colours = roi_align(images.float(), where, regions.size_hw, aligned=True).to(torch.uint8)  # truncated, as means are
    inside = region_inside(regions, image_index, image_sizes_hw, bottom_rows, size=size, dilation=dilation)
    return edges_of(rgb_to_lab(colours), inside, size=size, dilation=dilation, threshold=threshold)


def soft_masks(masks: EncodedMasks, regions: Regions) -> Tensor:
    """(M, h, w) float: the shares of each region's cells that are inside its mask, as torchvision's targets have them.

    The whole mask at the input's resolution, unaligned RoIAlign with as many samples as a cell has pixels.
    """
    own = torch.arange(len(masks), device=masks.changes.device) if masks.number is None else masks.number
    number, drawn = own.unique(return_inverse=True)  # a mask that several regions look at is drawn once
    first = torch.zeros_like(number).scatter_(0, drawn, torch.arange(len(own), device=own.device))
    height, width = masks.input_hw.amax(0).tolist() if len(masks) else (1, 1)
    whole = torch.zeros(len(number), 1, height, width, device=own.device)
    low, high = _extents(drawn, len(number), regions.boxes_xyxy)
    for row, (x0, y0, x1, y1) in enumerate(torch.cat([low, high], dim=1).tolist()):
        top, left, bottom, right = max(y0, 0), max(x0, 0), min(y1, height), min(x1, width)
        if top >= bottom or left >= right:
            continue
        ys, xs = (torch.arange(*ends, device=own.device)[None] + 0.5 for ends in ((top, bottom), (left, right)))
        whole[row, 0, top:bottom, left:right] = masks.of(first[row : row + 1]).at(ys, xs)[0]
    where = torch.cat([drawn[:, None].to(regions.boxes_xyxy.dtype), regions.boxes_xyxy], dim=1)
    cells: Tensor = roi_align(whole, where, regions.size_hw, aligned=False)[:, 0]
    return cells


def _extents(drawn: Tensor, count: int, boxes_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels (count, xy), half open, that bilinear samples in the boxes (K, 4) of each mask (K,) can look at."""
    index = drawn[:, None].expand(-1, 2)
    low, high = (
        boxes_xyxy.new_zeros(count, 2).scatter_reduce(0, index, corners, kind, include_self=False)
        for corners, kind in ((boxes_xyxy[:, :2], "amin"), (boxes_xyxy[:, 2:], "amax"))
    )
    return low.floor().long() - 1, high.floor().long() + 3
