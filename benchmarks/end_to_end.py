"""What the 1-bit cache costs where it cannot help: lone requests and text, beside stock vLLM.

``python -m benchmarks.end_to_end`` is the scenario ``no-harm`` of :mod:`benchmarks.serving` for
three KV cache dtypes, with its figures as a table; it takes the same options.
"""

from __future__ import annotations

import json
import sys

from benchmarks import serving
from benchmarks.records import print_table
from benchmarks.serving_summary import NO_HARM, Run

DTYPES = ("auto", "fp8", "calibquant1")


def main() -> None:
    """Command line."""
    path = serving.main(["--scenarios", "no-harm", "--dtypes", ",".join(DTYPES), *sys.argv[1:]])
    if path is None:
        return
    record = json.loads(path.read_text(encoding="utf-8"))
    run = Run(record["run"], record["device"], record["date"], cells=record["cells"])
    (model,) = {cell["model"] for cell in run.cells}
    dtypes = run.dtypes(model)
    rows = []
    for name, found in NO_HARM.items():
        values = [found.of(run, dtype, model) for dtype in dtypes]
        row = [name, *("-" if v is None else f"{v:.2f}" for v in values)]
        row += ["-" if None in (v, values[0]) else f"{v / values[0]:.3f}" for v in values[1:]]
        rows.append(row)
    print_table(["", *dtypes, *(f"{d} / {dtypes[0]}" for d in dtypes[1:])], rows)


if __name__ == "__main__":
    main()
