"""The page of evidence, ``docs/evidence.md``, joined from the committed results of all benchmarks.

``python benchmarks/report.py`` writes it with the other pages. Each benchmark brings its own section; here is what
stands before them.
"""

from __future__ import annotations

import active_protocol
import active_protocol_labels
import cost
import hmc_report
import images_report
import launches
import regression_report
import step_time
import temperature
from uci import HERE

PAGE = HERE.parent / "docs" / "evidence.md"

HEAD = """# Evidence

What this library's posteriors are worth on real data, beside the alternatives of today, each in one run of one
command. Every table is made by `python benchmarks/report.py`, and every picture by the command beside it, from files in
`benchmarks/results`, which hold figures of each split or seed, versions, machine and commit. Commands go on where they
were stopped; `--processes` says how many jobs run at once, `--quick` shows that they run. The data are read from the
folder that `BAYES_KFAC_DATA` names. What is worse than a peer stands here as plainly as what is better.

**In short**

- *Small regressions*: five noisy K-FAC posteriors by one recipe, the temperature chosen on held-out rows, have a better
  density and error than five plain networks on six of nine UCI sets, and level ones on three. [More](#uci-regression)
  With a noise for each input, nothing tuned, densities are the best of all on four sets, and errors worse.
  [More](#a-noise-for-each-input)
- *The true posterior*: of what was compared with NUTS, noisy training comes nearest in the marginals of the function;
  Laplace of all layers is 1.5 to 3 times too wide, and far more when its weights are sampled. The figures that the
  paper gave for noisy K-FAC are not reached on half of the sets. [More](#against-hamiltonian-monte-carlo)
- *Temperature*: it moves predictions several times as far as damping does. Whoever wants predictions chooses it by
  held-out data. [More](#what-temperature-and-damping-do)
- *Images*: of single trainings for the same epochs noisy K-FAC has the best loss on Fashion-MNIST and on MNIST's CNN,
  AdamW on MNIST's MLP; with the same seconds AdamW is level on Fashion-MNIST's CNN, and a deep ensemble is better on
  three of the four; Laplace tells strange images best. On a fifth of CIFAR-10, with a narrow VGG16, noisy K-FAC is far
  ahead of single trainings where images are few, ahead with augmentation or batch normalisation, and behind SGD and
  AdamW with both, but for calibration. [More](#cifar-10-in-the-size-of-a-cpu)
- *Cost*: a step of noisy K-FAC on two cores takes three to five times one of AdamW, and on small regressions two to
  seven times the seconds of a plain network go by to a density near the best; Laplace is the cheap way.
  [More](#cost), [and on steps](#time-of-a-step)

"""


def page() -> str:
    """The whole page: a part of each benchmark that has results."""
    parts = [
        regression_report.section(),
        hmc_report.section(),
        active_protocol.section(),
        active_protocol_labels.section(),
        temperature.section(),
        images_report.section(),
        cost.section(),
        step_time.section(),
        launches.section(),
    ]
    return HEAD + "\n".join(part.rstrip() + "\n" for part in parts if part)
