"""The page of rows: its numbers, its charts in a browser without a network, and hostile text."""

import itertools
import math
import re

import pytest

import perf_commands  # noqa: F401  # isort: skip
import pandas as pd

from browsers import apart, browser, contrast, opened, phone
from fake_rows import many, row
from lossfuse.perf import charts, dashboard, methods, pages, rows, shown

EVIL = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "<!--<script>",
    "__proto__",
    "&lt;b&gt;'\"",
]
LLAMA, GEMMA = {"llama2": (8192, None, 32000)}, {"gemma3": (4096, None, 262144)}
FEW = LLAMA | GEMMA | {"head-qwen": (16384, 2048, 151936)}
SCRIPTS = re.compile(r"<script[^>]*>.*?</script>", re.DOTALL)
TORCH = "F.cross_entropy"
DAYS = [f"2026-11-0{day}T00:00:00+00:00" for day in range(1, 5)]


def framed(*records):
    return rows._typed(pd.DataFrame(records, columns=list(rows.COLUMNS)), "no file")


def prepared(*records):
    return shown.prepare(framed(*records))[0]


def summarized(*records):
    return shown.summary(prepared(*records))


def drawn(dom, name):
    """The element of a chart."""
    start = dom.index(f'<div id="{name}"')
    return dom[start : dom.index("</figure>", start)]


def texts_of(svg):
    return set(re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def symbols(svg):
    groups = re.findall(r'<g class="mark-symbol role-mark[^>]*>(.*?)</g>', svg, re.DOTALL)
    return sum(len(re.findall(r"<(?:path|line|text)\b", group)) for group in groups)


def timed(ms, **changes):
    """A row with a spread of 0.1 ms on both sides."""
    return row(**{"ms_p50": ms, "ms_p20": ms - 0.1, "ms_p80": ms + 0.1} | changes)


OURS = timed(1.5, peak_extra_bytes=1.0 * 2**30)
BASE = timed(3.0, peak_extra_bytes=3.0 * 2**30, method=TORCH)


def test_a_summary_compares_ours_with_torch():
    (one,) = summarized(OURS, BASE)
    assert (one["faster"], one["saved"], one["within_spread"]) == (2.0, 2 * 2**30, False)
    assert one["saved_share"] == pytest.approx(2 / 3) and one["share"] == pytest.approx(0.6)
    assert (one["faster_text"], one["saved_text"]) == ("2.00\u00d7", "67% less")
    assert one["time_text"] == "3.00 ms \u2192 1.50 ms"
    assert one["memory_text"] == "3.00 GiB \u2192 1.00 GiB"
    (near,) = summarized(OURS | {"ms_p80": 2.95}, BASE)
    assert near["within_spread"]
    (light,) = summarized(OURS | {"peak_extra_bytes": math.nan}, BASE)
    assert light["faster"] == 2.0 and light["saved"] is None
    assert light["memory_why"] == "not measured" and summarized(BASE) == []
    size = {"op": "head", "case": "head-qwen", "n": 16384, "d": 2048.0, "v": 151936}
    head = [
        row(**size, method=m, ms_p50=ms)
        for m, ms in (("lossfuse linear", 1), ("linear + " + TORCH, 2))
    ]
    (one,) = summarized(*head)
    assert one["faster"] == 2.0 and one["shape"] == "16,384 \u00d7 2,048 \u00d7 151,936"
    assert one["reason"].startswith("Qwen 3")


ANOTHER = f"{TORCH} was not in this run"
RED = {"tests": "failed"}
NO_RATIO = [
    *(({}, {field: "other"}, ANOTHER) for field in ("device", "settings")),
    *(({}, {key: v}, ANOTHER) for key, v in (("dtype", "fp32"), ("mode", "forward"))),
    *(({}, {key: v}, ANOTHER) for key, v in (("case", "gpt2"), ("date", DAYS[0]))),
    ({}, {"status": "wrong"}, f"{TORCH}: wrong"),
    ({}, {"ms_p50": math.nan}, "no time"),
    ({"status": "failed"}, {}, "lossfuse: failed"),
    (RED, RED, "tests of this commit failed"),
]


@pytest.mark.parametrize(("ours", "base", "why"), NO_RATIO)
def test_ratios_need_two_good_rows_of_one_run(ours, base, why):
    one = next(s for s in summarized(OURS | ours, BASE | base) if s["case"] == "llama2")
    assert (one["faster"], one["saved"], one["why"]) == (None, None, why)
    assert (one["share"] is None) == bool(ours)


def test_the_last_run_is_shown_and_an_earlier_shape_is_left_out():
    runs = [row(date=DAYS[i], commit=DAYS[i]) for i in (0, 2, 1)]
    current, left_out = shown.prepare(framed(*runs, row(date="2026-10-01", n=8)))
    assert left_out == 1 and len(current) == 3
    assert [one["date"] for one in current if one["shown"]] == [DAYS[2]]


def test_one_run_of_a_case_is_shown_and_rows_of_other_runs_are_marked():
    """Times of different runs drift: unmarked they would contradict the summary's ratio."""
    both, compiled, later = ("lossfuse", TORCH), "torch.compile", "lossfuse stats"
    days = {both[0]: (0, 1, 3), TORCH: (0, 1, 2), compiled: (0, 1), later: (2, 3), "Liger": (0,)}
    runs = [row(method=m, date=DAYS[i], commit=f"c{i}") for m in days for i in days[m]]
    seen = {one["method"]: (one["date"], one["other"]) for one in prepared(*runs) if one["shown"]}
    others = {later: (DAYS[3], "another run"), "Liger": (DAYS[0], "another run")}
    assert seen == dict.fromkeys((*both, compiled), (DAYS[1], "")) | others
    # no run has both: the newest with ours
    runs = [row(method=name, date=DAYS[i]) for i, name in enumerate((*both, "Liger"))]
    alone = [one["method"] for one in prepared(*runs) if one["shown"] and not one["other"]]
    assert alone == ["lossfuse"]


@pytest.mark.parametrize("spread", [True, False])
def test_a_roofline_that_a_method_beats_is_not_a_bound(spread):
    """On a CPU without bf16 instructions a head in fp32 is faster than torch's products in bf16."""
    times = {} if spread else {"ms_p20": None, "ms_p80": None}
    slow = row(**{"method": TORCH, "ms_p50": 2.0, "ms_p80": 2.1, "date": DAYS[0]} | times)
    beaten = [row(**times, date=DAYS[1], ideal_ms=1.2, method=m) for m in ("lossfuse", TORCH)]
    found = prepared(slow, *beaten)
    assert [one["share_text"] for one in found if one["date"] == DAYS[0]] == ["45%"]
    for one in (one for one in found if one["date"] == DAYS[1]):
        assert one["share"] is None and one["ideal"] is None and one["share_text"] == ""
        assert one["share_gap"] == "not a bound" and one["ideal_text"] == "1.20 ms, not a bound"
    (one,) = shown.summary(found)
    assert one["share"] is None and not one["bound"]
    (near,) = prepared(row(ideal_ms=1.02))
    assert near["share"] == 1.02, "within its spread"


def test_the_fastest_peer_is_of_the_same_run_and_not_a_form_of_the_baseline():
    others = [
        timed(1.2, method="torch.compile", ms_p80=1.45),
        row(method="Liger", ms_p50=1.9),
        row(method=f"{TORCH}(x.float())"),
        row(method="lossfuse in place"),
        row(method="quack", status="wrong"),
        row(method="CCE", ms_p50=0.5, date=DAYS[0]),
    ]
    (one,) = summarized(BASE, OURS, *others)
    assert one["peer"] == "torch.compile" and one["peer_within_spread"]
    assert one["peer_faster"] == pytest.approx(0.8) and one["peer_faster_text"] == "0.80\u00d7"
    assert one["peer_text"] == "torch.compile, 1.20 ms, 500 MiB"
    (alone,) = summarized(BASE, OURS)
    assert (alone["peer"], alone["peer_faster"], alone["peer_text"]) == ("", None, "")


def test_memory_is_in_units_of_the_logits_and_failures_have_no_numbers():
    for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
        (one,) = prepared(row(dtype=dtype, peak_extra_bytes=1.5 * 8192 * 32000 * itemsize))
        assert one["logits"] == 1.5 and one["logits_text"] == "1.50\u00d7"
    (bad,) = prepared(row(status="wrong", note="why"))
    numbers = ("ms", "ms_lo", "share", "logits", "loss_error", "grad_error")
    assert [bad[field] for field in numbers] == [None] * 6
    assert not any(bad[field] for field in bad if field.endswith("_text") and field != "ideal_text")
    assert bad["problem"] == "wrong" and bad["note"] == "why"


TEXTS = {
    "digits": {0: "0", 0.012345: "0.0123", 12.345: "12.3", 999.9: "1,000", 1234.5: "1,230"},
    "_time": {None: "", 0.05: "50.0 \u00b5s", 3.14159: "3.14 ms", 20_000: "20.0 s"},
    "_bytes": {0: "0 B", 2048: "2.00 KiB", 3 * 2**20: "3.00 MiB", 2**40: "1,020 GiB"},
    "_error": {None: "", 0: "0", 1.0: "1", 3.6: "4", 0.0862: "9e-2", 4e-7: "4e-7", 2e10: "2e10"},
    "_times": {0: "0.00\u00d7", 4e-5: "<0.01\u00d7", 1.5: "1.50\u00d7", 250: "250\u00d7"},
}


@pytest.mark.parametrize("function", TEXTS)
def test_numbers_have_three_digits_and_a_unit(function):
    assert {value: getattr(shown, function)(value) for value in TEXTS[function]} == TEXTS[function]
    assert [shown.digits(value) for value in (1e300, -2.5)] == ["1e+300", "-2.50"]


@pytest.mark.parametrize("op", methods.OURS)
def test_colours_of_one_chart_differ_on_light_and_dark_pages(op):
    colors = {m.name: shown.color(m.name) for m in methods.METHODS if m.op == op}
    papers = ("#ffffff", "#12161c")
    assert min(contrast(color, paper) for color in colors.values() for paper in papers) >= 3
    pairs = itertools.combinations(colors, 2)
    near = {(a, b): distance for a, b in pairs if (distance := apart(colors[a], colors[b])) < 0.05}
    assert near == {}
    assert shown.color("Liger") == shown.COLORS["Liger"]
    assert shown.color("new") in shown.OTHERS and shown.color("lossfuse new") not in shown.OTHERS


def test_a_cpu_shows_fp32_first_and_a_gpu_bf16():
    cpus = ["AMD EPYC, 2 threads", "Xeon, 64 threads (THP_MEM_ALLOC_ENABLE=1)"]
    firsts = [shown.dtypes(place)[0] for place in (*cpus, "NVIDIA H100")]
    assert firsts == ["fp32", "fp32", "bf16"]


@browser
def test_a_browser_draws_all_charts_without_a_network(tmp_path):
    page = dashboard.build(framed(*many(FEW, runs=3)))
    # addresses in scripts are names of XML and Vega namespaces
    markup = SCRIPTS.sub("", page)
    assert "://" not in markup and not re.search(r"\b(src|href)\s*=|@import|url\(", markup)
    dom, console = opened(page, tmp_path)
    assert 'data-drawn="1"' in dom and not console and 'role="alert" hidden' in dom
    lines = {"lossfuse", "lossfuse reference", TORCH, f"{TORCH}(x.float())", "torch.compile"}
    for chart in ("time", "share", "memory", "error"):
        assert lines | {"Liger", "quack"} <= texts_of(drawn(dom, chart)), chart
    # 2 cases of 7 methods, of which Liger is wrong on gemma3
    counts = {chart: symbols(drawn(dom, chart)) for chart in ("time", "error", "history")}
    assert counts == {"time": 13, "error": 26, "history": 21}
    assert "wrong" in drawn(dom, "time") and "gradient differs" in dom
    # of two devices the CPU was measured last
    title = f"lossfuse against {TORCH}, fp32, forward + backward"
    speed = (f"as fast as {TORCH}", "as fast as quack", "less peak memory")
    for text in (title, '<details id="filters" open', *speed):
        assert text in dom
    assert re.search('id="others"[^>]* hidden', dom) and re.search('id="astray"[^>]* hidden', dom)


@browser
def test_an_address_selects_rows_and_a_page_fits_a_phone(tmp_path):
    page = dashboard.build(framed(*many(FEW, runs=2)))
    address = "#op=head&mode=no_grad&hide=Liger&place=NVIDIA+H100+80GB+HBM3&dtype=nonsense"
    dom, console = opened(page, tmp_path, address, *phone)
    assert not console and 'data-drawn="1"' in dom
    (said,) = re.findall(r'<p id="astray"[^>]*role="status">([^<]*)</p>', dom)
    unknown = "The address names dtype nonsense, which is not in the rows to choose from"
    assert said == f"{unknown}; showing bf16."
    assert '<details id="filters">' in dom, "a phone has the filters closed"
    time = drawn(dom, "time")
    texts = texts_of(time)
    assert {"lossfuse linear", "linear + F.ce", "CCE"} <= texts
    assert not {"Liger", "lossfuse"} & texts
    chosen = ("head", "no_grad", "lossfuse linear")
    ours = [r for r in many(FEW, 2, 1) if (r["op"], r["mode"], r["method"]) == chosen]
    assert shown._time(ours[-1]["ms_p50"]) in texts
    widths = [float(width) for width in re.findall(r'<svg[^>]* width="([\d.]+)"', dom)]
    # chromium's narrowest window has 485 pixels
    assert len(widths) == 5 and max(widths) <= 485
    assert pages.THEMES["dark"]["ink"] in time and pages.THEMES["light"]["ink"] not in time


HOVERS = """<script>window.alert = text => document.documentElement.dataset.harmed = text;
  setInterval(() => document.querySelectorAll("#time path, #time text").forEach(mark => {
    const box = mark.getBoundingClientRect();
    const at = {bubbles: true, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
    for (const kind of ["pointerover", "pointermove", "mousemove"])
      mark.dispatchEvent(new PointerEvent(kind, at));
    const tip = document.getElementById("vg-tooltip-element");
    if (tip?.textContent.includes("onerror")) document.documentElement.dataset.tip = "seen";
  }), 500);</script>"""


@browser
def test_hostile_text_is_drawn_as_text(tmp_path):
    columns = ("case", "method", "note", "commit", "torch", "package")
    device = {"device": EVIL[0], "settings": EVIL[1]}
    strange = [row(**device, **dict.fromkeys(columns, text)) for text in EVIL]
    failed = [one | {"status": "failed", "mode": "forward"} for one in strange]
    page = dashboard.build(framed(*strange, *failed))
    written = page.replace(pages.bundle(), "")
    assert "<script>alert" not in written and "<img" not in written
    assert written.count("</script>") == 4
    # drop the policy that blocks scripts anyway, and hover over every mark
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    dom, console = opened(HOVERS.join(page.rsplit("</body>", 1)), tmp_path)
    assert "data-harmed" not in dom and not console
    assert 'data-tip="seen"' in dom, "no tooltip was shown"
    assert "<img" not in SCRIPTS.sub("", dom) and symbols(drawn(dom, "time")) == len(EVIL)


@browser
def test_charts_summary_and_headline_agree(tmp_path):
    new = {"date": DAYS[1], "commit": "new", "peak_extra_bytes": 1e9}
    base, old = new | {"method": TORCH, "peak_extra_bytes": 0.98e9}, {"date": DAYS[0]}
    gpt2 = [row(**new, ms_p50=2.0, case="gpt2"), row(**base, ms_p50=1.0, case="gpt2")]
    llama = [row(**new, ms_p50=2.0), row(**base, ms_p50=4.0)]
    others = [row(**old, ms_p50=9.0), row(**old, ms_p50=3.5, method="Liger")]
    dom, console = opened(dashboard.build(framed(*llama, *gpt2, *others)), tmp_path)
    assert not console
    texts, page = texts_of(drawn(dom, "time")), SCRIPTS.sub("", dom)
    # a dagger marks another run
    assert {"2.00 ms", "4.00 ms", "3.50 ms", "Liger \u2020"} <= texts and "9.00 ms" not in texts
    assert re.search(r'id="others"(?![^>]*hidden)', dom) and "another run" in page
    assert "2%</b>more peak memory" in page and not re.search(r"[-\u2212]\d+%", page)
    bars = re.findall(r'<i class="(?:lost)?" style="[^"]*width: ([\d.]+)%', page)
    faster, saved = [float(width) for width in bars[0::2]], bars[1::2]
    # twice as fast takes the whole scale, half as fast a quarter; both lose memory
    assert faster == [100, 25] and saved[0] == saved[1] and page.count('<i class="lost"') == 2
    assert page.count("no other in this run") == 2
    beaten = [row(ideal_ms=4.0), row(method=TORCH, ideal_ms=4.0, ms_p50=3.9)]
    dom, console = opened(dashboard.build(framed(*beaten)), tmp_path)
    assert not console and "</b>of the roofline" not in dom
    assert "The roofline is not a bound here" in drawn(dom, "share")
    longer = "torch's copy of the logits in bf16 alone took longer"
    assert f"No fraction of the roofline is shown for llama2: {longer}" in dom


@browser
def test_extreme_and_missing_numbers_are_drawn_or_explained(tmp_path):
    nothing = dict.fromkeys(("ms_p50", "ms_p20", "ms_p80", "ideal_ms", "grad_error"))
    huge = {"ms_p50": 1e12, "ms_p20": 1e11, "ms_p80": 1e13, "ideal_ms": 1e-9}
    small = {"ms_p50": 1e-9, "ms_p20": 1e-10, "ms_p80": 1e-8, "peak_extra_bytes": 0}
    failed = {"status": "out of memory", "ms_p50": None, "note": "8 GiB"}
    odd = [
        row(case="no memory", peak_extra_bytes=None),
        row(case="huge", peak_extra_bytes=1e18, n=1, v=1, **huge),
        row(case="small", loss_error=0, grad_error=0, **small),
        row(case="nothing", loss_error=math.inf, **nothing),
        row(case="no rows", n=0, v=0, repeats=None, date="yesterday", commit=""),
        row(case="head", op="head", d=4.0, method="lossfuse linear", **failed),
        row(op="constructor", dtype="fp8", mode="__proto__"),
    ]
    page = dashboard.build(framed(*odd))
    dom, console = opened(page, tmp_path, "#op=logits")
    assert not console and 'data-drawn="1"' in dom and "not measured" in drawn(dom, "memory")
    assert symbols(drawn(dom, "time")) == 4
    dom, console = opened(page, tmp_path, "#op=head")
    assert not console and "No numbers for this choice" in drawn(dom, "time")
    assert "lossfuse linear: out of memory" in dom and "8 GiB" in dom
    assert "There are no rows to show" in dashboard.build(framed())
    assert charts.pictures(framed()) == {} == charts.pictures(framed(odd[5]))


def test_a_page_and_pictures_are_written(tmp_path):
    source, out, pngs = tmp_path / "rows.csv", tmp_path / "new" / "page.html", tmp_path / "pngs"
    cases = {name: FEW[name] for name in ("llama2", "head-qwen")}
    rows.append(source, many(cases, runs=1, devices=1, methods=3))
    dashboard.main([source], out, pngs)
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    names = {f"lossfuse-{op}{dark}.png" for op in ("head", "logits") for dark in ("", "-dark")}
    assert {path.name for path in pngs.iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pngs.iterdir())


def test_a_page_of_60_cases_and_15_methods_stays_below_4_mb():
    cases = {f"{64 * i}x32000": (64 * i, None, 32000) for i in range(1, 61)}
    frame = framed(*many(cases, runs=1, devices=1, methods=15))
    found, _ = shown.prepare(frame)
    assert len(found) == 60 * 15 * 4 and len({one["method"] for one in found}) == 15
    assert len(dashboard.build(frame)) < 4e6
