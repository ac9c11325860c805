"""Linearised prediction: the model as an affine function of its weights around the mean, ``f(x) + J(x) (w − M)``.

The output is then Gaussian in closed form, with covariance ``J P⁻¹ Jᵀ``. Jacobians are never formed as such: the
Gaussian takes the rows ``a`` and ``g`` of each layer, of all outputs from one batched backward pass. Where the inputs
require gradients, mean and covariance are differentiable in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from bayes_kfac import linalg
from bayes_kfac.batches import batch_size
from bayes_kfac.curvature import COPIES, Layer, PullBack, Recorder, Rows
from bayes_kfac.errors import UsageError
from bayes_kfac.prediction.forward import at_least_float32, check_batch, watched
from bayes_kfac.prediction.output import GaussianOutput
from bayes_kfac.structures import BlockGaussian, JointGaussian, Whitened

#: Bytes that the rows of a batch may take up by default; larger batches go through in parts.
MEMORY_BUDGET = 1 << 30


@dataclass(frozen=True)
class _Sizes:
    """How much an example takes.

    Attributes:
        bytes: What layers put out, in bytes.
        outputs: The elements of its output.
        splits: Whether a batch can be taken apart. It cannot where examples depend on each other, or where tensors do
            not all have the batch first; then sizes are not known either.
    """

    bytes: int = 1
    outputs: int = 1
    splits: bool = False

    def columns(self, budget: int) -> int:
        """How many outputs' gradients of one example fit into the budget together."""
        return max(1, budget // (COPIES * self.bytes) - 1)


@dataclass(frozen=True)
class Features:
    """A linearised model at some inputs: its output is ``mean + Φ z`` with ``z ~ N(0, I)``.

    Attributes:
        mean: ``[batch, outputs]``.
        whitened: The rows of ``Φ``, the Jacobians in the coordinates in which the weights are white, of each layer.
    """

    mean: Tensor
    whitened: Mapping[str, Whitened]

    def covariance(self, other: Features, groups: int = 1) -> Tensor:
        """The covariances ``Φ Φ'ᵀ`` within groups of examples.

        Args:
            other: The same model at other inputs.
            groups: How many groups of consecutive examples both batches are made of.

        Returns:
            ``[groups, size, other size, outputs, other outputs]``.
        """
        return _products(self.whitened, other.whitened, groups)


@dataclass
class LinearizedModel:
    """A model that is affine in its weights.

    Attributes:
        model: The model; left as it was by every call.
        state: All parameters and buffers at the mean.
        layers: The layers that have a posterior.
        blocks: The zero-mean Gaussian of these layers.
    """

    model: nn.Module
    state: Mapping[str, Tensor]
    layers: Mapping[str, Layer]
    blocks: Mapping[str, BlockGaussian]
    _gaussian: JointGaussian = field(init=False, repr=False)
    _recorder: Recorder = field(init=False, repr=False)
    _is_checked: bool = field(default=False, init=False, repr=False)
    _sizes: dict[Any, _Sizes] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        #: Which layers examples meet in is probed once, so that it serves all calls.
        self._recorder = Recorder(self.layers)
        self._gaussian = JointGaussian.of(self.blocks)

    def output(self, inputs: Any, *, diagonal: bool = False, memory_budget: int = MEMORY_BUDGET) -> GaussianOutput:
        """The Gaussian of the model's output.

        Args:
            inputs: The model's input.
            diagonal: Whether to leave out the covariances between outputs.
            memory_budget: Bytes that rows may take up.

        Returns:
            The mean ``[batch, ...]``, and the covariance ``[batch, outputs, outputs]``, where ``outputs`` counts all
            elements of one example's output, or the variances ``[batch, outputs]``; at least in float32.

        Raises:
            UsageError: If autograd sees none of the layers.
        """
        num_columns = self._sizes_of(inputs).columns(memory_budget)

        def gaussian(part: Any) -> tuple[Tensor, Tensor]:
            with self._forward(part) as (output, pull_back):
                if not diagonal:
                    whitened = self._whitened(pull_back, _unit_vectors(output)).values()
                    return output, _total([own.covariance() for own in whitened])
                variances = []
                for columns in _unit_vectors(output).split(num_columns):
                    whitened = self._whitened(pull_back, columns).values()
                    variances.append(_total([own.variance() for own in whitened]))
                return output, torch.cat(variances, dim=-1)

        means, spreads = zip(*self._in_parts(gaussian, inputs, memory_budget, diagonal=diagonal), strict=True)
        return GaussianOutput(at_least_float32(torch.cat(means)), torch.cat(spreads))

    def covariance(self, inputs: Any, others: Any, *, memory_budget: int = MEMORY_BUDGET) -> Tensor:
        """The covariance between the outputs at some inputs and those at others.

        Args:
            inputs: The model's input.
            others: Another.
            memory_budget: Bytes that rows may take up.

        Returns:
            ``[batch, other batch, outputs, outputs]``.
        """

        def whitened(part: Any) -> dict[str, Whitened]:
            with self._forward(part) as (output, pull_back):
                return self._whitened(pull_back, _unit_vectors(output))

        def against(mine: dict[str, Whitened]) -> Tensor:
            def products(part: Any) -> Tensor:
                theirs = mine if others is inputs and part is inputs else whitened(part)
                return _products(mine, theirs).squeeze(0)

            return torch.cat(list(self._in_parts(products, others, memory_budget, name="others")), dim=1)

        return torch.cat(list(self._in_parts(lambda part: against(whitened(part)), inputs, memory_budget)))

    def features(self, inputs: Any, outputs: Sequence[int] | None = None) -> Features:
        """The model at some inputs, for covariances of which not all pairs are wanted; all of the batch at once.

        Args:
            inputs: The model's input.
            outputs: Which elements of an example's output; by default all of them.

        Returns:
            Means and whitened Jacobians.
        """
        with self._forward(inputs) as (output, pull_back):
            columns, mean = _unit_vectors(output), output.reshape(len(output), -1)
            if outputs is not None:
                columns, mean = columns[list(outputs)], mean[:, list(outputs)]
            return Features(mean, self._whitened(pull_back, columns))

    def draws(self, inputs: Any, changes: Mapping[str, Tensor], *, memory_budget: int = MEMORY_BUDGET) -> Tensor:
        """The affine model's outputs under draws of the weights: the same functions at every call.

        Args:
            inputs: The model's input.
            changes: For each layer the draws' distance from the mean, ``[num_samples, *blocks, out, in]``.
            memory_budget: Bytes that rows may take up.

        Returns:
            ``[num_samples, batch, ...]``.
        """

        def outputs(part: Any) -> Tensor:
            with self._forward(part) as (output, pull_back):
                rows = self._rows(pull_back, _unit_vectors(output))
                response = _total([own.response(changes[name].to(own.gradients)) for name, own in rows.items()])
                return output + response.reshape(-1, *output.shape)

        num_draws = max((len(change) for change in changes.values()), default=0)
        return torch.cat(list(self._in_parts(outputs, inputs, memory_budget, draws=num_draws)), dim=1)

    @contextmanager
    def _forward(self, inputs: Any) -> Iterator[tuple[Tensor, PullBack]]:
        """The output, and what pulls its gradients back, of a pass at the mean."""
        leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        keeps_graph = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
        with (
            watched(self._recorder, self.model, self.state, inputs, keeps_graph=keeps_graph) as (output, pull_back),
            torch.set_grad_enabled(keeps_graph),
            linalg.full_precision(output.device),  # a covariance in 16 bits is not symmetric
        ):
            yield output if keeps_graph else output.detach(), pull_back

    def _rows(self, pull_back: PullBack, columns: Tensor) -> dict[str, Rows]:
        """The rows of all layers, in their Gaussians' dtype."""
        rows = pull_back.rows(columns)
        if self.blocks and not rows:
            raise UsageError(
                "No layer with a posterior was seen by autograd, so the linearised model has no variance. Does its "
                "forward run under torch.no_grad(), or use none of these layers? method='sampling' needs no graph."
            )
        modules = set(self.model.modules())
        has_all = all(use.adapter.module in modules for layer in self.layers.values() for use in layer.uses)
        if not (self._is_checked and has_all):  # what was replaced is not seen any more
            pull_back.check()
            self._is_checked = True
        return {name: own.to(self.blocks[name].like.dtype) for name, own in rows.items()}

    def _whitened(self, pull_back: PullBack, columns: Tensor) -> dict[str, Whitened]:
        return self._gaussian.whitened(self._rows(pull_back, columns))

    # -- memory -------------------------------------------------------------------------------------------------------

    def _in_parts(
        self,
        function: Callable[[Any], Any],
        inputs: Any,
        budget: int,
        *,
        diagonal: bool = False,
        draws: int = 0,
        name: str = "inputs",
    ) -> Iterator[Any]:
        """A function's results for parts of the batch whose rows, and what layers put out under draws, fit a budget."""
        check_batch(inputs, name)
        batch = batch_size(inputs)
        sizes = self._sizes_of(inputs)
        columns = min(sizes.outputs, sizes.columns(budget)) if diagonal else sizes.outputs
        step = max(1, budget // (COPIES * sizes.bytes * (columns + draws + 1)))
        if not sizes.splits or batch is None or step >= batch:
            yield function(inputs)
            return
        for start in range(0, batch, step):
            yield function(_some(inputs, slice(start, start + step)))

    def _sizes_of(self, inputs: Any) -> _Sizes:
        """The sizes of an example of this kind, from the first two of a batch."""
        kinds = [(leaf.shape[1:], leaf.dtype) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
        batch = batch_size(inputs)
        key = (batch is not None and batch > 1, *kinds)
        if batch is None:
            return _Sizes()
        if key not in self._sizes:
            try:
                self._sizes[key] = self._measure(inputs)
            except Exception:  # a model may say in any way that it does not take a part of its batch
                self._sizes[key] = _Sizes()
        return self._sizes[key]

    def _measure(self, inputs: Any) -> _Sizes:
        with torch.no_grad(), self._forward(_some(inputs, slice(0, 1))) as (alone, pull_back):
            made = sum(made.like.numel() for made in pull_back.calls)
        with torch.no_grad(), self._forward(_some(inputs, slice(0, 2))) as (both, _):
            splits = len(both) == 2 and torch.allclose(alone[0], both[0], rtol=1e-3, atol=1e-4)
        return _Sizes(max(made, 1) * alone.element_size(), alone[0].numel(), splits=splits)


def _products(mine: Mapping[str, Whitened], theirs: Mapping[str, Whitened], groups: int = 1) -> Tensor:
    """``Φ Φ'ᵀ`` within groups of examples, ``[groups, size, other size, outputs, other outputs]``."""
    shared = [own.within_groups(theirs[name], groups) for name, own in mine.items() if name in theirs]
    if shared:
        return _total(shared)
    # heads of two tasks, say: functions that share no weight are independent
    own, other = (next(iter(each.values())).variance() for each in (mine, theirs))
    return own.new_zeros(groups, len(own) // groups, len(other) // groups, own.shape[1], other.shape[1])


def _total(parts: Sequence[Tensor]) -> Tensor:
    """The sum of at least one tensor."""
    return reduce(torch.add, parts)


def _unit_vectors(output: Tensor) -> Tensor:
    """Gradients of each output, ``[outputs, batch, ...]``; all examples share their memory."""
    size = output[0].numel()
    basis = torch.eye(size, dtype=output.dtype, device=output.device).reshape(size, 1, *output.shape[1:])
    return basis.expand(size, *output.shape)


def _some(inputs: Any, examples: slice) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor[examples] if tensor.ndim else tensor, inputs)
