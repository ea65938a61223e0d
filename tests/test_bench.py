"""The benchmark command, small: every variant in every row, an error beside every time, rows appended as CSV."""

import pytest

for name in ("pandas", "rich"):
    pytest.importorskip(name)

import pandas as pd  # noqa: E402

from lossfuse.perf import bench  # noqa: E402
from lossfuse.perf.__main__ import shape  # noqa: E402


def test_rows_are_complete_and_appended(tmp_path, capsys):
    out = tmp_path / "results" / "rows.csv"
    for _ in range(2):
        bench.main([(40, 500)], ["fp32", "bf16"], repeats=3, out=out)
    rows = pd.read_csv(out)
    assert len(rows) == 2 * 2 * len(bench.VARIANTS)
    assert set(rows["variant"]) == set(bench.VARIANTS)
    assert (rows["ms_p20"] <= rows["ms_p50"]).all() and (rows["ms_p50"] <= rows["ms_p80"]).all()
    assert rows.loc[rows["variant"] == bench.BASELINE, "speedup"].eq(1.0).all()
    ours = rows[rows["variant"] == "lossfuse"].set_index("dtype")["worst_relative_error"]
    assert (ours["fp32"] < 1e-4).all() and (ours["bf16"] < 2**-7).all()
    assert "Loss and gradient" in capsys.readouterr().out


def test_a_wrong_gradient_has_a_large_error():
    x, target = bench.inputs(8, 100, bench.torch.float32, bench.torch.device("cpu"))
    assert bench.worst_error(lambda x, t: 2.0 * bench.F.cross_entropy(x, t), x, target) > 0.9


def test_shapes_are_read():
    assert shape("2048x128256") == (2048, 128256)
    with pytest.raises(ValueError):
        shape("2048")
