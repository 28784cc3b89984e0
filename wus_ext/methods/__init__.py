"""When to skip."""
