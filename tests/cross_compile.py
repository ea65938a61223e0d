"""Compile every kernel for GPUs that are not here, and print what it takes as JSON rows.

A process of its own, because the interpreter replaces kernels where they are defined: run without TRITON_INTERPRET.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lossfuse.kernels import softmax_rows
from lossfuse.kernels.launch import row_blocks

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}
# a vocabulary at which blocks have their full width
V = 128256

SOFTMAX = ("scale", "softcap", "smoothing", "lse_square_scale")
OPTION_SETS = {"plain": (), "every option": ("class_weight_ptr", "class_weight_sum_ptr", *SOFTMAX)}
POINTERS = {
    "target_ptr": "*i64",
    "class_weight_ptr": "*fp32",
    "class_weight_sum_ptr": "*fp32",
    "loss_ptr": "*fp32",
    "stats_ptr": "*fp32",
    "dloss_ptr": "*fp32",
}
SCALARS = dict.fromkeys(SOFTMAX, "fp32")
KERNELS = ("row_loss_kernel", "row_grads_kernel", "soft_row_loss_kernel", "soft_row_grads_kernel")


def signature(kernel: triton.JITFunction, logits: str, given: tuple[str, ...], block_v: int) -> ASTSource:
    types: dict[str, str] = {}
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    soft = "soft" in kernel.fn.__name__
    for i, name in enumerate(kernel.arg_names):
        absent = name in ("class_weight_ptr", "class_weight_sum_ptr", *SOFTMAX) and name not in given
        if name == "BLOCK_V" or absent:
            types[name], constants[i,] = "constexpr", None if absent else block_v
        elif name in SCALARS:
            types[name] = SCALARS[name]
        elif name in ("logits_ptr", "dlogits_ptr", "dtarget_ptr") or (name == "target_ptr" and soft):
            types[name] = logits
        else:
            types[name] = POINTERS.get(name, "i32")
        # what the launcher's specialisation finds for a contiguous tensor of an aligned vocabulary
        if types[name].startswith("*") or name in ("V", "stride_logits_n", "stride_target_n"):
            attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(kernel, types, constants, attributes)


def resources(compiled: object, target: GPUTarget) -> dict[str, int]:
    if target.backend == "hip":
        asm = compiled.asm["amdgcn"]
        spilled = [int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s+(\d+)", asm)]
        assert spilled
        return {"registers": max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", asm)), "spills": sum(spilled)}
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([tool, "-sass", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    wide = len(re.findall(r"\b(?:LDG|STG|LDGSTS)\S*\.128", sass))
    narrow = len(re.findall(r"\b(?:LDG|STG)\S*\.[US]?(?:8|16)\b", sass))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    fused = compiled.asm["ptx"].count("fma.rn.f32")
    return {"registers": registers, "spills": stack + local + spills, "wide": wide, "narrow": narrow, "fused": fused}


def main(targets: list[str]) -> None:
    launch = row_blocks(V)
    for target, kernel, (dtype, pointer), (options, given) in itertools.product(targets, KERNELS, DTYPES.items(), OPTION_SETS.items()):
        source = signature(getattr(softmax_rows, kernel), pointer, given, launch.block_v)
        compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": launch.num_warps, **softmax_rows.UNFUSED})
        row = {"kernel": kernel, "target": target, "dtype": dtype, "options": options, **resources(compiled, TARGETS[target])}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(TARGETS))
