"""What every test runs under."""

from __future__ import annotations

import torch
from hypothesis import settings

# The tests are many small problems: threads only get in each other's way, and pytest-xdist runs several workers.
torch.set_num_threads(1)

settings.register_profile("bayes_kfac", deadline=None, max_examples=30)
settings.load_profile("bayes_kfac")
