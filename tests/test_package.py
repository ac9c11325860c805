"""The package: its public names, what importing it costs, and what it ships."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bayes_kfac

#: What `import bayes_kfac` must not bring in beyond `import torch`.
HEAVY = ["pyro", "matplotlib", "sklearn", "scipy", "tqdm", "safetensors", "pandas"]


def in_fresh_python(code: str) -> Any:
    """The JSON that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


MEASURE = f"""
import json, sys, time
start = time.process_time()
import torch
of_torch = time.process_time() - start
before = set(sys.modules)
start = time.process_time()
import bayes_kfac
share = (time.process_time() - start) / of_torch
added = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(json.dumps({{"share": share, "heavy": sorted(added & set({HEAVY!r}))}}))
"""


def test_import_is_light_and_quick() -> None:
    """Nothing heavy comes with the import; less than 0.3 of the processor's time for torch's own (the best of 5)."""
    shares = []  # a share, since seconds are those of one machine on one day
    for _ in range(5):
        result = in_fresh_python(MEASURE)
        assert result["heavy"] == []
        shares.append(result["share"])
        if shares[-1] < 0.3:
            break
    assert min(shares) < 0.3


def test_lazy_names_are_imported_at_first_use() -> None:
    """``bk.distributions`` brings Pyro when it is asked for, and only then; so does a layer's distribution."""
    code = (
        "import json, sys, bayes_kfac as bk\n"
        "before = 'pyro' in sys.modules\n"
        "bk.distributions.MatrixNormal\n"
        "print(json.dumps([before, 'pyro' in sys.modules]))"
    )
    assert in_fresh_python(code) == [False, True]


def test_a_missing_extra_is_named() -> None:
    """What to install is in the message."""
    code = (
        "import json, sys, bayes_kfac as bk\n"
        "sys.modules['botorch'] = None\n"
        "try:\n"
        "    bk.botorch\n"
        "except ModuleNotFoundError as error:\n"
        "    print(json.dumps([str(error), error.name]))"
    )
    message, name = in_fresh_python(code)
    assert "pip install 'bayes-kfac[botorch]'" in message
    assert name == "botorch"


@pytest.mark.parametrize("name", bayes_kfac.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(bayes_kfac, name) is not None
    assert name in dir(bayes_kfac)


@pytest.mark.parametrize(
    "module",
    [
        "active",
        "botorch",
        "curvature",
        "distributions",
        "likelihoods",
        "metrics",
        "plotting",
        "prediction",
        "pyro",
        "sklearn",
        "structures",
        "training",
    ],
)
def test_every_public_name_of_a_module_resolves(module: str) -> None:
    imported = importlib.import_module(f"bayes_kfac.{module}")
    names = getattr(imported, "__all__", [])
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(imported, name)] == []


def test_names_that_outside_code_relies_on() -> None:
    """The names of the design's own example."""
    for name in ("NoisyKFAC", "NoisyNaturalGradient", "Posterior", "fit", "likelihoods", "structures", "distributions"):
        assert name in bayes_kfac.__all__
    assert issubclass(bayes_kfac.NoisyKFAC, bayes_kfac.NoisyNaturalGradient)
    assert "kron" in bayes_kfac.structures.available()


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'NoisyKFCA'"):
        bayes_kfac.NoisyKFCA  # noqa: B018


def test_version_is_the_distributions() -> None:
    assert bayes_kfac.__version__ == importlib.metadata.version("bayes-kfac")


def test_types_are_shipped() -> None:
    """``py.typed`` lies in the package, which is shipped as a whole."""
    assert (Path(bayes_kfac.__file__).parent / "py.typed").is_file()


def test_no_module_imports_what_is_above_it() -> None:
    """The ground floor knows neither posterior nor training nor predictions."""
    root = Path(bayes_kfac.__file__).parent
    above = ("posterior", "training", "prediction", "serialization", "laplace", "active", "metrics", "plotting")
    ground = [*root.glob("*/*.py"), root / "linalg.py", root / "errors.py"]
    for file in ground:
        if file.parent.name not in ("curvature", "structures", "distributions", "likelihoods", root.name):
            continue
        text = file.read_text(encoding="utf-8")
        for name in above:
            assert f"bayes_kfac.{name}" not in text.replace(f"``bayes_kfac.{name}", ""), f"{file.name} knows {name}"
            assert f"from bayes_kfac import {name}" not in text, f"{file.name} knows {name}"
