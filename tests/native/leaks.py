"""Does opening sessions leak? `python tests/native/leaks.py [COUNT]`: resident memory after COUNT (1,000) and after a fifth.

Sessions with the native kernels on a node of each operator, run once; sessions that a malformed node keeps from being made; and
ONNX Runtime alone, for comparison. Each kind in a process of its own; exits with 1 where one of ours grows by more than BOUND.
"""

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from malformed_node import attribute, model_of, right_node, right_quantized_node

from siman_convert.errors import InputError
from siman_convert.runtime import native

ALONE = "ONNX Runtime alone"
BOUND = 2 << 20  # bytes; 1,000 leaked handles of 2 KiB each would be seen
KINDS = {
    "BinaryConv2d": (lambda: right_node(1, 1), None),
    "QuantizedConv2d": (right_quantized_node, None),
    "refused BinaryConv2d": (lambda: right_node(1, 1), ("strides", [0, 0])),
    "refused QuantizedConv2d": (right_quantized_node, ("pool_pads", [9, 9, 9, 9])),
}


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def grown(kind: str, count: int) -> int:
    """Bytes that memory grew by from a fifth of `count` sessions to all."""
    make, wrong = KINDS.get(kind, (None, None))
    if make is None:
        model, feeds = relu()
    else:
        node = make()
        if wrong:
            attribute(node, *wrong)
        model, feeds = model_of(node)
    before = 0
    for number in range(count):
        if number == count // 5:
            before = resident()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        try:
            session = native.open_session(model, use_kernels=kind != ALONE, options=options)
        except InputError:
            assert wrong, "the right node was refused"
            continue
        assert not wrong, "the malformed node was taken"
        session.run(None, feeds)
    return resident() - before


def relu() -> tuple[bytes, dict[str, np.ndarray]]:
    """A graph without anything of ours, and its input."""
    return onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        alone (float[2, 3] X) => (float[2, 3] Y) { Y = Relu(X) }
    """).SerializeToString(), {"X": np.ones((2, 3), np.float32)}


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    if len(sys.argv) > 2:
        print(grown(sys.argv[2], count))
        return 0
    worst = 0
    for kind in (*KINDS, ALONE):
        done = subprocess.run([sys.executable, __file__, str(count), kind], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        worst = max(worst, 0 if kind == ALONE else int(done.stdout))
        print(f"{kind}: {int(done.stdout) / 1024:+,.0f} KiB from session {count // 5} to {count}", flush=True)
    print(f"{'leaks' if worst > BOUND else 'no leak'}: bound {BOUND // 1024:,} KiB")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
