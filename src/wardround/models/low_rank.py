"""Names of the values of low-rank products. Torch-free: a coordinator reads them."""

from __future__ import annotations

#: The parts of a layer: its product, one that stays at each site, and what is folded into its weight.
LORA, LORA_LOCAL, FOLDED = "lora", "lora_local", "lora_folded"
_FIRST, _SECOND = f"{LORA}.a.weight", f"{LORA}.b.weight"


def is_first_factor(name: str) -> bool:
    """Whether a value is the first factor of a product that sites share."""
    return name == _FIRST or name.endswith(f".{_FIRST}")


def is_folded(name: str) -> bool:
    """Whether a value is what was folded into a layer's weight."""
    return name == f"{FOLDED}.weight" or name.endswith(f".{FOLDED}.weight")


def second_of(first: str) -> str:
    """The name of the second factor that belongs to a first one."""
    return first.removesuffix(_FIRST) + _SECOND


def folded_of(first: str) -> str:
    """The name of what is folded into the weight of the layer that a first factor belongs to."""
    return f"{first.removesuffix(_FIRST)}{FOLDED}.weight"


def is_second_factor(name: str) -> bool:
    """Whether a value is the second factor of one."""
    return name == _SECOND or name.endswith(f".{_SECOND}")
