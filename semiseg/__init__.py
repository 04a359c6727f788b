"""semiseg: semi-supervised instance segmentation with masks for some classes and boxes for all.

The names in `__all__` are the public Python API (docs/API.md). They are imported on first use: `import semiseg` alone
is cheap and imports no torch.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "ClassSplit",
    "Detections",
    "LoadedModel",
    "RunConfig",
    "UserError",
    "__version__",
    "detect",
    "load_model",
    "losses",
    "train",
]

if TYPE_CHECKING:
    from semiseg import losses
    from semiseg.api import ClassSplit, Detections, LoadedModel, RunConfig, UserError, detect, load_model, train
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module 'semiseg' has no attribute {name!r}")
        from importlib import import_module

        # Importing the package of the losses makes it an attribute by itself.
        value = import_module("semiseg.losses") if name == "losses" else getattr(import_module("semiseg.api"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
