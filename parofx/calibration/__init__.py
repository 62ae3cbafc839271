"""Fitting: calibration text, input statistics, the range objective for rotations and scales, and rounding."""
