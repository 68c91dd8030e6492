"""The report on the NEON loop: what it cuts out of the assembly, and that it refuses a slow loop."""

import itertools
import shutil

import mca
import pytest

ASSEMBLY = """\
_ZN5siman11tile_insideEv:
\tmovi\tv3.4s, 0
.L2:
\tldr\tx1, [x0]
.L3:
\tldr\tq1, [x1], 16
{step}
\tcmp\tx1, x2
\tbne\t.L3
\tcmp\tx0, x3
\tbne\t.L2
\tret
_ZN5siman15count_registersEv:
.L9:
\tcnt\tv0.16b, v0.16b
\tcnt\tv1.16b, v1.16b
\tcnt\tv2.16b, v2.16b
\tsubs\tx0, x0, 1
\tb.ne\t.L9
"""


def step(total):
    """The three instructions, with the register that takes the counts."""
    return ["eor\tv0.16b, v1.16b, v2.16b", "cnt\tv0.16b, v0.16b", f"add\tv{total}.16b, v{total}.16b, v0.16b"]


def listing(*steps):
    return ASSEMBLY.format(step="\n".join(f"\t{instruction}" for instruction in steps))


def test_the_loop_is_the_innermost_one_of_tile_inside():
    loop = mca.inner_loop(listing(*step(3)))
    assert loop == ["ldr\tq1, [x1], 16", *step(3), "cmp\tx1, x2", "bne\t.L3"]
    assert mca.counts(loop) == 1


def test_without_such_a_loop_it_stops():
    with pytest.raises(SystemExit, match="no loop"):
        mca.inner_loop(listing("eor\tv0.16b, v1.16b, v2.16b"))


@pytest.mark.skipif(not shutil.which("llvm-mca"), reason="needs llvm-mca")
@pytest.mark.parametrize(("extra", "status"), [(0, 0), (1, 1)])
def test_a_loop_with_an_instruction_too_many_is_refused(extra, status, monkeypatch, capsys, tmp_path):
    steps = [*itertools.chain(*map(step, range(8, 24))), *["dup\tv2.2d, v1.d[0]"] * 16 * extra]
    monkeypatch.setattr(mca, "assembly", lambda _: listing(*steps))
    assert mca.main(str(tmp_path)) == status
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(mca.PROCESSORS)]
    assert [row[0] for row in rows] == list(mca.PROCESSORS)
    assert {row[3] for row in rows} == {"1.500"}
