"""What the configuration asks timm: whether it has a network, and how its images are normalised."""

from __future__ import annotations

import difflib
from typing import Any

from semiseg.errors import UserError

LITE0 = "tf_efficientnet_lite0"
LITE0_NORMALISATION = ([127.0] * 3, [128.0] * 3)  # of the package's weights: their input is (x - 127) / 128


def import_timm() -> Any:
    """The module timm; a UserError if it is not installed."""
    try:
        import timm
    except ImportError:
        raise UserError("model.backbone.kind = 'timm' needs timm: pip install 'semiseg[timm]'") from None
    return timm


def require_name(name: str) -> None:
    """A UserError if timm has no network of that name."""
    timm = import_timm()
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise UserError(f"model.backbone.name = {name!r}: timm {timm.__version__} has no such network{hint}")
    tags = [full.partition(".")[2] for full in timm.list_models(f"{architecture}.*", pretrained=True)]
    if tag and tag not in tags:
        raise UserError(
            f"model.backbone.name = {name!r}: timm {timm.__version__} has no such weights of {architecture}; "
            f"allowed behind the point: {', '.join(tags) or 'nothing'}"
        )


def timm_normalisation(name: str) -> tuple[list[float], list[float]]:
    """Mean and deviation of RGB by which timm normalises a network's images, here of values from 0 to 255.

    Raises:
        UserError: timm is not installed, or has no such network.
    """
    require_name(name)
    known = import_timm().get_pretrained_cfg(name)
    if known is None:  # of some networks it knows no weights
        return [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    mean, deviation = ([round(255 * value, 6) for value in values] for values in (known.mean, known.std))
    return mean, deviation
