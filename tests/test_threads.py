"""What threads do while they wait."""

from beagle.threads import SPINS, wait_briefly


def test_they_spin_a_little(monkeypatch):
    settings: dict[str, str] = {}
    monkeypatch.setattr("os.environ", settings)
    wait_briefly()
    assert settings == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(SPINS)}


def test_what_the_user_set_stays(monkeypatch):
    settings = {"OMP_WAIT_POLICY": "ACTIVE"}
    monkeypatch.setattr("os.environ", settings)
    wait_briefly()
    assert settings == {"OMP_WAIT_POLICY": "ACTIVE"}
