"""Programs of pages about several ranks run under the command that their page prints, and notice
when nothing is fused."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import programs
from ranks import TIMEOUT

ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "distributed": [
        "A shard of the logits",
        "A shard of the head",
        "DTensor",
        "Sequence and context parallelism",
    ],
    "sharded_models": ["DDP", "FSDP2", "Tensor parallelism", "Sequence and context parallelism"],
}
UNFUSED = "import lossfuse\nlossfuse.fuse_lm_head = lambda model: lossfuse.LogitsReport()\n"
# a launch costs 6 to 9 CPU seconds, most of them for importing torch three times: the default run
# has one launch for all programs of a page
ALONE = [
    pytest.param(
        page,
        heading,
        marks=() if (page, heading) == ("distributed", "DTensor") else pytest.mark.slow,
    )
    for page, headings in PROGRAMS.items()
    for heading in headings
]


def page(name):
    return ROOT / "docs" / f"{name}.md"


def program(name, heading):
    (found,) = [program for program in programs.programs(page(name)) if program.heading == heading]
    if found.missing:
        pytest.skip(f"{heading} needs {', '.join(found.missing)}")
    return found


def launched(name, folder, *words):
    """The command of a page, in a folder and with other words for ``program.py``: its exit status,
    and what it printed."""
    torchrun, *arguments, file = re.search(
        r"```sh\n(.*)\n```", page(name).read_text(encoding="utf-8")
    )[1].split()
    assert (torchrun, file) == ("torchrun", "program.py")
    # a free port instead of 29500; a host's name need not resolve; the package of this checkout
    env = os.environ | {"PET_STANDALONE": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", *arguments, *(words or [file])]
    with subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=TIMEOUT)
        finally:
            # torchrun ends its workers
            process.terminate()
    return process.returncode, said


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_run_under_torchrun(name, tmp_path):
    found = programs.programs(page(name))
    assert [program.heading for program in found] == PROGRAMS[name]
    status, said = launched(name, tmp_path, programs.__file__, str(page(name)))
    assert status == 0, said
    for each in found:
        assert said.count(f"ran: {each.heading}") == (0 if each.missing else 2), said


@pytest.mark.parametrize(("name", "heading"), ALONE)
def test_a_program_runs_as_printed(name, heading, tmp_path):
    (tmp_path / "program.py").write_text(program(name, heading).code, encoding="utf-8")
    status, said = launched(name, tmp_path)
    assert status == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("heading", PROGRAMS["sharded_models"])
def test_a_program_notices_when_nothing_is_fused(heading, tmp_path):
    (tmp_path / "program.py").write_text(
        UNFUSED + program("sharded_models", heading).code, encoding="utf-8"
    )
    status, said = launched("sharded_models", tmp_path)
    assert status != 0 and "AssertionError" in said, said
