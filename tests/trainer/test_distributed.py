from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from storage_schemas.errors import UserError
from tests.trainer.ranks import run_ranks
from trainer.distributed import World, all_sum, barrier, launch, wrap

RANKS = 2


def _module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))


def _images() -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def _run_rank(rank: int, ranks: int, out: str) -> None:
    with launch("cpu") as world:
        module = wrap(_module(), world)
        module(_images()[rank::RANKS]).square().mean().backward()
        summed = all_sum(torch.tensor([1.0, rank]))
        barrier()
        found = {"rank": world.rank, "size": world.size, "sum": summed, "gradient": _gradient(module)}
        torch.save(found, Path(out) / f"{rank}.pt")


def _gradient(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def test_two_ranks_sum_and_average_as_one_would(tmp_path: Path) -> None:
    run_ranks(_run_rank, RANKS, str(tmp_path))
    module = _module()
    module(_images()).square().mean().backward()
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert (found["rank"], found["size"]) == (rank, RANKS)
        assert found["sum"].tolist() == [2.0, 1.0]
        torch.testing.assert_close(found["gradient"], _gradient(module))


def test_one_process_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with launch("cpu") as world:
        assert world == World(0, 1, 0, torch.device("cpu"))
        module, value = _module(), torch.ones(3)
        barrier()
        assert wrap(module, world) is module
        summed = all_sum(value)
        assert torch.equal(summed, value)
        assert summed.data_ptr() != value.data_ptr()


def test_a_wrong_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match=r"WORLD_SIZE is 'two'"), launch("cpu"):
        pass


def test_a_world_that_nobody_can_join_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2 without MASTER_ADDR .* torchrun"), launch("cpu"):
        pass


def _launch_joined(rank: int, ranks: int) -> None:
    """As Ray Train does: the ranks are joined before, and parted after."""
    torch.distributed.init_process_group("gloo")
    for _ in range(2):
        with launch("cpu") as world:
            assert (world.rank, world.size) == (rank, RANKS)
            assert all_sum(torch.tensor(1.0)) == RANKS
    assert torch.distributed.is_initialized()
    torch.distributed.destroy_process_group()


def test_ranks_that_are_joined_stay_so() -> None:
    run_ranks(_launch_joined, RANKS)
