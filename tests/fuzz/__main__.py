"""Coverage-guided fuzzing of one reader: `python tests/fuzz READER [SECONDS]`, with `pip install -e '.[fuzz]'`.

Starts from seeds/READER. Ends with the first finding, whose input is written to fuzz-READER-*, or after SECONDS (60) with the
number of executions. Each has to answer in 10 s with less than 2 GB of memory in all. SIMAN_FUZZ_SEED makes it repeat
itself: the same inputs in the same order, as far as the time allows.
"""

import os
import sys
from pathlib import Path

import atheris

OURS = (
    "bits",
    "data",
    "description",
    "metadata",
    "onnx_file",
    "onnx_int8_plan",
    "packed",
    "plans",
    "recipe",
    "runs",
    "subjects",
)
LIBRARIES = ("pickle", "tarfile", "yaml.composer", "yaml.constructor", "yaml.parser", "yaml.resolver", "yaml.scanner")

ROOT = Path(__file__).parents[2]
sys.meta_path[:] = [
    finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__
]  # atheris sees the
sys.path.insert(1, str(ROOT))  # code of files alone, not what the finder of an editable install loads

with atheris.instrument_imports(include=[*(f"siman_convert.{name}" for name in OURS), *LIBRARIES]):
    from readers import READERS, SCRATCH

SEEDS = Path(__file__).parent / "seeds"


def main() -> None:
    reader, seconds = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "60"
    if reader not in READERS:
        sys.exit(f"expected one of {', '.join(READERS)}")
    found = SCRATCH / "corpus"  # what reaches new code goes into the first folder named
    found.mkdir()
    limits = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=2048", "-max_len=16384"]
    limits.append(f"-seed={os.environ.get('SIMAN_FUZZ_SEED', '0')}")  # 0: a random one
    report = ["-print_final_stats=1", f"-artifact_prefix=fuzz-{reader}-"]
    atheris.Setup([sys.argv[0], *limits, *report, str(found), str(SEEDS / reader)], READERS[reader])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
