"""DistributedDataParallel with the exact loss: two processes train as one would with the whole batch.

    python examples/ddp.py

The mean of two processes' concordance is not the concordance of their batches together, so their moments are merged first. Here
both work on the CPU (gloo), with shares of 5 and 3 sequences; each also trains a copy on all 8, and the weights are compared.
"""

import tempfile

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sage_ext import functional
from sage_ext.nn import CCCLoss, ReliabilityFusion

SHARES = (5, 3)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fuse = ReliabilityFusion({"audio": 6, "visual": 9}, dim=16, detach_weights=False)
        self.out = nn.Linear(16, 2)

    def forward(self, features):
        return self.out(self.fuse(features).fused).tanh()


def work(rank: int, meeting_point: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=len(SHARES))
    torch.manual_seed(0)  # the same weights and data everywhere; a program of yours reads its own share
    model, alone = Model().double(), Model().double()
    alone.load_state_dict(model.state_dict())
    features = {"audio": torch.randn(8, 50, 6).double(), "visual": torch.randn(8, 50, 9).double()}
    targets = torch.stack([features["audio"][..., 0], features["visual"][..., 0]], -1).tanh()
    for one in (model, alone):
        one.fuse.fit_typicality([(features, None, None)])  # or each process would follow its own batches
    mine = slice(0, SHARES[0]) if rank == 0 else slice(SHARES[0], None)

    trained, exact = DistributedDataParallel(model), CCCLoss(process_group=dist.group.WORLD)
    optimiser, optimiser_alone = (torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, alone))
    for step in range(20):
        loss = exact(trained({name: x[mine] for name, x in features.items()}), targets[mine])
        loss_alone = (1 - functional.ccc(alone(features), targets)).mean()
        for optimised, value in ((optimiser, loss), (optimiser_alone, loss_alone)):
            optimised.zero_grad()
            value.backward()
            optimised.step()
        if rank == 0 and step % 5 == 0:
            print(f"step {step}: loss {loss.item():.6f} of two processes, {loss_alone.item():.6f} of one")
    apart = max((a - b).abs().max().item() for a, b in zip(model.parameters(), alone.parameters()))
    if rank == 0:
        print(f"after 20 steps the weights differ by {apart:.1e}")
    dist.destroy_process_group()
    assert apart < 1e-10, apart


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (f"{folder}/meet",), nprocs=len(SHARES))
