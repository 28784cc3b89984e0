"""Which layers of a model are meant: name patterns and predicates over ``named_modules``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

#: A pattern of names, several of them, or what says yes or no to a name and its module.
Layers = str | Iterable[str] | Callable[[str, nn.Module], bool]


def select(model: nn.Module, layers: Layers, candidates: Collection[nn.Module]) -> set[nn.Module]:
    """The candidates that ``layers`` means; whatever names a module means all inside it too.

    Args:
        model: names are those of its ``named_modules``; a module with two names answers to both.
        layers: a pattern (``fnmatch``: ``"features.0"``, ``"layer[12].*.conv?"``, ``"*norm*"``), an
            iterable of patterns, or a predicate ``(name, module) -> bool``. No pattern at all means
            no layer.
        candidates: the modules to choose from.

    Raises:
        TypeError: if ``layers`` is none of these.
        ValueError: if a pattern or the predicate means no module, or all together no candidate.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> wus_ext.conversion.selection.select(model, "1", list(model)) == {model[1]}
        True
    """
    named = list(model.named_modules(remove_duplicate=False))
    if callable(layers) and not isinstance(layers, nn.Module | type):
        chosen = [module for name, module in named if layers(name, module)]
        if not chosen:
            raise ValueError(f"layers: the predicate chose none of {len(candidates)} layers")
    else:
        layers = patterns_of(layers)
        if not layers:
            return set()
        chosen = []
        for pattern in layers:
            matched = [module for name, module in named if fnmatchcase(name, pattern)]
            if not matched:
                raise ValueError(_no_match(pattern, named, candidates))
            chosen += matched
    inside = {part for module in chosen for part in module.modules()}
    selected = {module for module in candidates if module in inside}
    if not selected:
        kinds = ", ".join(sorted({type(module).__name__ for module in chosen}))
        raise ValueError(f"layers: what was chosen ({kinds}) has nothing that can skip")
    return selected


def patterns_of(layers: object) -> list[str]:
    """One pattern or several as a list.

    Raises:
        TypeError: if ``layers`` is neither.
    """
    patterns = [layers] if isinstance(layers, str) else layers
    if isinstance(patterns, Iterable) and not isinstance(patterns, nn.Module):
        patterns = list(patterns)
        if all(isinstance(pattern, str) for pattern in patterns):
            return patterns
        layers = next(pattern for pattern in patterns if not isinstance(pattern, str))
    raise TypeError(
        "layers: expected a name pattern, several of them, or a predicate (name, module) -> bool, "
        f"got {type(layers).__name__}"
    )


def _no_match(
    pattern: str, named: list[tuple[str, nn.Module]], candidates: Collection[nn.Module]
) -> str:
    names = [name for name, module in named if name and module in candidates]
    near = get_close_matches(pattern, names, n=5, cutoff=0.4) or names[:5]
    more = "" if len(near) == len(names) else ", ..."
    return f"layers: no module's name matches {pattern!r}; there are {', '.join(near)}{more}"
