"""The recurrent benchmark runs with every method and keeps its figures."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


def test_all_methods_train_on_a_little_text_and_their_figures_are_kept(tmp_path, monkeypatch, capsys):
    import rnn

    folder = tmp_path / "data" / "tinyshakespeare"
    folder.mkdir(parents=True)
    (folder / "input.txt.gz").write_bytes(gzip.compress(b"to be, or not to be: that is the question. " * 40))
    monkeypatch.setenv("BAYES_KFAC_DATA", str(tmp_path / "data"))
    sizes = {"width": 4, "hidden": 6, "length": 8, "batch": 16, "steps": 12, "evaluate-every": 6, "inverse-every": 2}
    arguments = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["rnn.py", *arguments, "--results", str(tmp_path / "results")])
    rnn.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == list(rnn.METHODS)
    kept = json.loads((tmp_path / "results" / "gru-0.json").read_text())
    assert set(kept["runs"]) == set(rnn.METHODS)
    for figures in kept["runs"].values():
        assert [one["step"] for one in figures] == [6, 12]
        assert figures[1]["train"] < figures[0]["train"]


def test_missing_data_is_one_clear_sentence(tmp_path, monkeypatch):
    import rnn

    monkeypatch.setenv("BAYES_KFAC_DATA", str(tmp_path))
    monkeypatch.setattr(rnn, "HERE", tmp_path / "elsewhere" / "benchmarks")
    with pytest.raises(SystemExit, match="set BAYES_KFAC_DATA"):
        rnn.text()
