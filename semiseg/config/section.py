"""What every table of the configuration is, and the kinds of its numbers."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
Scale = Annotated[float, Field(ge=1 / 64, le=64)]  # of sides or areas by others
Layers = Annotated[int, Field(ge=0, le=100)]  # of a kind; more would be a slip, and take hours to build
Side = Annotated[int, Field(ge=32, le=2**16)]  # of an image in pixels; 32 is the coarsest stride of the backbone
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy takes


class Section(BaseModel):
    """A table of the configuration: unknown keys are errors, values are frozen, types are not coerced from text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def kind_of(table: type[BaseModel]) -> Any:
    """The `kind` that tells a table from the others of its part; None if it has none."""
    field = table.model_fields.get("kind")
    return None if field is None else field.default


def tables_of(annotation: Any) -> list[type[BaseModel]]:
    """The tables that a type allows, in its order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for part in get_args(annotation) for table in tables_of(part)]
