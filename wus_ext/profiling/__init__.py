"""What each kind of step costs on one's own model: time, memory, and how each layer runs."""

from .profile import profile
from .report import Profile, Step

__all__ = ["Profile", "Step", "profile"]
