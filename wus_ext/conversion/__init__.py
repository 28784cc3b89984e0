"""Models that can skip: made, switched and undone."""
