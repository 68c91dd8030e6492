"""What llvm-mca predicts for the inner loop of the NEON kernel: `python mca.py BUILD_FOLDER`.

The folder is a cross build with CMAKE_EXPORT_COMPILE_COMMANDS=ON: isa_neon.cpp is compiled to assembly as it was there.
For 128 one-bit multiplications a kernel needs an eor, a cnt and an add on 128 bits; the ports that take these are the bound.
What a loop costs beyond it are loads, spills, duplications and its own end. Fails where that is more than 15 %.

llvm-mca knows a processor by its scheduling model, and several processors share one: the column `model` names its units.
Debian's LLVM 14 describes all three below by the Cortex-A57's, LLVM 19 has one of Neoverse N1's own.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

PROCESSORS = ("cortex-a72", "cortex-a76", "neoverse-n1")
MOST = 1.15
STEP = "eor v0.16b, v1.16b, v2.16b\ncnt v0.16b, v0.16b\nadd v3.16b, v3.16b, v0.16b\n"
LABEL = re.compile(r"(\.?\w+):")
BRANCH = re.compile(r"\s+(?:b\.\w+|b\w\w|cbn?z|tbn?z)\s.*?(\.L\w+)$")


class Prediction(NamedTuple):
    cycles: float  # of one iteration
    port_cycles: float  # those of its busiest port
    model: str


def assembly(build_folder: Path) -> str:
    """isa_neon.cpp as the build compiles it."""
    commands = json.loads((build_folder / "compile_commands.json").read_text())
    entry = next(entry for entry in commands if entry["file"].endswith("isa_neon.cpp"))
    words = shlex.split(entry["command"])
    words[words.index("-c")] = "-S"
    words[words.index("-o") + 1] = "-"
    return subprocess.run(words, cwd=entry["directory"], capture_output=True, text=True, check=True).stdout


def inner_loop(text: str) -> list[str]:
    """The instructions of the loop of tile_inside, without a loop inside, that counts most: the full tile's."""
    body: list[str] = []
    best: list[str] = []
    start = function = ""
    for line in text.splitlines():
        if label := LABEL.match(line):
            start, body = label[1], []
            function = function if start.startswith(".L") else start
        elif line.startswith("\t") and not line.startswith("\t."):
            body.append(line.strip())
            branch = BRANCH.match(line)
            if branch and branch[1] == start and "tile_inside" in function and counts(body) > counts(best):
                best = body.copy()
    if not best:
        raise SystemExit("mca.py: no loop with a cnt in tile_inside")
    return best


def counts(instructions: list[str]) -> int:
    """How often 128 bits are counted."""
    return sum(line.startswith("cnt\t") and ".16b" in line for line in instructions)


def predict(instructions: str, processor: str) -> Prediction:
    iterations = 1000
    command = ["llvm-mca", "-mtriple=aarch64-linux-gnu", f"-mcpu={processor}", f"-iterations={iterations}"]
    said = subprocess.run(command, input=instructions, capture_output=True, text=True, check=True).stdout

    def find(pattern: str) -> str:
        found = re.search(pattern, said)
        assert found, f"llvm-mca says nothing like {pattern}"
        return found[1]

    cycles = int(find(r"Total Cycles: +(\d+)")) / iterations
    return Prediction(cycles, float(find(r"Block RThroughput: +([\d.]+)")), find(r"\[0\] +- (\w+?)Unit"))


def main(build_folder: str) -> int:
    loop = inner_loop(assembly(Path(build_folder)))
    vectors = counts(loop)
    stack = sum("[sp" in line for line in loop)
    version = subprocess.run(["llvm-mca", "--version"], capture_output=True, text=True, check=True).stdout
    print(f"inner loop: {len(loop)} instructions for {vectors} x 128 one-bit MAC, {stack} of them to or from the stack")
    print(f"llvm-mca of LLVM {re.findall(r'version ([0-9.]+)', version)[0]}, cycles for 128 one-bit MAC")
    print(f"{'processor':12} {'model':6} {'loop':>6} {'bound':>6} {'ratio':>6}")
    slow = 0
    for processor in PROCESSORS:
        cycles, _, model = predict("\n".join(loop), processor)
        bound = predict(STEP, processor).port_cycles
        ratio = cycles / vectors / bound
        slow += ratio > MOST
        print(f"{processor:12} {model:6} {cycles / vectors:6.3f} {bound:6.3f} {ratio:6.3f}")
    if slow:
        print(f"more than {MOST - 1:.0%} above the bound on {slow} of them", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python mca.py BUILD_FOLDER")
    raise SystemExit(main(sys.argv[1]))
