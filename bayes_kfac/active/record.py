"""What a loop has to know to go on: which examples were labelled in which round, and the answers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayes_kfac.errors import ArgumentError, TargetError

if TYPE_CHECKING:
    from bayes_kfac.active.loop import LoopState

FORMAT = 1


@dataclass(frozen=True)
class Record:
    """The labels of all rounds so far; never changed, only extended.

    Attributes:
        seed: The loop's.
        pool_size: How many examples its pool has.
        indices: Of the labelled examples, in order, ``[labels]``.
        targets: Their targets, ``[labels, ...]``.
        sizes: How many were labelled in each round.
        scores: Of the last choice, ``[pool]``; ``None`` where there was none.
    """

    seed: int
    pool_size: int
    indices: Tensor
    targets: Tensor
    sizes: tuple[int, ...]
    scores: Tensor | None

    @classmethod
    def empty(cls, seed: int, pool_size: int) -> Record:
        """Of a loop that has not begun."""
        return cls(seed, pool_size, torch.empty(0, dtype=torch.long), torch.empty(0), (), None)

    @classmethod
    def resumed(cls, source: str | Path | LoopState, seed: int, pool_size: int) -> Record:
        """The record of a state or file, for a loop with this seed over this pool.

        Args:
            source: The state, or its file.
            seed: The loop's.
            pool_size: The pool's.

        Returns:
            The record.

        Raises:
            ArgumentError: If it is of another loop.
        """
        record = cls._read(Path(source)) if isinstance(source, str | Path) else source.record
        for name, own, given in (("seed", record.seed, seed), ("pool size", record.pool_size, pool_size)):
            if own != given:
                raise ArgumentError(f"resume= is of a loop with {name} {own}, and this one has {given}. Pass the same.")
        return record

    @property
    def round(self) -> int:
        """The last round, from 0; −1 before it."""
        return len(self.sizes) - 1

    @property
    def chosen(self) -> Tensor:
        """The indices of the last round."""
        return self.indices[len(self.indices) - self.sizes[-1] :]

    def until(self, last: int) -> Record:
        """The record as it was after a round, without its scores."""
        sizes = self.sizes[: last + 1]
        count = sum(sizes)
        return replace(self, indices=self.indices[:count], targets=self.targets[:count], sizes=sizes, scores=None)

    def extended(self, indices: Tensor, targets: Tensor, scores: Tensor | None) -> Record:
        """The record after another round.

        Args:
            indices: What was labelled.
            targets: The answers.
            scores: By which they were chosen.

        Returns:
            The new record.

        Raises:
            TargetError: If the answers are not like those before.
        """
        if self.sizes and (targets.shape[1:], targets.dtype) != (self.targets.shape[1:], self.targets.dtype):
            raise TargetError(
                f"The oracle gave targets of shape {tuple(targets.shape)} and dtype {targets.dtype}, and before "
                f"{tuple(self.targets.shape)} and {self.targets.dtype}. Allowed: the same kind in every round."
            )
        return replace(
            self,
            indices=torch.cat([self.indices, indices]),
            targets=torch.cat([self.targets, targets]) if self.sizes else targets,
            sizes=(*self.sizes, len(indices)),
            scores=scores,
        )

    def save(self, path: str | Path) -> None:
        """Write the record to a safetensors file, which is there whole or not at all.

        Args:
            path: The file.
        """
        path = Path(path)
        tensors = {"indices": self.indices, "targets": self.targets, "sizes": torch.tensor(self.sizes)}
        if self.scores is not None:
            tensors["scores"] = self.scores
        header = {"format": FORMAT, "seed": self.seed, "pool_size": self.pool_size}
        unfinished = path.with_name(f"{path.name}.unfinished")
        save_file(
            {name: value.contiguous().clone() for name, value in tensors.items()},
            unfinished,
            metadata={"bayes_kfac.active": json.dumps(header)},
        )
        os.replace(unfinished, path)

    @classmethod
    def _read(cls, path: Path) -> Record:
        if not path.exists():
            raise ArgumentError(
                f"resume={str(path)!r} does not exist. Allowed: a file of LoopState.save or checkpoint=."
            )
        try:
            with safe_open(path, framework="pt") as file:
                header = (file.metadata() or {})["bayes_kfac.active"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        except (SafetensorError, KeyError) as error:
            raise ArgumentError(
                f"resume={str(path)!r} is no file of a loop. Allowed: a file of LoopState.save or checkpoint=."
            ) from error
        values = json.loads(header)
        if values["format"] != FORMAT:
            raise ArgumentError(f"resume={str(path)!r} has format {values['format']}, and this version reads {FORMAT}.")
        sizes = tuple(tensors["sizes"].tolist())
        return cls(
            values["seed"], values["pool_size"], tensors["indices"], tensors["targets"], sizes, tensors.get("scores")
        )
