"""The columns that a data set of the Hub must have, checked before any row is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import datasets
from datasets import ClassLabel, Features, LargeList, List, Value

from semiseg.errors import UserError

Test = Callable[[Any], bool]


class Schema(NamedTuple):
    """What the columns say.

    Attributes:
        class_names: of a `ClassLabel`, whose numbers the rows hold; None where they hold the names themselves.
        columns: names of all columns; those of `objects` as `objects.bbox`.
    """

    class_names: tuple[str, ...] | None
    columns: frozenset[str]


def read_schema(features: Features, place: str) -> Schema:
    """Checks the types of the columns; others than the known ones are ignored.

    Args:
        place: data set and split, for messages.

    Raises:
        UserError: a column is missing or of another type; the message names it, its type and what is expected.
    """
    found = {name: feature for name, feature in features.items() if name != "objects"}
    if "objects" not in features:
        _missing("objects", features, place)
    found |= {f"objects.{name}": feature for name, feature in _fields(features["objects"], place).items()}
    for name, (required, fits, expected) in _COLUMNS.items():
        if name not in found:
            if required:
                _missing(name, found, place)
        elif not fits(found[name]):
            raise UserError(f"{place}: the column {name!r} is {_shown(found[name])}, expected {expected}")
    category = found["objects.category"]
    names = tuple(category.names) if isinstance(category, ClassLabel) else None
    return Schema(names, frozenset(found))


def _fields(objects: Any, place: str) -> dict[str, Any]:
    """The type of each field of one object, from a struct of lists or a list of structs."""
    if isinstance(objects, List | LargeList) and isinstance(objects.feature, dict):
        return dict(objects.feature)
    if isinstance(objects, dict) and all(isinstance(field, List | LargeList) for field in objects.values()):
        return {name: field.feature for name, field in objects.items()}
    raise UserError(
        f"{place}: the column 'objects' is {_shown(objects)}, expected a struct of lists or a list of structs"
    )


def _is_number(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "float"))


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith(("int", "uint"))


def _is_truth(feature: Any) -> bool:
    return _is_integer(feature) or (isinstance(feature, Value) and feature.dtype == "bool") or _is_class(feature)


def _is_class(feature: Any) -> bool:
    return isinstance(feature, ClassLabel)


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _is_box(feature: Any) -> bool:
    return isinstance(feature, List | LargeList) and _is_number(feature.feature)


def _is_segmentation(feature: Any) -> bool:
    """Polygons, RLE, or free JSON, which can mix them; the values are checked when the table is made."""
    if isinstance(feature, dict):
        return {"size", "counts"} <= set(feature)
    is_polygons = isinstance(feature, List | LargeList) and _is_box(feature.feature)
    return is_polygons or isinstance(feature, getattr(datasets, "Json", ()))


# column -> (required, test of its type, the type in words)
_COLUMNS: Mapping[str, tuple[bool, Test, str]] = {
    "image": (True, lambda feature: isinstance(feature, datasets.Image), "Image"),
    "image_id": (False, _is_integer, "an integer"),
    "width": (False, _is_integer, "an integer"),
    "height": (False, _is_integer, "an integer"),
    "objects.bbox": (True, _is_box, "a list of four numbers, x, y, width, height"),
    "objects.category": (True, lambda feature: _is_class(feature) or _is_text(feature), "ClassLabel or string"),
    "objects.segmentation": (
        False,
        _is_segmentation,
        "a list of polygons (each a list of numbers) or an RLE (a struct of size and counts)",
    ),
    "objects.iscrowd": (False, _is_truth, "0, 1, or a truth value"),
    "objects.area": (False, _is_number, "a number"),
    "objects.id": (False, _is_integer, "an integer"),
}


def _missing(name: str, found: Mapping[str, Any], place: str) -> NoReturn:
    raise UserError(f"{place}: no column {name!r}; there are: {', '.join(sorted(found))}")


def _shown(feature: Any) -> str:
    text = str(feature)
    return text if len(text) <= 120 else f"{text[:117]}..."
