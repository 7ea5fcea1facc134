"""Check that text files end with one newline and that no line ends with spaces (a hook of pre-commit).

python tools/check_files.py FILE...       # exit code 1 if one does not; it is named
"""

from __future__ import annotations

import sys
from pathlib import Path


def fault(text: bytes) -> str:
    """What is wrong with a file's content; empty if nothing is."""
    if text and not text.endswith(b"\n"):
        return "no newline at its end"
    if text.endswith(b"\n\n"):
        return "empty lines at its end"
    for number, line in enumerate(text.splitlines(), 1):
        if line != line.rstrip(b" \t"):
            return f"spaces at the end of line {number}"
    return ""


def main() -> None:
    found = [(name, reason) for name in sys.argv[1:] if (reason := fault(Path(name).read_bytes()))]
    for name, reason in found:
        print(f"{name}: {reason}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
