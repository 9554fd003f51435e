"""What was to go and stays because a tensor would become empty is said, never silent."""

import torch
from torch import Tensor, nn

from pipeline.channels import Ledger, liveness, shrink


class Rolled(nn.Module):
    """The last channel alone is one input of the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(torch.cat([x[:, 3:], x[:, :3]], 1))


def test_the_last_channel_of_a_slice_stays_and_the_ledger_says_so(experiment):
    torch.manual_seed(0)
    found = experiment(Rolled(), torch.randn(2, 3, 4, 4), seed=0, ratio=0.0)
    state = dict(found.captured.state)
    for name in ("first.weight", "first.bias"):
        state[name] = state[name].clone()
        state[name][[0, 3]] = 0
    folded = found.captured.with_state(state)
    live = liveness(found.analysis, state)
    assert live.dead["first"].tolist() == [True, False, False, True]
    shrunk = shrink(folded, found.analysis, live.dead)
    ledger = Ledger.from_json(shrunk.ledger.to_json())
    assert (ledger.groups["first"], ledger.spared["first"]) == ((0,), (3,))
    why = ledger.why("first")
    assert why["spared"] == {"first": [3]}
    assert why["removed"]["first.weight[0]"] == [0]
