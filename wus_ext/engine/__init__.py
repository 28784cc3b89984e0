"""How a step of a converted model runs."""
