"""Every program of docs/sharded_models.md runs on two ranks, and notices when nothing is fused."""

import os
import warnings
from pathlib import Path

import pytest
import torch.distributed as dist

import lossfuse
from programs import programs
from ranks import cases_on_ranks

PAGE = Path(__file__).parent.parent / "docs" / "sharded_models.md"
HEADINGS = ["DDP", "FSDP2", "Tensor parallelism", "Sequence and context parallelism"]


def run(case):
    """In the group that there is; what ``torchrun`` sets, and has the program make and end."""
    heading, fuses = case
    program = next(program for program in programs(PAGE) if program.heading == heading)
    if program.missing:
        return program.missing
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(dist, "init_process_group", lambda *args: None)
        patch.setattr(dist, "destroy_process_group", lambda: None)
        if fuses:
            program.run()
            return []
        patch.setattr(lossfuse, "fuse_lm_head", lambda model: lossfuse.LogitsReport())
        with pytest.raises(AssertionError):
            program.run()
    return []


@pytest.mark.parametrize("fuses", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["", "nothing is fused, which they notice"])
def test_programs_run(fuses):
    assert [program.heading for program in programs(PAGE)] == HEADINGS
    results = cases_on_ranks(2, run, [(heading, fuses) for heading in HEADINGS])
    missing = {name for result in results.values() for name in result[0]}
    if missing:
        pytest.skip(f"a program needs {', '.join(missing)}")
