"""Measurements that take minutes to hours and are not part of the package; run from a checkout."""
