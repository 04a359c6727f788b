"""Parts of one COCO json: whole images, where asked for with a share of every class, and with groups kept whole."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import compress
from operator import not_
from pathlib import Path
from typing import Any

from semiseg.data.coco import parse_sections
from semiseg.errors import UserError


def divide(
    path: Path, shares: Sequence[float], *, seed: int, by_class: bool = False, group: str | None = None
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """For each share the contents of two COCO json: all others' images, and its own, with their annotations.

    All other sections are in each, the order is the file's, and every image is in the own of one share.

    Args:
        path: COCO json.
        shares: of the images, positive; they sum to 1.
        seed: of the draw.
        by_class: each part gets that share of every class's objects, too, as far as whole images allow: the rarest
            class first, each image to the part that lacks most of it (Sechidis et al., ECML 2011).
        group: a field of the images; those with the same value are in one part.

    Raises:
        UserError: no COCO json, an annotation of no image, an image without the field, or a part without an image.
    """
    content = parse_sections(path, ("images",))[0]
    images, annotations = content["images"], content.get("annotations") or []
    groups = _groups(path, images, group)
    names = {entry["id"]: number for number, members in enumerate(groups) for entry in members}
    classes: list[Counter[str]] = [Counter() for _ in groups]
    for number, annotation in enumerate(annotations):
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        if type(image_id) not in (int, str) or image_id not in names:
            raise UserError(f"{path}: annotations[{number}] is of no image of the file")
        if by_class and not annotation.get("iscrowd"):
            classes[names[image_id]][str(annotation.get("category_id"))] += 1
    part_of = _assign([len(members) for members in groups], classes, shares, random.Random(seed))
    of_images = [part_of[names[entry["id"]]] for entry in images]
    of_annotations = [part_of[names[each["image_id"]]] for each in annotations]
    pairs = []
    for part, share in enumerate(shares):
        if part not in of_images:
            what = f"values of {group!r}" if group else "images"
            raise UserError(f"{path}: its {len(groups)} {what} are too few for a part of {share:.3g}")
        inside, of_it = ([each == part for each in parts] for parts in (of_images, of_annotations))
        own = {"images": compress(images, inside), "annotations": compress(annotations, of_it)}
        others = {"images": compress(images, map(not_, inside)), "annotations": compress(annotations, map(not_, of_it))}
        apart, whole = ({**content, **{key: list(kept) for key, kept in each.items()}} for each in (others, own))
        pairs.append((apart, whole))
    return pairs


def _groups(path: Path, images: Sequence[Any], field: str | None) -> list[list[dict[str, Any]]]:
    """What stays together, in the file's order."""
    found: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    seen: set[Any] = set()
    for number, entry in enumerate(images):
        where = f"{path}: images[{number}]"
        if not isinstance(entry, dict) or type(entry.get("id")) not in (int, str):
            raise UserError(f"{where} is no object with 'id', a number or a text")
        if entry["id"] in seen:
            raise UserError(f"{where}: image id {entry['id']} is used twice")
        seen.add(entry["id"])
        if field is not None and type(entry.get(field)) not in (int, float, str, bool):
            present = ", ".join(entry)
            raise UserError(f"{where}: has no {field!r} by which to group, a number or a text; there are: {present}")
        found[number if field is None else entry[field]].append(entry)
    return list(found.values())


def _assign(
    sizes: Sequence[int], classes: Sequence[Counter[str]], shares: Sequence[float], draw: random.Random
) -> list[int]:
    """Part of each group: of so many images, with so many objects of each class."""
    totals: Counter[str] = sum(classes, Counter())
    lacking = [{key: share * count for key, count in totals.items()} for share in shares]
    room = [share * sum(sizes) for share in shares]
    order = list(range(len(sizes)))
    draw.shuffle(order)
    left = dict.fromkeys(order)
    parts = [0] * len(sizes)

    def place(number: int, key: str | None) -> None:
        of_class = [needs.get(key or "", 0.0) for needs in lacking]
        best = max(range(len(shares)), key=lambda part: (of_class[part], room[part]))
        parts[number] = best
        room[best] -= sizes[number]
        for name, count in classes[number].items():
            lacking[best][name] -= count
        del left[number]

    for key in sorted(totals, key=lambda name: (totals[name], name)):
        for number in [number for number in left if classes[number][key]]:
            place(number, key)
    for number in sorted(left, key=lambda n: -sizes[n]):
        place(number, None)
    return parts
