"""The walk over a model's decoder blocks, one in memory at a time."""
