"""Open a page in a browser without a network; contrast and distance of colours."""

import shutil
import subprocess

import numpy as np
import pytest

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
phone = ("--window-size=390,844", "--blink-settings=preferredColorScheme=0")
# linear RGB seen without one kind of cone: Machado, Oliveira and Fernandes 2009, severity 1
PROTAN = np.array(
    [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ]
)
DEUTAN = np.array(
    [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
)
# Ottosson 2020
CONES = np.array(
    [
        [0.41222147, 0.53633254, 0.05144599],
        [0.2119035, 0.68069955, 0.10739696],
        [0.08830246, 0.28171884, 0.6299787],
    ]
)
OKLAB = np.array(
    [
        [0.21045426, 0.79361778, -0.00407205],
        [1.9779985, -2.42859221, 0.45059371],
        [0.02590404, 0.78277177, -0.80867577],
    ]
)


def opened(page, tmp_path, address="", *options):
    """The elements of a page after its scripts ran without a network, and its console messages."""
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    fixed = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
    ]
    budget = ["--virtual-time-budget=8000", "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [
        CHROMIUM,
        *fixed,
        *budget,
        *(options or ["--window-size=1400,1000"]),
        path.as_uri() + address,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def _linear(color):
    value = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """Contrast of WCAG, 1 to 21."""
    dark, light = sorted(_linear(color) @ [0.2126, 0.7152, 0.0722] for color in (one, other))
    return (light + 0.05) / (dark + 0.05)


def apart(one, other):
    """The smallest distance in OKLab over three kinds of colour vision."""
    seen = [
        [
            OKLAB @ np.cbrt(np.clip(CONES @ np.clip(eyes @ _linear(c), 0, 1), 0, 1))
            for c in (one, other)
        ]
        for eyes in (np.eye(3), PROTAN, DEUTAN)
    ]
    return min(np.linalg.norm(a - b) for a, b in seen)
