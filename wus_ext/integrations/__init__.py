"""Callbacks for other people's trainers. Each module needs its library, and nothing else does."""
