"""What threads do while they wait, and who computes."""

import threading

import pytest

from beagle.threads import SPINS, ModelThread, wait_briefly, waits_asleep


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


def test_an_owner_is_one_thread_for_all():
    owner = ModelThread("mine")
    first, second = (owner.submit(threading.current_thread) for _ in range(2))
    assert first.result(10) is second.result(10)
    assert first.result().name == "mine"
    assert first.result().daemon


def test_an_owner_survives_what_fails():
    owner = ModelThread("mine")
    with pytest.raises(ZeroDivisionError):
        owner.submit(lambda: 1 // 0).result(10)
    assert owner.submit(lambda: 7).result(10) == 7


def test_what_the_user_set_is_told_from_ours(monkeypatch):
    monkeypatch.setattr("os.environ", {})
    wait_briefly()
    assert not waits_asleep()
    monkeypatch.setattr("os.environ", {"OMP_WAIT_POLICY": "passive"})
    assert waits_asleep()
