"""What a run writes about itself."""

import pytest
import torch

from salsa import runs
from salsa.ppo import record


def test_a_record_goes_on_where_the_checkpoint_does(tmp_path):
    log = record.Record(tmp_path, 0, writes=True)
    for iteration in range(4):
        log.add({"iteration": iteration, "score": 0.1 * iteration}, [{"iteration": iteration}] if iteration % 2 else [])
    again = record.Record(tmp_path, 2, writes=True)
    assert [row["iteration"] for row in again.metrics] == [0, 1] and again.rollouts == [{"iteration": 1}]
    again.add({"iteration": 2, "score": 7.0})
    assert [row["score"] for row in runs.read_jsonl(tmp_path / "metrics.jsonl")] == [0.0, 0.1, 7.0]
    record.Record(tmp_path, 3, writes=False).add({"iteration": 3})
    assert len(runs.read_jsonl(tmp_path / "metrics.jsonl")) == 3


def test_metrics_that_are_missing_are_noticed(tmp_path):
    runs.write_jsonl(tmp_path / "metrics.jsonl", [{"iteration": 0}, {"iteration": 2}])
    runs.write_jsonl(tmp_path / "rollouts.jsonl", [])
    with pytest.raises(runs.UserError, match=r"metrics.jsonl: 2 rows before iteration 3.* remove"):
        record.Record(tmp_path, 3, writes=True)


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[1, 1, 1, 0]])
    assert record.explained_variance(returns, returns, mask) == 1
    assert record.explained_variance(torch.full((1, 4), 2.0), returns, mask) == 0
    assert record.explained_variance(torch.tensor([[2.0, 2.0, 3.0, 0.0]]), returns, mask) == pytest.approx(2 / 3)
