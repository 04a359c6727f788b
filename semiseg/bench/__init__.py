"""Measuring the framework against straightforward formulations of the same work, side by side in one run."""
