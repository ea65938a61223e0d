"""Packaging: light and lazy imports, no top-level kernels, a wheel that works."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPUTE = """
import torch, lossfuse
print(float(lossfuse.cross_entropy(torch.randn(3, 5), torch.tensor([1, 2, 0]))))
"""


def python(code: str, cwd: Path = ROOT, **env: str) -> str:
    keep = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=keep | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_needs_torch_alone():
    heavy = ["triton", "numpy", "pandas", "altair", "rich", "tokenizers", "transformers"]
    code = f"""
import sys, torch
before = set(sys.modules)
import lossfuse
new = {{m.split(".")[0] for m in set(sys.modules) - before}}
print(sorted(new & set({heavy})))
"""
    assert python(code).strip() == "[]"


def test_an_adapter_is_imported_without_its_library():
    libraries = ["transformers", "trl", "accelerate", "peft", "torchtitan"]
    code = f"""
import sys
import lossfuse, lossfuse.integrations.trl
print(sorted({{m.split(".")[0] for m in sys.modules}} & set({libraries})))
"""
    assert python(code).strip() == "[]"


def test_a_head_is_fused_where_transformers_cannot_be_imported():
    code = """
import sys
sys.modules["transformers"] = None
import torch, lossfuse
model = torch.nn.Sequential()
model.lm_head = torch.nn.Linear(4, 7)
report = lossfuse.fuse_lm_head(model)
logits = model.lm_head(torch.randn(3, 4))
torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2, 0])).backward()
print(report)
"""
    assert (
        python(code).strip() == "LogitsReport(fused=Counter({'cross_entropy': 1}), made=Counter())"
    )


def test_the_torch_backend_works_where_triton_cannot_be_imported():
    code = "import sys; sys.modules['triton'] = None\n" + COMPUTE
    assert float(python(code)) > 0


def test_triton_is_first_imported_by_the_first_call_that_needs_it():
    code = """
import sys, torch, lossfuse
assert "lossfuse.backends.triton" not in sys.modules
print(float(lossfuse.cross_entropy(torch.randn(3, 5), torch.tensor([1, 2, 0]), impl="triton")))
assert "lossfuse.kernels.softmax_rows" in sys.modules
"""
    pytest.importorskip("triton")
    if not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("needs the interpreter")
    assert float(python(code, TRITON_INTERPRET="1")) > 0


def test_the_folders_are_no_packages_of_their_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "perf" / "__init__.py").exists()
    # the other package of this name may be there, once a test has used transformers
    ours = [
        name
        for name in ("kernels", "perf")
        if name in sys.modules and str(ROOT) in str(sys.modules[name].__spec__)
    ]
    assert ours == []


def test_the_other_kernels_package_wins_from_this_folder():
    """transformers imports names from it; a folder with __init__.py here would shadow it."""
    pytest.importorskip("transformers")
    other = python("import kernels; print(kernels.__file__)", cwd=ROOT.parent).strip()
    assert python("import kernels; print(kernels.__file__)").strip() == other
    assert "LlamaForCausalLM" in python(
        "from transformers import LlamaForCausalLM; import lossfuse; print(LlamaForCausalLM)"
    )


def test_the_wheel_built_from_the_sdist_computes_a_loss(tmp_path):
    pytest.importorskip("build")
    pytest.importorskip("hatchling")

    def build(*args: str) -> Path:
        command = [
            sys.executable,
            "-m",
            "build",
            "--no-isolation",
            "--outdir",
            str(tmp_path),
            *args,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return max(tmp_path.glob("lossfuse-*"), key=lambda p: p.stat().st_mtime_ns)

    sdist = build("--sdist", str(ROOT))
    unpacked = tmp_path / "unpacked"
    subprocess.run(
        ["tar", "xzf", str(sdist), "--one-top-level=" + str(unpacked), "--strip-components=1"],
        check=True,
    )
    wheel = build("--wheel", str(unpacked))
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"lossfuse"}
    for name in (
        "lossfuse/py.typed",
        "lossfuse/kernels/softmax_rows.py",
        "lossfuse/perf/__main__.py",
        "lossfuse/backends/torch_rows.py",
    ):
        assert name in names
    assert any(n.endswith("licenses/LICENSE") for n in names)

    # an environment with torch and nothing of ours: site-packages as a plain path, whose .pth files
    # (editable installs) do not run
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    torch_at = str(Path(__import__("torch").__file__).parent.parent)
    code = f"""
import sys
others = [p for p in sys.path if 'site-packages' not in p]
sys.path[:] = [{str(site)!r}, *others, {torch_at!r}]
{COMPUTE}
assert lossfuse.__file__.startswith({str(site)!r})
import lossfuse.kernels.launch, importlib.util
assert importlib.util.find_spec('lossfuse.perf.__main__')
"""
    assert float(python(code, cwd=tmp_path)) > 0
