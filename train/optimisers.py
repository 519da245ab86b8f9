"""Which package an optimiser needs."""

import importlib.util

OPTIMISER_PACKAGES = {
    **dict.fromkeys(("adamw_torch_8bit", "adamw_torch_4bit"), "torchao"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit"), "bitsandbytes"),
    **dict.fromkeys(("rmsprop_bnb_32bit", "ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit"), "bitsandbytes"),
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw_8bit", "paged_ademamix_32bit"), "bitsandbytes"),
    **dict.fromkeys(("paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit"), "bitsandbytes"),
}
"""Values of `optim` whose optimisers are in another package, and that package."""


def check_optimiser(name: str) -> None:
    """Checks that the package of an optimiser is installed.

    Raises:
        ValueError: If it is not.
    """
    package = OPTIMISER_PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"optim is {name}, which needs the package {package} (pip install {package}); or leave it out"
        )
