"""What every test runs under."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# The tests are many small problems: threads only get in each other's way, and pytest-xdist runs several workers.
torch.set_num_threads(1)

# Where a change is judged the examples are always the same; elsewhere new ones are looked for.
settings.register_profile("bayes_kfac", deadline=None, max_examples=30, derandomize="CI" in os.environ)
settings.load_profile("bayes_kfac")


@pytest.fixture(autouse=True)
def _compiled_models_stay_compiled() -> Iterator[None]:
    """A test that leaves a recorder attached, as one that fails does, must not make the others run uncompiled."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.set_stance("default")
