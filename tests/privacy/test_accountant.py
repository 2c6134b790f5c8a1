"""What was spent: against Opacus, against a formula done by hand, over runs, and when something is killed or damaged."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from fedmix.errors import ConfigError, RunError
from fedmix.privacy import accountant
from fedmix.privacy.accountant import Entry, Ledger, Steps, account_of, epsilon_by_prv, epsilon_by_rdp, noise_for

DELTA = 1e-5
ROUND = Entry(at=0.0, run="first", round=1, stage="all", population="key", noise_multiplier=1.1, sample_rate=0.05, steps=20)


def rdp_by_hand(history: list[Steps], delta: float) -> float:
    """science.md 8.4: Mironov's bound of the sampled Gaussian at whole orders, converted as in 2004.00010."""

    def moment(order: int, one: Steps) -> float:
        logs = [
            math.log(math.comb(order, k))
            + (order - k) * math.log1p(-one.sample_rate)
            + k * math.log(one.sample_rate)
            + (k * k - k) / (2 * one.noise_multiplier**2)
            for k in range(order + 1)
        ]
        top = max(logs)
        return one.steps * (top + math.log(sum(math.exp(log - top) for log in logs))) / (order - 1)

    return min(
        sum(moment(order, one) for one in history)
        + math.log((order - 1) / order)
        - (math.log(delta) + math.log(order)) / (order - 1)
        for order in range(2, 64)
    )


def gaussian_epsilon(noise: float, delta: float) -> float:
    """The exact epsilon of one Gaussian without sampling (Balle and Wang, 1805.06530, theorem 8)."""

    def excess(epsilon: float) -> float:
        left, right = norm.cdf(0.5 / noise - epsilon * noise), norm.cdf(-0.5 / noise - epsilon * noise)
        return float(left - math.exp(epsilon) * right - delta)

    return float(brentq(excess, 1e-6, 50))


@pytest.mark.parametrize(
    "history", [[Steps(1.0, 0.02, 100)], [Steps(2.12, 0.05, 400)], [Steps(3.3, 0.1, 50), Steps(1.5, 0.2, 20)]]
)
def test_epsilon_is_opacus_and_the_formula_done_by_hand(history: list[Steps]) -> None:
    theirs, moments = PRVAccountant(), RDPAccountant()
    theirs.history, moments.history = [tuple(one) for one in sorted(history)], [tuple(one) for one in history]
    assert epsilon_by_prv(history, DELTA) == pytest.approx(theirs.get_epsilon(DELTA), rel=1e-9)
    assert epsilon_by_rdp(history, DELTA) == pytest.approx(moments.get_epsilon(DELTA), rel=0.01)
    # Opacus also looks at orders between whole ones, which can only help.
    by_hand = rdp_by_hand(history, DELTA)
    assert 0.97 * by_hand <= epsilon_by_rdp(history, DELTA) <= by_hand * (1 + 1e-9)
    assert epsilon_by_prv(history, DELTA) < epsilon_by_rdp(history, DELTA)


@pytest.mark.parametrize("noise", [0.8, 2.0])
def test_epsilon_of_one_whole_batch_is_the_exact_one_of_a_gaussian(noise: float) -> None:
    exact = gaussian_epsilon(noise, DELTA)
    assert exact <= epsilon_by_prv([Steps(noise, 1.0, 1)], DELTA) <= exact + 0.02


def test_science_md_s_table_is_reproduced() -> None:
    assert epsilon_by_rdp([Steps(3.30, 256 / 2000, 2000)], 2000**-1.1) == pytest.approx(8.0, rel=0.02)


def test_order_and_cuts_of_the_same_steps_change_nothing() -> None:
    whole = account_of([Steps(1.0, 0.1, 30), Steps(2.0, 0.2, 10)], DELTA)
    cut = account_of([Steps(2.0, 0.2, 10), Steps(1.0, 0.1, 10), Steps(1.0, 0.1, 20)], DELTA)
    assert cut == whole
    assert whole.steps == 40
    assert account_of([], DELTA).epsilon == 0.0


def test_accountants_that_contradict_each_other_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accountant, "epsilon_by_rdp", lambda history, delta: 0.1)
    with pytest.raises(RunError, match="disagree"):
        account_of([Steps(1.0, 0.1, 30)], DELTA)


@pytest.mark.parametrize("target", [0.5, 8.0])
def test_noise_is_the_least_that_fits_the_plan(target: float) -> None:
    planned = [(0.04, 6), (0.1, 2)]
    noise = noise_for(planned, epsilon=target, delta=DELTA)
    assert epsilon_by_prv([Steps(noise, *one) for one in planned], DELTA) <= target
    assert epsilon_by_prv([Steps(0.99 * noise, *one) for one in planned], DELTA) > target


def test_a_plan_that_no_noise_covers_is_refused() -> None:
    with pytest.raises(ConfigError, match="no noise brings"):
        noise_for([(1.0, 10**9)], epsilon=1e-6, delta=1e-9)


def test_two_runs_of_a_site_compose(tmp_path: Path) -> None:
    path = tmp_path / "site" / "privacy.jsonl"
    first = Ledger(path).spend(ROUND, delta=DELTA, budget=None)
    second = Ledger(path).spend(replace(ROUND, run="second", population="another key"), delta=DELTA, budget=None)
    assert first == account_of([Steps(1.1, 0.05, 20)], DELTA)
    assert second == account_of([Steps(1.1, 0.05, 40)], DELTA) == Ledger(path).account(DELTA)
    assert first.epsilon < second.epsilon
    assert [json.loads(line)["run"] for line in path.read_text().splitlines()] == ["first", "second"]
    assert path.stat().st_mode & 0o077 == 0


def test_a_round_that_would_pass_the_budget_is_refused_and_not_written_down(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "privacy.jsonl")
    spent = ledger.spend(ROUND, delta=DELTA, budget=2.5).epsilon
    after = account_of([Steps(1.1, 0.05, 220)], DELTA).epsilon
    with pytest.raises(RunError, match=f"epsilon {spent:.3g} of 2.5 is spent .*the next round would make it {after:.3g}"):
        ledger.spend(replace(ROUND, steps=200), delta=DELTA, budget=2.5)
    assert ledger.entries() == [ROUND]
    ledger.spend(ROUND, delta=DELTA, budget=2.5)  # a smaller one still fits


def test_what_a_kill_tore_was_never_begun_and_does_not_harm_the_next_line(tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    ledger = Ledger(path)
    ledger.spend(ROUND, delta=DELTA, budget=None)
    whole = path.read_bytes()
    for cut in range(1, len(whole), 7):
        path.write_bytes(whole + whole[:cut].rstrip(b"\n"))
        assert ledger.entries() == [ROUND]
    ledger.spend(replace(ROUND, round=2), delta=DELTA, budget=None)
    assert [entry.round for entry in ledger.entries()] == [1, 2]


@pytest.mark.parametrize(
    "line", ["{}", "[]", "not json", json.dumps(asdict(ROUND) | {"steps": 0}), json.dumps(asdict(ROUND) | {"more": 1})]
)
def test_a_damaged_ledger_stops_everything(tmp_path: Path, line: str) -> None:
    path = tmp_path / "privacy.jsonl"
    path.write_text(f"{json.dumps(asdict(ROUND))}\n{line}\n{json.dumps(asdict(ROUND))}\n")
    with pytest.raises(RunError, match="line 2 of this site's privacy ledger is damaged"):
        Ledger(path).spend(ROUND, delta=DELTA, budget=None)
    assert len(path.read_text().splitlines()) == 3


def test_jobs_side_by_side_do_not_both_find_room_in_the_budget(tmp_path: Path) -> None:
    budget = account_of([Steps(1.1, 0.05, 60)], DELTA).epsilon  # room for three
    refused: list[RunError] = []

    def job() -> None:
        try:
            Ledger(tmp_path / "privacy.jsonl").spend(ROUND, delta=DELTA, budget=budget)
        except RunError as error:
            refused.append(error)

    threads = [threading.Thread(target=job) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3
    assert len(Ledger(tmp_path / "privacy.jsonl").entries()) == 3


KILLED = """
import os, signal, sys
from pathlib import Path
from fedmix.privacy import accountant
calls = {"write": 0}
point = sys.argv[2]
real_write, real_fsync = os.write, os.fsync
def die(): os.kill(os.getpid(), signal.SIGKILL)
def write(handle, data):
    if point == "before write": die()
    if point == "mid write":
        real_write(handle, data[: len(data) // 2]); die()
    return real_write(handle, data)
def fsync(handle):
    if point == "before fsync": die()
    real_fsync(handle)
os.write, os.fsync = write, fsync
entry = accountant.Entry(0.0, "run", 2, "all", "key", 1.1, 0.05, 20)
accountant.Ledger(Path(sys.argv[1])).spend(entry, delta=1e-5, budget=None)
print("the round may begin", flush=True)
die()
"""


@pytest.mark.slow
@pytest.mark.parametrize("point", ["before write", "mid write", "before fsync", "never"])
def test_no_round_begins_that_the_ledger_does_not_hold_wherever_a_kill_falls(tmp_path: Path, point: str) -> None:
    path = tmp_path / "privacy.jsonl"
    Ledger(path).spend(ROUND, delta=DELTA, budget=None)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), point], capture_output=True, text=True, check=False, timeout=120
    )
    assert killed.returncode == -9
    began = "the round may begin" in killed.stdout
    assert began == (point == "never")
    held = [entry.round for entry in Ledger(path).entries()]
    assert held in ([1], [1, 2])
    assert held == [1, 2] or not began
