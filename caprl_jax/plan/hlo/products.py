"""The operations of one compiled instruction's products, calls of libraries and kernels among them.

A call has no instructions inside. It is priced by the shapes of its operands and by what its
compiler or its author wrote beside it.
"""

import math
import re
from collections.abc import Sequence

from caprl_jax.plan.flops import Window, convolution_flops, window_pairs
from caprl_jax.plan.hlo.text import HBM, Array, Computation, Instruction

Dims = tuple[int, ...]

# Attention: products of queries with keys, of weights with values, and their gradients. Our kernels
# (models/flash, models/decode_attention.py) are calls within scopes of their names, and before it
# of the share of the pairs of queries and keys that see each other.
_ATTENTION = {"flash_forward": 2, "flash_query": 3, "flash_key": 4, "decode_attention": 2}
_KERNEL = re.compile(rf"\b(?:share_([\d.e-]+)/)?({'|'.join(_ATTENTION)})/pallas_call")
_SCORES = re.compile(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]')
_SAME = {"bitcast", "convert", "copy", "reshape", "transpose"}
_NO_PRODUCTS = ("AsyncCollective", "AllocateBuffer", "ConcatBitcast")


def flops(computation: Computation, instruction: Instruction) -> int:
    """Returns the operations of an instruction's products, 2 for each; 0 if it has none."""
    if instruction.opcode == "dot":
        left = computation.operand(instruction, 0).arrays[0].dims
        contracted = [left[axis] for axis in instruction.numbers("lhs_contracting_dims")]
        return 2 * instruction.arrays[0].size * math.prod(contracted)
    if instruction.opcode == "convolution":
        left, kernel = (computation.operand(instruction, k).arrays[0].dims for k in (0, 1))
        return _convolution_flops(instruction, left, kernel, instruction.arrays[0].dims)
    if instruction.opcode == "custom-call":
        return _call_flops(computation, instruction) or 0
    # XLA writes a product with a vector as multiply and reduce, and keeps the product's name. A
    # GPU's product that is cut along its sum ends with a reduce of that name too.
    if instruction.opcode == "reduce" and instruction.op_name.endswith("dot_general"):
        source = computation.operand(instruction, 0)
        return 2 * source.arrays[0].size if _multiplies(computation, source) else 0
    return 0


def _multiplies(computation: Computation, value: Instruction) -> bool:
    while value.opcode in _SAME:
        value = computation.operand(value, 0)
    return value.opcode == "multiply"


def unpriced(computation: Computation, instruction: Instruction) -> str:
    """Returns the target of a call whose operations aren't known here; empty for all others."""
    if instruction.opcode != "custom-call":
        return ""
    name = target(instruction)
    marks = name.startswith(_NO_PRODUCTS)  # of memory and of collectives
    return "" if marks or _call_flops(computation, instruction) is not None else name


def target(call: Instruction) -> str:
    """Returns the name of a custom call's target."""
    return re.search(r'custom_call_target="([^"]*)"', call.attributes)[1]


def call_bytes(operands: Sequence[Array], call: Instruction) -> int:
    """Returns the bytes of HBM that a custom call moves.

    Operands and results count once, unless the kernel's author gave another number. A library's
    workspace, which comes last of its results, is no traffic.
    """
    given = _estimate(call, "bytes_accessed")
    if given is not None:
        return given
    results = call.arrays
    if target(call).startswith(("__cublas", "__cudnn")) and len(results) > 1:
        results = results[:-1]
    return sum(a.bytes for a in (*operands, *results) if a.space == HBM)


def _call_flops(computation: Computation, call: Instruction) -> int | None:
    name = target(call)
    shapes = [a.dims for o in call.operands for a in computation.instructions[o].arrays]
    given = _estimate(call, "flops")
    kernel = _KERNEL.search(call.op_name)
    if given is not None:
        return given
    if kernel:  # queries, then keys come first of those with more than places' axes
        queries, keys = [dims for dims in shapes if len(dims) > 3][:2]
        share = float(kernel[1] or 1)
        # On TPUs, and in the decode loop's caches, heads come before keys.
        heads_first = name == "tpu_custom_call" or kernel[2] == "decode_attention"
        count = keys[2 if heads_first else 1]
        return round(share * 2 * _ATTENTION[kernel[2]] * math.prod(queries) * count)
    if name.startswith("__cublas"):
        contracted = [shapes[0][axis] for axis in _axes(call, "lhs_contracting_dimensions")]
        return 2 * call.arrays[0].size * math.prod(contracted) if contracted else None
    if name.startswith("__cudnn$fmha"):
        return _cudnn_attention_flops(call, shapes[0])
    return _cudnn_convolution_flops(call, name, shapes)


def _estimate(call: Instruction, key: str) -> int | None:
    """Returns a figure of the kernel's own cost estimate, which Pallas hands on for TPUs."""
    found = re.search(rf'"cost_estimate":\{{[^}}]*"{key}":"?(\d+)', call.attributes)
    return int(found[1]) if found else None


def _axes(call: Instruction, key: str) -> list[int]:
    found = re.search(rf'"{key}":\[([^\]]*)\]', call.attributes)
    return [int(axis) for axis in re.findall(r"\d+", found[1])] if found else []


def _cudnn_attention_flops(call: Instruction, queries: Dims) -> int | None:
    """Counts cuDNN's attention; if it is causal, half of the scores, which it skips by blocks."""
    scores = re.search(
        r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', call.attributes
    )
    if not scores:
        return None
    products = 5 if target(call).endswith("Backward") else 2
    sizes = [int(n) for n in re.findall(r"\d+", scores[1])]
    whole = 2 * products * math.prod(sizes) * queries[-1]
    return whole // 2 if re.search(r'"mask_type":\s*"CAUSAL"', call.attributes) else whole


def _cudnn_convolution_flops(call: Instruction, name: str, shapes: list[Dims]) -> int | None:
    """Counts a convolution or a gradient of one, whose attributes are the convolution's own."""
    out = call.arrays[0].dims
    if name.startswith("__cudnn$convForward") or name == "__cudnn$convBiasActivationForward":
        return _convolution_flops(call, shapes[0], shapes[1], out)
    if name == "__cudnn$convBackwardInput":
        return _convolution_flops(call, out, shapes[1], shapes[0])
    if name == "__cudnn$convBackwardFilter":
        return _convolution_flops(call, shapes[0], out, shapes[1])
    return None


def _convolution_flops(instruction: Instruction, left: Dims, kernel: Dims, out: Dims) -> int:
    attributes = instruction.attributes
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes).groups()
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1] if window else ""))

    def field(key: str, axis: int, default: str) -> int:
        values = fields[key].split("x") if key in fields else None
        return int((values[axis] if values else default).split("_")[0])

    pairs = [
        window_pairs(
            Window(
                size=left[labels[0].index(str(i))],
                kernel=kernel[labels[1].index(str(i))],
                out=out[labels[2].index(str(i))],
                stride=field("stride", i, "1"),
                pad=field("pad", i, "0"),
                dilate=field("lhs_dilate", i, "1"),
                kernel_dilate=field("rhs_dilate", i, "1"),
            )
        )
        for i in range(len(out) - 2)
    ]
    groups = int(instruction.attribute("batch_group_count") or 1)
    batch, features = left[labels[0].index("b")] // groups, out[labels[2].index("f")]
    return convolution_flops(batch, features, kernel[labels[1].index("i")], pairs)
