"""What artifacts and scratch folders hold, typed."""
