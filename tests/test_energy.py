"""Energy of a training, from counters as Linux shows them."""

import json

import pytest

from beagle.training import trainer
from beagle.training.energy import EnergyMeter

RANGE = 262_143_328_850


@pytest.fixture
def zones(tmp_path):
    """Two packages, one with memory; cores, which are parts of them; a zone of another kind."""
    for name, what, start in (
        ("intel-rapl:0", "package-0", 5_000_000),
        ("intel-rapl:0:0", "core", 1_000_000),
        ("intel-rapl:0:1", "dram", 2_000_000),
        ("intel-rapl:1", "package-1", RANGE - 1_000_000),
        ("dtpm", "other", 7),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(what + "\n")
        (tmp_path / name / "energy_uj").write_text(f"{start}\n")
        (tmp_path / name / "max_energy_range_uj").write_text(f"{RANGE}\n")
    return tmp_path


def use(zones, name: str, microjoules: int) -> None:
    file = zones / name / "energy_uj"
    file.write_text(str((int(file.read_text()) + microjoules) % RANGE))


def test_a_lap_is_what_packages_and_memory_took(zones):
    meter = EnergyMeter(zones)
    assert meter.readable
    use(zones, "intel-rapl:0", 3_000_000)
    use(zones, "intel-rapl:0:0", 3_000_000)
    use(zones, "intel-rapl:0:1", 500_000)
    use(zones, "intel-rapl:1", 4_000_000)  # starts anew
    assert meter.lap() == pytest.approx(7.5)
    assert meter.lap() == 0


def test_without_counters_there_is_no_figure(zones, tmp_path):
    assert not EnergyMeter(tmp_path / "none").readable
    for file in zones.glob("*/energy_uj"):
        file.write_text("")
    assert not EnergyMeter(zones).readable


def test_a_run_s_result_says_what_its_steps_took(zones, monkeypatch, train, tmp_path):
    class Counting(EnergyMeter):
        def lap(self) -> float:
            use(zones, "intel-rapl:0", 1_500_000)
            return super().lap()

    monkeypatch.setattr(trainer, "EnergyMeter", lambda: Counting(zones))
    assert train(tmp_path / "run").code == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["train_joules"] == pytest.approx(1.5 * result["steps"], abs=0.5)
