"""`siman predict`: the classes a network sees in images."""

from pathlib import Path
from typing import Annotated

import typer

from siman_convert.cli import complete
from siman_convert.cli.common import RUNS, BackendName, Json, Output, print_json, say_what_runs_slowly


def predict(
    what: Annotated[
        str, typer.Argument(metavar="FILE|RUN", help="An exported file, or a run.", autocompletion=complete.runs)
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to show of each.")] = 5,
    backend: BackendName = None,
    output: Output = RUNS,
    as_json: Json = False,
) -> None:
    """Classify images.

    Prints the most probable classes of each, with their probability.
    """
    from dataclasses import asdict

    from siman_convert.names import require_subject

    require_subject(what, output)
    from siman_convert.backends import default_onnx_backend, require_backend
    from siman_convert.prediction import predict

    found = predict(what, images, top=top, backend=require_backend(backend), runs=output)
    if what.endswith(".onnx"):
        say_what_runs_slowly(backend or default_onnx_backend(), backend)
    if as_json:
        records = [{"image": str(one.image), "top": [asdict(guess) for guess in one.guesses]} for one in found]
        print_json({"model": what, "predictions": records})
        return
    for one in found:
        print(one.image)
        for guess in one.guesses:
            print(f"  {100 * guess.probability:6.2f} %  {guess.name}")
