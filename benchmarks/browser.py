"""A binary network in the browser beside the same architecture in full precision: stock ONNX Runtime Web, one thread, batch 1.

    (cd examples/browser && npm install)
    python benchmarks/browser.py runs/NAME/model.onnx

The two take turns in one page of headless Chromium; ratios are medians over rounds, with their quartiles.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from siman_convert.benchmark.baselines import write_float
from siman_convert.onnx_file import read_onnx

PAGE = Path(__file__).parent.parent / "examples" / "browser"


def main() -> None:
    """Time the file that is named, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="model.onnx, exported without --with-preprocess")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        sys.exit("needs Chromium on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        full_precision = Path(folder) / "full-precision.onnx"
        write_float(read_onnx(arguments.file).description, full_precision)
        times = measure(chromium, arguments.rounds, [arguments.file, full_precision])
    print(table(times))


def measure(chromium: str, rounds: int, files: list[Path]) -> dict[str, list[list[float]]]:
    """Milliseconds of each round and file (rounds, files), and of opening each."""
    handler = partial(_Quiet, directory=str(PAGE))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        command = ["node", "drive.mjs", chromium, url, "time", str(rounds), *(str(file.resolve()) for file in files)]
        done = subprocess.run(command, cwd=PAGE, stdout=subprocess.PIPE, text=True, check=True)
        server.shutdown()
    times: dict[str, list[list[float]]] = json.loads(done.stdout)
    return times


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def table(times: dict[str, list[list[float]]]) -> str:
    """Medians, and the ratio with its quartiles."""
    binary, full_precision = (statistics.median(column) for column in zip(*times["milliseconds"], strict=True))
    ratios = [a / b for a, b in times["milliseconds"]]
    low, middle, high = statistics.quantiles(ratios, n=4)
    opened = times["openings"]
    return (
        f"binary          {binary:.1f} ms, opened in {opened[0]:.0f} ms\n"
        f"full precision  {full_precision:.1f} ms, opened in {opened[1]:.0f} ms\n"
        f"binary takes {middle:.2f} times as long (half of rounds: {low:.2f} to {high:.2f})"
    )


if __name__ == "__main__":
    main()
