"""Every program of docs/trainers.md runs as it stands where its libraries are, and notices when
nothing is fused."""

from contextlib import contextmanager
from pathlib import Path

import pytest

import lossfuse
from programs import Program, programs

TRAINERS = Path(__file__).parent.parent / "docs" / "trainers.md"
PROGRAMS = [pytest.param(program, id=program.heading) for program in programs(TRAINERS)]

# libraries warn as they please; what is fused is asserted by the programs
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Trainers write where they are; accelerate keeps the precision of the last one."""
    monkeypatch.chdir(tmp_path)
    yield
    try:
        from accelerate.state import AcceleratorState
    except ImportError:
        return
    AcceleratorState._reset_state(reset_partial_state=True)


def run(program: Program) -> None:
    if program.missing:
        pytest.skip(f"{program.heading} needs {', '.join(program.missing)}")
    try:
        program.run()
    except ModuleNotFoundError as e:
        # of a library, in another version than it wants
        if (e.name or "lossfuse").startswith("lossfuse"):
            raise
        pytest.skip(f"{program.heading}: {e}")


def test_there_are_programs_and_all_say_what_they_need():
    assert len(PROGRAMS) == 10
    assert all(p.values[0].code.startswith("# pip install lossfuse") for p in PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_it_runs(program):
    run(program)


@pytest.mark.parametrize("program", [p for p in PROGRAMS if "report" in p.values[0].code])
def test_it_notices_when_nothing_is_fused(program, monkeypatch):
    @contextmanager
    def as_before(*models, options=None):
        yield lossfuse.LogitsReport()

    monkeypatch.setattr(lossfuse, "fuse_lm_head", lambda model, **options: lossfuse.LogitsReport())
    monkeypatch.setattr("lossfuse.integrations.trl.fused_log_probs", as_before)
    with pytest.raises(AssertionError):
        run(program)
