"""BoTorch is imported here: a library below it uses what torch has deprecated, and warnings are errors in tests."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=DeprecationWarning)
    import botorch  # noqa: F401
