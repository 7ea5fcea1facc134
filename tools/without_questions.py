"""Take the questions' texts out of result files, in place: what is stored in this repository names sets and ids alone.

python tools/without_questions.py results/eval_*.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from beagle.errors import run_script
from beagle.evaluation.records import read_records, read_result, write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    for path in parser.parse_args().files:
        result = read_result(path)
        records = read_records(path, result)
        for question in result["questions"]:
            question["turns"] = []
        write_result(path, {name: value for name, value in result.items() if name != "records"}, records)


if __name__ == "__main__":
    run_script(main)
