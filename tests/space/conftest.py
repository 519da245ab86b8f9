"""The page's functions with the embedded miniature, loaded once."""

import pytest

from vlv.checkpoints import MINIATURE


@pytest.fixture(scope="session")
def demo():
    from vlv.space.app import Demo  # here, because gradio is an extra that tests of other things do without

    return Demo(str(MINIATURE))
