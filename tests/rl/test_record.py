"""What a run writes about itself."""

import pytest
import torch

from salsa.rl import record
from salsa.workflow import runs


def test_a_record_goes_on_where_the_checkpoint_does(tmp_path):
    log = record.Record(tmp_path, 0, True, 2)
    for iteration in range(4):
        kept = [] if iteration % 2 else [{"iteration": iteration}]
        log.add({"iteration": iteration, "score": 0.1 * iteration}, kept)
    again = record.Record(tmp_path, 2, True, 2)
    assert [row["iteration"] for row in again.metrics] == [0, 1] and again.rollouts == [{"iteration": 0}]
    again.add({"iteration": 2, "score": 7.0}, [{"iteration": 2}])
    assert [row["score"] for row in runs.read_jsonl(tmp_path / "metrics.jsonl")] == [0.0, 0.1, 7.0]
    record.Record(tmp_path, 3, False, 2).add({"iteration": 3})
    assert len(runs.read_jsonl(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.parametrize("name", ["metrics", "rollouts"])
@pytest.mark.parametrize("rows", [None, [], [{"iteration": 0}, {"iteration": 2}], [{}, 1, None], [{"iteration": 1}]])
def test_records_that_are_missing_are_noticed(tmp_path, name, rows):
    for each in ("metrics", "rollouts"):
        runs.write_jsonl(tmp_path / f"{each}.jsonl", [{"iteration": i} for i in range(3)])
    (tmp_path / f"{name}.jsonl").unlink()
    if rows is not None:
        runs.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    with pytest.raises(runs.UserError, match=rf"{name}\.jsonl: lacks rows before iteration 3.* remove"):
        record.Record(tmp_path, 3, True, 1)


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[1, 1, 1, 0]])
    assert record.explained_variance(returns, returns, mask) == 1
    assert record.explained_variance(torch.full((1, 4), 2.0), returns, mask) == 0
    assert record.explained_variance(torch.tensor([[2.0, 2.0, 3.0, 0.0]]), returns, mask) == pytest.approx(2 / 3)
