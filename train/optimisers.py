"""Which package an optimiser needs."""

import importlib.util

OPTIMISER_PACKAGES = {"bnb": "bitsandbytes", "8bit": "torchao", "4bit": "torchao"}
"""Parts of the names of optimisers, and the packages that have these optimisers. The first that fits counts."""


def check_optimiser(name: str) -> None:
    """Checks that the package of an optimiser is installed.

    Raises:
        ValueError: If it is not.
    """
    package = next((package for part, package in OPTIMISER_PACKAGES.items() if part in name), None)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"optim is {name}, which needs the package {package} (pip install {package}); or leave it out"
        )
