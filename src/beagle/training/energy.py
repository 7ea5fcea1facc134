"""Energy that the machine's processors take, from the counters that Linux shows of Intel's and AMD's (RAPL)."""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules of all processor packages and their memory, whatever else runs on the machine included."""

    def __init__(self, folder: Path = POWERCAP) -> None:
        zones = sorted(zone for zone in folder.glob("intel-rapl:*") if _is_counted(zone))
        self._last = {zone: joules for zone in zones if (joules := _read(zone / "energy_uj")) is not None}

    @property
    def readable(self) -> bool:
        """Whether there are counters that this user may read; most systems keep them to root."""
        return bool(self._last)

    def lap(self) -> float:
        """Joules since the last lap; a counter may start anew once between two laps, which takes some ten minutes."""
        total = 0.0
        for zone, before in self._last.items():
            now = _read(zone / "energy_uj")
            if now is None:
                continue
            total += now - before if now >= before else now - before + (_read(zone / "max_energy_range_uj") or 0.0)
            self._last[zone] = now
        return max(0.0, total)


def _is_counted(zone: Path) -> bool:
    """Packages and their memory; cores are parts of packages."""
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        return False
    return name.startswith("package") or name == "dram"


def _read(file: Path) -> float | None:
    """A counter of microjoules, in joules."""
    try:
        return int(file.read_text()) / 1e6
    except (OSError, ValueError):
        return None
