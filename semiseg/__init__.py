"""semiseg: semi-supervised instance segmentation with masks for some classes and boxes for all."""

__version__ = "0.1.0"
