"""Classification: two classes or more, named by numbers or strings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor

import bayes_kfac as bk
from bayes_kfac import linalg
from bayes_kfac.errors import ArgumentError
from bayes_kfac.prediction import CategoricalPrediction, Source, concatenate, pool
from bayes_kfac.prediction.classification import ClassificationPrediction
from bayes_kfac.prediction.quadrature import joint_normal_nodes
from bayes_kfac.sklearn.base import BayesianMLP, Scaling, checked, checked_weights
from bayes_kfac.sklearn.examples import Array, Examples

#: Points at which the expectation of class probabilities over logits is taken, and inputs that are looked at together.
POINTS, TOGETHER = 256, 1024


class BayesianMLPClassifier(ClassifierMixin, BayesianMLP):  # type: ignore[misc]
    """A multilayer perceptron for classification that knows how sure it is.

    The weights have a Gaussian posterior; the network linearised in its weights makes it a Gaussian over an input's
    logits, and probabilities are the mean of the softmax over it. Inputs are standardised inside.

    Args:
        hidden_layer_sizes: The number of units of each hidden layer; a number for one layer, ``()`` for none.
        activation: ``"tanh"``, ``"relu"``, ``"logistic"`` or ``"identity"``.
        method: ``"laplace"``: the most probable weights by Adam, and the curvature there. ``"noisy"``: noisy natural
            gradient, which trains the posterior itself; some times slower.
        n_members: How many posteriors to train from different initial weights; predictions are those of their equal
            mixture (:class:`bayes_kfac.Mixture`). All costs are times their number.
        structure: The family of the posterior's blocks: one of ``bayes_kfac.structures.available()``, or a structure
            with options of its own.
        damping: How the prior enters a block, ``"exact"``, ``"factored"`` or ``"optimal"``; by default the first for
            Laplace, the second for noisy natural gradient.
        fisher: ``"exact"``, ``"mc"``, ``"empirical"`` or ``"recursive"``; by default the first for Laplace, the second
            for noisy natural gradient.
        prior_precision: The precision of the weights' Gaussian prior, or ``"marginal_likelihood"`` to find one for
            each layer from the training data.
        temperature: The weight of the prior against the data; by default 0.1. At 1, which is Bayes, the
            Kronecker posteriors of small data are too wide.
        batch_size: The most examples in a step.
        learning_rate_init: The first step size, which decays along a half cosine; by default 0.01 for Laplace (Adam)
            and 0.1 for noisy natural gradient.
        max_iter: Passes over the data; by default as many as make 1000 steps, and no less than 20.
        early_stopping: Whether to set a validation part aside, stop when its log-likelihood no longer gets better, and
            go back to the best epoch.
        validation_fraction: How large a part; it has its share of each class.
        n_iter_no_change: Epochs without a better one before training stops.
        random_state: A seed, or a ``numpy.random.RandomState``: of initial weights, batches and samples.
        verbose: Whether to show a progress bar.
        device: Where to compute, as torch names it.
        dtype: ``"float64"`` or ``"float32"``: in what precision to compute.

    Attributes:
        classes_: The classes, in the order of all probabilities.
        posterior_: The :class:`bayes_kfac.Posterior` of the network's weights, for standardised inputs; of several
            members their :class:`bayes_kfac.Mixture`.
        posteriors_: Those of all members.
        input_scaling_: Its ``location`` and ``scale`` of each input.
        total_weight_: How many examples the posterior is from: the sum of their weights.
        n_iter_: Passes over the data, of the first member.
        loss_curve_: The mean negative log-likelihood of each of its passes, in nats.
        validation_scores_: The mean log-likelihood of the validation part after each; empty where there is none.
        n_features_in_: The number of inputs.
        feature_names_in_: Their names, where ``X`` had string names.
    """

    _default_temperature = 0.1
    classes_: NDArray[Any]

    def partial_fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        classes: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """Take in more data, with the posterior so far as their prior; no data are kept.

        The first call is :meth:`fit`. Later ones find the most probable weights of the new data under the old
        posterior, and the Laplace posterior there. The past is remembered to second order, and scales stay those of
        the first data: each call's data should be like the whole, with examples of all
        classes. Structures whose
        posterior cannot be a prior exactly are refused by an error that says so.

        Args:
            X: New inputs, ``[examples, features]``.
            y: Their classes.
            classes: All classes that there will ever be; needed at the first call.
            sample_weight: How often each was seen; see :meth:`fit`.

        Returns:
            This estimator.
        """
        return self._partial_fit(X, y, sample_weight, classes)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The most probable class of each input.

        Args:
            X: Inputs, ``[examples, features]``.

        Returns:
            ``[examples]``.
        """
        index = self.predict_proba(X).argmax(1)  # checks, before classes_ is needed, that there was a fit
        return self.classes_[index]

    def predict_proba(self, X: ArrayLike) -> Array:
        """The probabilities of the classes.

        Args:
            X: Inputs, ``[examples, features]``.

        Returns:
            ``[examples, classes]``, in the order of ``classes_``.
        """
        parts = [part.probs.cpu().numpy() for part in self._predictions(self._inputs(X))]
        probs: Array = np.concatenate(parts).astype(np.float64)
        return probs / probs.sum(1, keepdims=True)

    def predict_log_proba(self, X: ArrayLike) -> Array:
        """The logarithms of :meth:`predict_proba`.

        Args:
            X: Inputs, ``[examples, features]``.

        Returns:
            ``[examples, classes]``.
        """
        return np.log(self.predict_proba(X))

    def predict_distribution(self, X: ArrayLike) -> ClassificationPrediction:
        """The predictive distribution as the library's result.

        Args:
            X: Inputs, ``[examples, features]``.

        Returns:
            With ``probs``, ``entropy``, ``expected_entropy``, ``mutual_information``, ``epistemic_variance`` and more,
            as tensors of ``[examples]`` or ``[examples, classes]``; classes are by their index in ``classes_``, also
            in the targets of ``log_prob``: ``torch.as_tensor(numpy.searchsorted(classes_, y))``.
        """
        return concatenate(list(self._predictions(self._inputs(X))))

    def _predictions(self, inputs: Tensor) -> Iterator[ClassificationPrediction]:
        """Predictions of parts of the inputs."""
        # the expectation over logits is taken at the same points for each input, whatever others there are
        points = joint_normal_nodes(len(self.classes_), inputs, POINTS)
        for part in inputs.split(TOGETHER):
            yield cast(
                ClassificationPrediction,
                pool([self._prediction(posterior, part, points) for posterior in self.posteriors_]),
            )

    @staticmethod
    def _prediction(posterior: bk.Posterior, inputs: Tensor, points: Tensor) -> CategoricalPrediction:
        """What one member says, by the softmax at standard normal points ``[points, classes]``."""
        with torch.no_grad():
            output = posterior.output(inputs)
            root = linalg.psd_root(output.covariance, ["output covariance"])
            logits = output.mean + torch.einsum("bij,sj->sbi", root, points)
        return CategoricalPrediction(logits, Source("linearized", len(points), posterior.provenance, "mc"))

    # -- what BayesianMLP asks for ------------------------------------------------------------------------------------

    def _checked(self, X: Any, y: Any, sample_weight: Any, *, is_first: bool, classes: Any = None) -> Examples:
        inputs, labels = checked(self, X, y, dtype=np.float64, reset=is_first, ensure_min_samples=1 + is_first)
        check_classification_targets(labels)
        weights = checked_weights(sample_weight, inputs)
        known = np.unique(labels[weights > 0]) if classes is None else np.unique(np.asarray(classes))
        if not is_first:
            if classes is not None and not np.array_equal(known, self.classes_):
                raise ArgumentError(f"classes={known!r} are not those of the first call, {self.classes_!r}.")
            known = self.classes_
        if len(known) < 2:
            raise ArgumentError(
                f"y holds one class only, {known.tolist()}. Allowed: two classes or more; for partial_fit, name all "
                "that there will be by classes= of the first call."
            )
        indices = np.minimum(np.searchsorted(known, labels), len(known) - 1)
        if strangers := sorted({str(label) for label in labels[(known[indices] != labels) & (weights > 0)]}):
            raise ArgumentError(
                f"y holds {', '.join(strangers)}, which classes={known.tolist()} do not. Pass all classes that there "
                "will be to the first call of partial_fit."
            )
        self.classes_ = known
        return Examples.of(inputs, indices[:, None].astype(np.float64), weights)

    def _take_scales(self, examples: Examples) -> None:
        self.input_scaling_ = Scaling.of(examples.inputs, examples.weights)

    def _scaled(self, examples: Examples) -> Examples:
        return Examples(self.input_scaling_(examples.inputs), examples.targets, examples.weights)

    def _likelihood(self) -> bk.likelihoods.Categorical:
        return bk.likelihoods.Categorical()

    @property
    def _outputs(self) -> int:
        return len(self.classes_)
