"""HTML pages of one file, light and dark: a template, its data and Vega's scripts, no network."""

import base64
import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

FONT = "system-ui, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
THEMES = {
    "light": {
        "ink": "#1c2430",
        "soft": "#5c6876",
        "line": "#e3e7ec",
        "strong": "#aeb7c2",
        "accent": "#c53943",
        "warn": "#9a5b00",
    },
    "dark": {
        "ink": "#e8ecf1",
        "soft": "#9ba7b5",
        "line": "#2b333e",
        "strong": "#596675",
        "accent": "#ff8095",
        "warn": "#f0b357",
    },
}


def page(template: str, data: object, **parts: str) -> str:
    """Fill a template with ``data`` as JSON and ``parts`` as HTML; only its own scripts may run."""
    text = (Path(__file__).parent / template).read_text(encoding="utf-8")
    scripts = [
        bundle(),
        *re.findall(r'<script(?: type="module")?>(?!@@)(.*?)</script>', text, re.DOTALL),
    ]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    # in a script element only < can end the text
    written = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"scripts": hashes, "bundle": bundle(), "data": written, **parts}
    return re.sub(r"@@(\w+)@@", lambda match: parts[match[1]], text)


@functools.cache
def bundle() -> str:
    """Vega, Vega-Lite and vegaEmbed as one script."""
    import vl_convert

    return (
        str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
        .replace("</script", "<\\/script")
        .replace("<!--", "\\x3c!--")
    )


def theme(name: str) -> dict[str, Any]:
    """The Vega configuration of a theme."""
    paper = THEMES[name]
    axis = {
        "labelColor": paper["soft"],
        "titleColor": paper["soft"],
        "gridColor": paper["line"],
        "labelFontSize": 12,
        "titleFontSize": 12,
    }
    return {
        "background": None,
        "padding": {"left": 0, "right": 0, "top": 5, "bottom": 5},
        "font": FONT,
        "view": {"stroke": None},
        "aria": False,
        "axis": axis | {"titleFontWeight": "normal"},
        "axisY": {"labelColor": paper["ink"]},
        "style": {
            "ideal": {"color": paper["strong"]},
            "spread": {"color": paper["ink"]},
            "value": {"color": paper["ink"], "fontSize": 12},
            "gap": {"color": paper["warn"], "fontSize": 12, "fontStyle": "italic"},
        },
        "title": {"color": paper["ink"], "subtitleColor": paper["soft"]},
    }
