"""Seconds of a verification pass by number of rows, and of a draft, on this machine.

python scripts/pass_costs.py --json results/pass_costs.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import beagle
from beagle.decoding.costs import SIZES, measure
from beagle.evaluation.meta import describe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    table = {}
    for dtype, quantize in (("bfloat16", None), ("float32", None), ("bfloat16", "int8"), ("bfloat16", "int4")):
        model = beagle.load("smollm2-135m", dtype=dtype, quantize=quantize)
        assert model.drafter is not None
        costs = measure(model.target, model.drafter, model.plan)
        verify = {str(n): round(costs.verify[n] * 1000, 1) for n in SIZES}
        table[quantize or dtype] = {"verify_ms": verify, "draft_ms": round(costs.draft * 1000, 1)}
    result = {**table, "meta": describe()}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
