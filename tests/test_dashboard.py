"""The page of rows: its numbers, what a browser draws of it without a network, and strings that
would rather be scripts."""

import itertools
import math
import re

import pytest

for name in ("altair", "pandas", "vl_convert"):
    pytest.importorskip(name)

import pandas as pd  # noqa: E402

from browsers import apart, browser, contrast, opened  # noqa: E402
from fake_rows import many, row  # noqa: E402
from lossfuse.perf import charts, dashboard, methods, pages, rows, shown  # noqa: E402

EVIL = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "<!--<script>",
    "__proto__",
    "&lt;b&gt;'\"",
)
FEW = {
    "llama2": (8192, None, 32000),
    "gemma3": (4096, None, 262144),
    "head-qwen": (16384, 2048, 151936),
}
SCRIPTS = re.compile(r"<script[^>]*>.*?</script>", re.DOTALL)
TORCH = "F.cross_entropy"


def framed(*records):
    return rows._typed(pd.DataFrame(records, columns=list(rows.COLUMNS)), "no file")


def summarized(*records):
    return shown.summary(shown.prepare(framed(*records))[0])


def drawn(dom, name):
    """The element of a chart."""
    start = dom.index(f'<div id="{name}"')
    return dom[start : dom.index("</figure>", start)]


def marks(svg, kind):
    return sum(
        len(re.findall(r"<(?:path|line|text)\b", group))
        for group in re.findall(rf'<g class="mark-{kind} role-mark[^>]*>(.*?)</g>', svg, re.DOTALL)
    )


def test_ratios_are_of_ok_rows_of_one_run_device_dtype_and_mode():
    base = {
        "method": TORCH,
        "ms_p50": 3.0,
        "ms_p20": 2.9,
        "ms_p80": 3.1,
        "peak_extra_bytes": 3.0 * 2**30,
    }
    ours = {"ms_p50": 1.5, "ms_p20": 1.4, "ms_p80": 1.6, "peak_extra_bytes": 1.0 * 2**30}
    (one,) = summarized(row(**ours), row(**base))
    assert (
        one["faster"] == 2.0
        and one["saved"] == 2 * 2**30
        and one["saved_share"] == pytest.approx(2 / 3)
        and not one["within_spread"]
    )
    assert (one["faster_text"], one["saved_text"]) == ("2.00\u00d7", "67% less")
    assert (one["time_text"], one["memory_text"]) == (
        "3.00 ms \u2192 1.50 ms",
        "3.00 GiB \u2192 1.00 GiB",
    )
    assert one["share"] == pytest.approx(0.6)
    other = {
        "device": "other",
        "settings": "x=1",
        "dtype": "fp32",
        "mode": "forward",
        "date": "2026-11-01T00:00:00+00:00",
        "case": "gpt2",
    }
    for field, value in other.items():
        lone = next(
            s
            for s in summarized(row(**ours), row(**base | {field: value}))
            if s["case"] == "llama2"
        )
        assert (
            lone["faster"] is None
            and lone["saved"] is None
            and lone["why"] == f"{TORCH} was not in this run"
        ), field
    for field, value, why in (
        ("status", "wrong", f"{TORCH}: wrong"),
        ("ms_p50", math.nan, "no time"),
    ):
        assert summarized(row(**ours), row(**base | {field: value}))[0]["why"] == why
    assert (
        summarized(row(**ours | {"status": "failed"}), row(**base))[0]["why"] == "lossfuse: failed"
    )
    (red,) = summarized(row(**ours, tests="failed"), row(**base, tests="failed"))
    assert (
        red["faster"] is None
        and red["share"] is None
        and red["why"] == "tests of this commit failed"
    )
    (near,) = summarized(row(**ours | {"ms_p80": 2.95}), row(**base))
    assert near["within_spread"]
    (light,) = summarized(row(**ours | {"peak_extra_bytes": math.nan}), row(**base))
    assert (
        light["faster"] == 2.0 and light["saved"] is None and light["memory_why"] == "not measured"
    )
    assert summarized(row(**base)) == []


def test_the_head_is_compared_with_the_linear_layer():
    head = {"op": "head", "case": "head-qwen", "n": 16384, "d": 2048.0, "v": 151936}
    (one,) = summarized(
        row(**head, method="lossfuse linear"),
        row(**head, method="linear + F.cross_entropy", ms_p50=2.0),
    )
    assert (
        one["faster"] == 2.0
        and one["shape"] == "16,384 \u00d7 2,048 \u00d7 151,936"
        and one["reason"].startswith("Qwen 3")
    )


def test_only_the_last_run_is_shown_and_an_earlier_shape_is_left_out():
    dates = [f"2026-11-0{day}T00:00:00+00:00" for day in (1, 3, 2)]
    kept, left_out = shown.prepare(
        framed(*(row(date=date, commit=date[:10]) for date in dates), row(date="2026-10-01", n=8))
    )
    assert left_out == 1 and len(kept) == 3
    assert [one["date"] for one in kept if one["shown"]] == [dates[1]]


DAYS = [f"2026-11-0{day}T00:00:00+00:00" for day in range(1, 5)]


def test_one_run_of_a_case_is_shown_and_what_it_did_not_measure_is_marked():
    """Times of different runs drift apart: side by side and unmarked they make another ratio than
    the summary's."""
    measured = {
        "lossfuse": (0, 1, 3),
        TORCH: (0, 1, 2),
        "torch.compile": (0, 1),
        "lossfuse stats": (2, 3),
        "Liger": (0,),
    }
    kept, _ = shown.prepare(
        framed(
            *(
                row(method=name, date=DAYS[i], commit=f"c{i}")
                for name, days in measured.items()
                for i in days
            )
        )
    )
    seen = {one["method"]: (one["date"], one["other"]) for one in kept if one["shown"]}
    assert seen == {
        **dict.fromkeys(("lossfuse", TORCH, "torch.compile"), (DAYS[1], "")),
        "lossfuse stats": (DAYS[3], "another run"), "Liger": (DAYS[0], "another run"),
    }  # fmt: skip
    # without a run that has both: the newest with ours
    kept, _ = shown.prepare(
        framed(
            *(row(method=name, date=DAYS[i]) for i, name in enumerate(("lossfuse", TORCH, "Liger")))
        )
    )
    assert {one["method"] for one in kept if one["shown"] and not one["other"]} == {"lossfuse"}


@pytest.mark.parametrize("spread", [True, False])
def test_a_roofline_that_a_method_beats_is_no_bound(spread):
    """In bf16 on a CPU without it, torch's products take longer than a head that computes in
    fp32."""
    times = {} if spread else {"ms_p20": None, "ms_p80": None}
    slow, run = (
        {"method": TORCH, "ms_p50": 2.0, "ms_p80": 2.1, "date": DAYS[0], **times},
        {"date": DAYS[1], **times},
    )
    kept, _ = shown.prepare(
        framed(row(**slow), row(**run, ideal_ms=1.2), row(**run | {"method": TORCH}, ideal_ms=1.2))
    )
    assert [one["share_text"] for one in kept if one["date"] == DAYS[0]] == ["45%"], (
        "another run keeps its own"
    )
    beaten = [one for one in kept if one["date"] == DAYS[1]]
    assert [
        (one["share"], one["ideal"], one["share_text"], one["share_gap"]) for one in beaten
    ] == [(None, None, "", "not a bound")] * 2
    assert beaten[0]["ideal_text"] == "1.20 ms, not a bound"
    (one,) = shown.summary(kept)
    assert one["share"] is None and not one["bound"]
    (near,) = shown.prepare(framed(row(ideal_ms=1.02)))[0]
    assert near["share"] == 1.02, "within its spread"


def test_the_fastest_other_method_is_of_the_same_run_and_no_form_of_the_baseline():
    base, ours = (
        row(method=TORCH, ms_p50=3.0, ms_p20=2.9, ms_p80=3.1),
        row(ms_p50=1.5, ms_p20=1.4, ms_p80=1.6),
    )
    others = [
        row(method="torch.compile", ms_p50=1.2, ms_p20=1.1, ms_p80=1.45),
        row(method="Liger", ms_p50=1.9),
        row(method=f"{TORCH}(x.float())"),
        row(method="lossfuse in place"),
        row(method="quack", status="wrong"),
        row(method="CCE", ms_p50=0.5, date=DAYS[0]),
    ]
    (one,) = summarized(base, ours, *others)
    assert (
        one["peer"] == "torch.compile"
        and one["peer_faster"] == pytest.approx(0.8)
        and one["peer_within_spread"]
    )
    assert (one["peer_faster_text"], one["peer_text"]) == (
        "0.80\u00d7",
        "torch.compile, 1.20 ms, 500 MiB",
    )
    (alone,) = summarized(base, ours)
    assert (alone["peer"], alone["peer_faster"], alone["peer_text"]) == ("", None, "")


def test_memory_is_in_units_of_the_logits_and_what_failed_has_no_numbers():
    sizes = {"bf16": 8192 * 32000 * 2, "fp32": 8192 * 32000 * 4}
    for dtype, size in sizes.items():
        (one,) = shown.prepare(framed(row(dtype=dtype, peak_extra_bytes=1.5 * size)))[0]
        assert one["logits"] == 1.5 and one["logits_text"] == "1.50\u00d7"
    (bad,) = shown.prepare(framed(row(status="wrong", note="why")))[0]
    assert [
        bad[field] for field in ("ms", "ms_lo", "share", "logits", "loss_error", "grad_error")
    ] == [None] * 6
    assert not any(bad[field] for field in bad if field.endswith("_text") and field != "ideal_text")
    assert bad["problem"] == "wrong" and bad["note"] == "why"


def test_digits_and_units():
    texts = [
        shown.digits(value) for value in (0, 0.012345, 1.2345, 12.345, 999.9, 1234.5, 1e300, -2.5)
    ]
    assert texts == ["0", "0.0123", "1.23", "12.3", "1,000", "1,230", "1e+300", "-2.50"]
    assert [shown._time(ms) for ms in (None, 0.05, 3.14159, 20_000)] == [
        "",
        "50.0 \u00b5s",
        "3.14 ms",
        "20.0 s",
    ]
    assert [shown._bytes(count) for count in (0, 2048, 3 * 2**20, 2**40)] == [
        "0 B",
        "2.00 KiB",
        "3.00 MiB",
        "1,020 GiB",
    ]
    errors = [shown._error(value) for value in (None, 0, 1.0, 3.6, 0.0862, 4e-7, 2e10, 1e-10)]
    assert errors == ["", "0", "1", "4", "9e-2", "4e-7", "2e10", "1e-10"]
    assert [shown._times(value) for value in (0, 4e-5, 0.013, 1.5, 250)] == [
        "0.00\u00d7",
        "<0.01\u00d7",
        "0.01\u00d7",
        "1.50\u00d7",
        "250\u00d7",
    ]


def test_a_method_keeps_its_colour():
    assert (
        shown.color("Liger") == shown.COLORS["Liger"] and shown.color("never seen") in shown.OTHERS
    )
    assert shown.color("lossfuse next") not in shown.OTHERS


@pytest.mark.parametrize("op", methods.OURS)
def test_colours_of_one_chart_are_told_apart_on_both_pages(op):
    colors = {
        method.name: shown.color(method.name) for method in methods.METHODS if method.op == op
    }
    assert (
        min(contrast(color, paper) for color in colors.values() for paper in ("#ffffff", "#12161c"))
        >= 3
    )
    near = {
        (a, b): round(apart(colors[a], colors[b]), 3) for a, b in itertools.combinations(colors, 2)
    }
    assert {pair: distance for pair, distance in near.items() if distance < 0.05} == {}


def test_a_cpu_shows_fp32_first_and_a_gpu_bf16():
    firsts = {
        place: shown.dtypes(place)[0]
        for place in (
            "AMD EPYC, 2 threads",
            "Xeon, 64 threads (THP_MEM_ALLOC_ENABLE=1)",
            "NVIDIA H100",
        )
    }
    assert list(firsts.values()) == ["fp32", "fp32", "bf16"]


@browser
def test_a_browser_draws_everything_without_a_network(tmp_path):
    page = dashboard.build(framed(*many(FEW, runs=3)))
    # the only addresses are names of XML and Vega namespaces and the bundle's own texts: nothing is
    # loaded
    markup = SCRIPTS.sub("", page)
    assert "://" not in markup and not re.search(r"\b(src|href)\s*=|@import|url\(", markup)
    dom, console = opened(page, tmp_path)
    assert 'data-drawn="1"' in dom and not console and 'role="alert" hidden' in dom
    lines = {
        "lossfuse",
        "lossfuse reference",
        TORCH,
        f"{TORCH}(x.float())",
        "torch.compile",
        "Liger",
        "quack",
    }
    for chart in ("time", "share", "memory", "error"):
        assert lines <= set(re.findall(r"<text[^>]*>([^<]*)</text>", drawn(dom, chart))), chart
    # 2 cases of 7 methods, of which Liger is wrong on gemma3
    assert marks(drawn(dom, "time"), "symbol") == 13 and marks(drawn(dom, "error"), "symbol") == 26
    assert "wrong" in drawn(dom, "time") and "gradient differs" in dom
    assert f"as fast as {TORCH}" in dom and "as fast as quack" in dom and "less peak memory" in dom
    # of two devices the one measured last, which is a CPU
    assert (
        f"lossfuse against {TORCH}, fp32, forward + backward" in dom
        and '<details id="filters" open' in dom
    )
    assert re.search('id="others"[^>]* hidden', dom) and re.search('id="astray"[^>]* hidden', dom)
    assert marks(drawn(dom, "history"), "symbol") == 21


@browser
def test_an_address_chooses_what_is_drawn_and_a_phone_has_room(tmp_path):
    page = dashboard.build(framed(*many(FEW, runs=2)))
    address = "#op=head&mode=no_grad&hide=Liger&place=NVIDIA+H100+80GB+HBM3&dtype=nonsense"
    dom, console = opened(
        page, tmp_path, address, "--window-size=390,844", "--blink-settings=preferredColorScheme=0"
    )
    assert not console and 'data-drawn="1"' in dom
    (said,) = re.findall(r'<p id="astray"[^>]*role="status">([^<]*)</p>', dom)
    assert (
        said
        == "The address names dtype nonsense, which is not in the rows to choose from; showing bf16."
    )
    assert '<details id="filters">' in dom, "on a phone the filters are folded"
    time = drawn(dom, "time")
    texts = set(re.findall(r"<text[^>]*>([^<]*)</text>", time))
    assert {"lossfuse linear", "linear + F.ce", "CCE"} <= texts and not {
        "Liger",
        "lossfuse",
    } & texts
    ours = [
        r
        for r in many(FEW, runs=2, devices=1)
        if (r["op"], r["mode"], r["method"]) == ("head", "no_grad", "lossfuse linear")
    ]
    assert shown._time(ours[-1]["ms_p50"]) in texts
    widths = [float(width) for width in re.findall(r'<svg[^>]* width="([\d.]+)"', dom)]
    # chromium's narrowest window has 485 pixels
    assert len(widths) == 5 and max(widths) <= 485
    assert charts.THEMES["dark"]["ink"] in time and charts.THEMES["light"]["ink"] not in time


@browser
def test_foreign_strings_are_only_text(tmp_path):
    strange = [
        row(
            case=text,
            method=text,
            note=text,
            device=EVIL[0],
            settings=EVIL[1],
            commit=text,
            torch=text,
            package=text,
        )
        for text in EVIL
    ]
    page = dashboard.build(
        framed(*strange, *(one | {"status": "failed", "mode": "forward"} for one in strange))
    )
    written = page.replace(pages.bundle(), "")
    assert (
        "<script>alert" not in written and "<img" not in written and written.count("</script>") == 4
    )
    # without the policy that would stop a script anyway, and with a pointer over every mark for its
    # tooltip
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    spy = """<script>window.alert = what => document.documentElement.dataset.harmed = what;
      setInterval(() => document.querySelectorAll("#time path, #time text").forEach(mark => {
        const box = mark.getBoundingClientRect(), at = {bubbles: true, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
        for (const kind of ["pointerover", "pointermove", "mousemove"]) mark.dispatchEvent(new PointerEvent(kind, at));
        const tip = document.getElementById("vg-tooltip-element");
        if (tip?.textContent.includes("onerror")) document.documentElement.dataset.tip = "seen";
      }), 500);</script>"""
    dom, console = opened(spy.join(page.rsplit("</body>", 1)), tmp_path)
    assert "data-harmed" not in dom and not console
    assert 'data-tip="seen"' in dom, "no tooltip was shown"
    assert "<img" not in SCRIPTS.sub("", dom) and marks(drawn(dom, "time"), "symbol") == len(EVIL)


@browser
def test_charts_summary_and_headline_agree(tmp_path):
    """Of one run; what is of another is marked. Bars grow with speed on one scale, and more memory
    is not less by a negative number."""
    old, new = ({"date": day, "commit": day[:10], "peak_extra_bytes": 1e9} for day in DAYS[:2])
    records = [
        row(**new, ms_p50=2.0),
        row(**new | {"peak_extra_bytes": 0.98e9}, method=TORCH, ms_p50=4.0),
        row(**new, ms_p50=2.0, case="gpt2"),
        row(**new | {"peak_extra_bytes": 0.98e9}, method=TORCH, ms_p50=1.0, case="gpt2"),
        row(**old, ms_p50=9.0),
        row(**old, ms_p50=3.5, method="Liger"),
    ]
    dom, console = opened(dashboard.build(framed(*records)), tmp_path)
    assert not console
    time, page = drawn(dom, "time"), SCRIPTS.sub("", dom)
    texts = set(re.findall(r"<text[^>]*>([^<]*)</text>", time))
    assert {"2.00 ms", "4.00 ms", "3.50 ms", "Liger \u2020"} <= texts and "9.00 ms" not in texts
    assert re.search(r'id="others"(?![^>]*hidden)', dom) and "another run" in page
    assert "2%</b>more peak memory" in page and not re.search(r"[-\u2212]\d+%", page)
    bars = [
        float(width)
        for width in re.findall(r'<i class="(?:lost)?" style="[^"]*width: ([\d.]+)%', page)
    ]
    # of twice as fast the whole scale, of half as fast a quarter of it; memory is lost in both
    assert bars[0::2] == [100, 25] and bars[1] == bars[3] and page.count('<i class="lost"') == 2
    assert page.count("no other in this run") == 2
    dom, console = opened(
        dashboard.build(framed(row(ideal_ms=4.0), row(method=TORCH, ideal_ms=4.0, ms_p50=3.9))),
        tmp_path,
    )
    assert (
        not console
        and "</b>of the roofline" not in dom
        and "The roofline is not a bound here" in drawn(dom, "share")
    )
    assert (
        "No fraction of the roofline is shown for llama2: torch's copy of the logits in bf16 alone took longer"
        in dom
    )


@browser
def test_odd_rows_are_drawn_or_said(tmp_path):
    odd = [
        row(case="no memory", peak_extra_bytes=None),
        row(
            case="huge",
            ms_p50=1e12,
            ms_p20=1e11,
            ms_p80=1e13,
            ideal_ms=1e-9,
            peak_extra_bytes=1e18,
            n=1,
            v=1,
        ),
        row(
            case="small",
            ms_p50=1e-9,
            ms_p20=1e-10,
            ms_p80=1e-8,
            peak_extra_bytes=0,
            loss_error=0,
            grad_error=0,
        ),
        row(
            case="nothing",
            ms_p50=None,
            ms_p20=None,
            ms_p80=None,
            ideal_ms=None,
            loss_error=math.inf,
            grad_error=None,
        ),
        row(case="no rows", n=0, v=0, dtype="bf16", repeats=None, date="yesterday", commit=""),
        row(
            case="head",
            op="head",
            d=4.0,
            method="lossfuse linear",
            status="out of memory",
            ms_p50=None,
            note="8 GiB",
        ),
        row(op="constructor", dtype="fp8", mode="__proto__"),
    ]
    page = dashboard.build(framed(*odd))
    dom, console = opened(page, tmp_path, "#op=logits")
    assert not console and 'data-drawn="1"' in dom and "not measured" in drawn(dom, "memory")
    assert marks(drawn(dom, "time"), "symbol") == 4
    dom, console = opened(page, tmp_path, "#op=head")
    assert (
        not console
        and "No numbers for this choice" in drawn(dom, "time")
        and "lossfuse linear: out of memory" in dom
        and "8 GiB" in dom
    )
    assert "There are no rows to show" in dashboard.build(framed())
    assert charts.pictures(framed()) == {} == charts.pictures(framed(odd[5]))


def test_page_and_pictures_are_written_or_a_sentence_says_why_not(tmp_path):
    source = tmp_path / "rows.csv"
    rows.append(
        source,
        many({name: FEW[name] for name in ("llama2", "head-qwen")}, runs=1, devices=1, methods=3),
    )
    out, pngs = tmp_path / "new" / "page.html", tmp_path / "pngs"
    dashboard.main([source], out, pngs)
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    names = [
        "lossfuse-head-dark.png",
        "lossfuse-head.png",
        "lossfuse-logits-dark.png",
        "lossfuse-logits.png",
    ]
    assert sorted(path.name for path in pngs.iterdir()) == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pngs.iterdir())
    with pytest.raises(ValueError, match=r"rows\.csv.*cannot be written"):
        dashboard.main([source], source / "page.html", None)


def test_many_cases_and_methods_are_built():
    cases = {f"{64 * i}x32000": (64 * i, None, 32000) for i in range(1, 61)}
    frame = framed(*many(cases, runs=1, devices=1, methods=15))
    kept, _ = shown.prepare(frame)
    assert len(kept) == 60 * 15 * 4 and len({one["method"] for one in kept}) == 15
    assert len(dashboard.build(frame)) < 4e6
