"""Flexible Dual Binarization in plain torch: levels, fit, layers, packing and losses."""
