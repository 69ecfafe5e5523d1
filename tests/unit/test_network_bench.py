"""The network bench without a network: its table of settings, what becomes of the ranks' notes, and its files."""

from __future__ import annotations

import json
import math
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import bench_network
import pytest

from trials.hosts import Hosts
from trials.network_job import Outcome, _lead, reason
from trials.network_model import cases, fit_wire_bytes, model_section
from trials.network_points import Point, Rows, points_of, read_points, refused_points, write_points
from trials.network_report import MARK, by_speed, write_report
from trials.network_settings import Setting, choose, merged, read_settings
from trials.pacer import Pacer, Plan, Segment

ROOT = Path(__file__).resolve().parents[2]
FACTS = {"date": "2026-01-01", "commit": "abc", "machine": "a machine", "versions": "v", "command": "python x"}


def table(folder: Path, text: str) -> Path:
    (folder / "table.yaml").write_text(text)
    return folder / "table.yaml"


# -- settings ----------------------------------------------------------------------------------------


def test_changes_are_merged_key_by_key_and_leave_the_base_alone() -> None:
    base = {"a": {"b": 1, "c": 2}, "d": [1]}
    assert merged(base, {"a": {"b": 3}, "d": [2], "e": {}}) == {"a": {"b": 3, "c": 2}, "d": [2], "e": {}}
    assert base == {"a": {"b": 1, "c": 2}, "d": [1]}


def test_the_table_that_comes_is_sound_and_its_baselines_can_run() -> None:
    settings = {setting.name: setting for setting in read_settings(ROOT / "configs" / "network.yaml")}
    for name, period in (
        ("AdamW, ZeRO 1", 1),
        ("low-rank DDP", 1),
        ("DiLoCo", 32),
        ("LoRDO", 32),
        ("LoRDO, paper", 32),
    ):
        assert settings[name].period == period and not settings[name].refusal
    zero = settings["AdamW, ZeRO 1"].deepspeed
    assert zero is not None and zero["zero_optimization"] == {"stage": 1} and zero["optimizer"]["type"] == "AdamW"


def test_settings_that_this_version_does_not_have_are_refused_in_their_own_words(tmp_path: Path) -> None:
    text = "- name: x\n  ds: lordo\n  changes: {optimizer: {params: {rank: 0}}}\n"
    (setting,) = read_settings(table(tmp_path, text))
    assert "rank" in setting.refusal and "\n" not in setting.refusal
    points = refused_points("x", 2, [5.0, None], 1, f"refused: {setting.refusal}")
    assert [point.mbit_per_s for point in points] == [5.0, None] and not any(point.ok for point in points)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", "must be a list"),
        ("- {name: x}", "either `ds` or `torchft`"),
        ("- {name: x, ds: lordo, torchft: {}}", "either `ds` or `torchft`"),
        ("- {name: x, ds: lordo, change: {}}", "no change"),
        ("- {name: x, ds: nothing}", "there is no"),
        ("- {name: x, torchft: {rank: 3}}", "`torchft` has"),
        ("- {name: x, ds: lordo}\n- {name: x, ds: diloco}", "'x' is there twice"),
        ("- [", "not YAML"),
    ],
)
def test_a_mistake_in_the_table_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(table(tmp_path, text))


def test_settings_are_chosen_by_name_in_the_order_of_the_table() -> None:
    settings = [Setting("a", 1), Setting("b", 1), Setting("c", 1)]
    assert [one.name for one in choose(settings, ["c", "a"])] == ["a", "c"] and choose(settings, None) == settings
    with pytest.raises(ValueError, match="'d': not in the table, which has 'a', 'b', 'c'"):
        choose(settings, ["d"])


def test_a_segment_is_whole_periods_and_short_where_every_step_crosses_a_slow_link() -> None:
    lordo, ddp = Setting("lordo", 32, settle_steps=32), Setting("ddp", 1)
    assert lordo.segment(5.0, 1, 40) == Segment(5.0, 32 + 64, 32)
    assert (
        ddp.segment(5.0, 1, 40).steps == 4 and ddp.segment(100.0, 1, 40).steps == ddp.segment(None, 1, 40).steps == 40
    )
    plan = lordo.plan([None, 5.0], 2, 1)
    assert (plan.warm_up, plan.starts, plan.steps) == (32, [32, 128, 224], 224)


# -- the ranks' notes --------------------------------------------------------------------------------


def notes(plan: Plan, step_s: list[float], sent: list[int], start: float = 100.0) -> Rows:
    """Of a rank whose steps take `step_s` and send `sent` bytes in each segment, heartbeats 10 bytes/s beside them."""
    rows: Rows = []
    now, bytes_ = start, 5000.0

    def note(**more: Any) -> None:
        rows.append({"time": now, "tx_bytes": bytes_, "rx_bytes": 2 * bytes_, "queued_s": now / 8, **more})

    def step(number: int, seconds: float, size: int) -> None:
        nonlocal now, bytes_
        now, bytes_ = now + seconds, bytes_ + size + 10 * seconds
        note(step=number, tokens=number * 64, ledger_bytes=size / 2, blocked_s=seconds / 4)

    for number in range(1, plan.warm_up + 1):
        step(number, 9.0, 10**6)
    for number, segment in enumerate([*plan.segments, None]):
        quiet = {"quiet_time": now, "quiet_tx_bytes": bytes_, "quiet_rx_bytes": 2 * bytes_}
        # Only the first pause is quiet: in a later one something is under way.
        now, bytes_ = now + 2.0, bytes_ + (20 if number == 0 else 10**5)
        note(segment=number, **quiet)
        for one in range(segment.steps if segment else 0):
            late = segment is not None and one >= segment.settle_steps
            step(plan.starts[number] + one + 1, step_s[number], sent[number] if late else 10**7)
    return rows


def test_points_are_means_over_the_measured_steps_and_ranks_with_the_idle_traffic_taken_off() -> None:
    plan = Plan(2, (Segment(None, 4), Segment(5.0, 6, settle_steps=2)))
    rows = [notes(plan, [0.5, 2.0], [1000, 3000]), notes(plan, [0.5, 2.0], [2000, 5000], start=100.25)]
    free, slow = points_of("x", plan, rows, "", repetition=3, others_threads=0.5)
    assert (free.setting, free.hosts, free.mbit_per_s, free.repetition, free.status) == ("x", 2, None, 3, "ok")
    # The second rank ends a quarter of a second later than the first began.
    assert free.steps == 4 and free.step_s == pytest.approx((4 * 0.5 + 0.25) / 4)
    assert free.tokens_per_s == pytest.approx(4 * 64 / 2.25)
    assert free.tx_bytes == pytest.approx(1500 - 10 * 0.25 / 4) and free.rx_bytes == pytest.approx(3000 - 20 * 0.25 / 4)
    assert free.median_step_s == pytest.approx(0.5) and slow.median_step_s == pytest.approx(2.0)
    assert free.ledger_bytes == pytest.approx(750) and free.blocked_s == pytest.approx(0.125)
    assert free.queued_s == pytest.approx(0.5 / 8)
    assert free.ledger_share == pytest.approx(750 / free.tx_bytes) and free.idle_bytes_per_s == pytest.approx(10)
    assert slow.steps == 4 and slow.step_s == pytest.approx((4 * 2.0 + 0.25) / 4)
    assert slow.tx_bytes == pytest.approx(4000 - 10 * 0.25 / 4), "the steps in which it settled are not in it"


def test_a_job_that_ended_early_keeps_what_it_measured_and_says_why_for_the_rest() -> None:
    plan = Plan(2, (Segment(None, 4), Segment(5.0, 4)))
    full = notes(plan, [0.5, 2.0], [1000, 3000])
    cut = full[: 2 + 1 + 4 + 1 + 3]  # one step of the second segment is missing
    free, slow = points_of("x", plan, [full, cut], "failed: killed", 1, math.nan)
    assert free.ok and slow.status == "failed: killed" and slow.tokens_per_s is None and free.others_threads is None
    assert all(point.status == "refused: no" for point in points_of("x", plan, [[], []], "refused: no", 1, math.nan))


def test_where_a_run_counts_nothing_the_columns_stay_empty() -> None:
    plan = Plan(1, (Segment(None, 2),))
    counted = ("ledger_bytes", "blocked_s", "queued_s")
    rows = [{key: value for key, value in row.items() if key not in counted} for row in notes(plan, [1.0], [10])]
    (point,) = points_of("x", plan, [rows, rows], "", 1, math.nan)
    assert point.ok and point.ledger_bytes is None and point.ledger_share is None
    assert point.blocked_s is None and point.queued_s is None


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ({"host0": "", "host1": "x\npretrain_gpt.py: error on rank 1: no such key\n"}, "refused: no such key"),
        ({"host0": "Traceback\n[rank0]: a.b.SomeError: too bad\nbye\n"}, "failed: a.b.SomeError: too bad (see"),
        ({"host0": "Killed\n"}, "failed: see the logs in"),
    ],
)
def test_the_reason_of_an_early_end_comes_from_the_logs(tmp_path: Path, logs: dict[str, str], expected: str) -> None:
    for name, text in logs.items():
        (tmp_path / f"{name}.log").write_text(text)
    assert reason(tmp_path).startswith(expected)


@pytest.mark.parametrize(("program", "expected"), [("true", "failed: see the logs"), ("sleep 60", "failed: it took")])
def test_a_job_whose_ranks_never_pause_is_given_up(tmp_path: Path, program: str, expected: str) -> None:
    """Also where the launchers end with 0, as DeepSpeed's does when the one below it is killed."""
    plan, hosts = Plan(1, (Segment(None, 1),)), Hosts(2)  # which are not made
    processes = [subprocess.Popen(program.split()) for _ in range(hosts.count)]
    try:
        until = time.monotonic() + (60 if program == "true" else 0.1)
        assert _lead(hosts, plan, tmp_path, processes, Outcome(), until).startswith(expected)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_rank_pauses_before_each_segment_and_notes_its_counters(tmp_path: Path) -> None:
    Plan(1, (Segment(5.0, 1),)).write(tmp_path)
    count = iter(range(0, 1000, 10))
    pacer = Pacer(tmp_path, 3, lambda: dict.fromkeys(("tx_bytes", "rx_bytes"), next(count)))

    def rank() -> None:
        for step in range(2):
            pacer.pause_after(step)
            pacer.note_step(step + 1, tokens=step, ledger_bytes=7)
        pacer.pause_after(2)

    thread = threading.Thread(target=rank, daemon=True)
    thread.start()
    for number in (0, 1):
        while not (tmp_path / f"rank3.at{number}").exists():
            assert thread.is_alive()
        (tmp_path / f"quiet{number}").touch()
        (tmp_path / f"go{number}").touch()
    thread.join(10)
    rows = [json.loads(line) for line in (tmp_path / "rank3.jsonl").read_text().splitlines()]
    kinds = [("step", row["step"]) if "step" in row else ("segment", row["segment"]) for row in rows]
    assert kinds == [("step", 1), ("segment", 0), ("step", 2), ("segment", 1)]
    assert [row["tx_bytes"] for row in rows] == [0, 20, 30, 50] and rows[1]["quiet_tx_bytes"] == 10
    assert rows[0]["ledger_bytes"] == 7 and rows[1]["time"] >= rows[1]["quiet_time"]


# -- the command -------------------------------------------------------------------------------------


def test_rates_are_numbers_of_mbit_per_s_or_unlimited() -> None:
    assert [bench_network.parse_rate(text) for text in ("5", "0.5", "unlimited")] == [5.0, 0.5, None]
    for text in ("0", "-1", "nan", "inf", "10mbit"):
        with pytest.raises(ValueError, match=f"--rates {text}: must be a number of Mbit/s"):
            bench_network.parse_rate(text)


def test_a_job_waits_for_free_cores_as_long_as_it_was_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    loads, asked = iter([3.0, 1.0, 0.1, 3.0]), []

    def load(window_s: float) -> float:
        asked.append(window_s)
        return next(loads)

    monkeypatch.setattr(bench_network, "running_threads", load)
    bench_network.wait_for_quiet(0.0)
    assert not asked
    bench_network.wait_for_quiet(60.0)
    assert asked == [bench_network.QUIET_WINDOW_S] * 3 and next(loads) == 3.0
    monkeypatch.setattr(bench_network, "running_threads", lambda window_s: time.sleep(window_s) or 3.0)
    bench_network.wait_for_quiet(0.05)  # ends, busy as it is


# -- the files ---------------------------------------------------------------------------------------


def points() -> list[Point]:
    numbers = {
        "steps": 32,
        "step_s": 0.1,
        "median_step_s": 0.1,
        "tx_bytes": 1000.0,
        "rx_bytes": 1000.0,
        "others_threads": 0.25,
        "queued_s": 0.02,
    }
    return [
        Point("LoRDO", 2, None, 1, "ok", tokens_per_s=8000.0, ledger_bytes=900.0, ledger_share=0.9, **numbers),
        Point("LoRDO", 2, 5.0, 1, "ok", tokens_per_s=1000.0, ledger_bytes=900.0, ledger_share=0.9, **numbers),
        Point("LoRDO", 2, 5.0, 2, "ok", tokens_per_s=3000.0, blocked_s=0.5, **numbers),
        Point("int3", 2, 5.0, 1, "refused: pseudo_gradient_dtype = int3"),
    ]


def test_the_csv_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_points(tmp_path / "x.csv", points(), FACTS)
    assert read_points(tmp_path / "x.csv") == points()
    head, row = (tmp_path / "x.csv").read_text().splitlines()[:2]
    assert head.startswith("setting,hosts,mbit_per_s,") and head.endswith(",machine,versions,command")
    assert row.endswith("a machine,v,python x")


def test_the_page_has_medians_shares_of_full_speed_and_what_was_refused(tmp_path: Path) -> None:
    (tmp_path / "net.md").write_text(f"# Mine\n\nkept\n\n{MARK}\n\nold")
    settings = {name: Setting(name, 32) for name in ("LoRDO", "int3")}
    text = write_report(points(), settings, FACTS, tmp_path / "net").read_text()
    assert text.startswith("# Mine\n\nkept\n") and "old" not in text
    assert "| | 5 Mbit/s | no limit |" in text and "| LoRDO | 2,000 (25%) | 8,000 |" in text
    assert "| LoRDO | 0.500 |  |" in text and "| int3 | refused |  |" in text
    assert "- int3: refused: pseudo_gradient_dtype = int3" in text and "`python x`" in text
    assert (
        "| LoRDO | 1,000 | 1,000 | 900 | 0.900 |  |" in text
        and "had 0.2 to 0.2 threads" in text
        and "for 20% of their time" in text
    )
    assert (tmp_path / "net.png").stat().st_size > 1000
    assert by_speed({None, 100.0, 5.0}) == [5.0, 100.0, None]


# -- the model ---------------------------------------------------------------------------------------


def modelled(wire: float) -> tuple[list[Point], dict[str, Setting]]:
    """Points that follow the model exactly: 0.1 s a step, 0.8 s more in each 8th, 1e5 bytes a step."""
    numbers: dict[str, Any] = {"hosts": 2, "repetition": 1, "status": "ok", "ledger_bytes": 1e5, "tx_bytes": 2e5}
    on_the_link = {rate: 1e5 * wire * 8 / (rate * 1e6) for rate in (5.0, 10.0, 20.0)}
    points = [
        Point("x", mbit_per_s=rate, step_s=0.2 + on_the_link.get(rate, 0.0), median_step_s=0.1, **numbers)
        for rate in (*on_the_link, None)
    ]
    return points, {"x": Setting("x", 8)}


def test_the_model_is_fitted_at_every_other_rate_and_judged_at_those_between() -> None:
    found = cases(*modelled(1.3))
    assert [case.mbit_per_s for case in found] == [5.0, 10.0, 20.0]
    assert found[0].sync.work_s == pytest.approx(0.8) and found[0].sync.sent_bytes == pytest.approx(8e5)
    assert fit_wire_bytes([found[0], found[2]]) == pytest.approx(1.3)
    assert found[1].error(1.3) == pytest.approx(0.0, abs=1e-9) and found[1].error(1.0) < -0.05
    text = model_section(*modelled(1.3))
    assert "the wire factor, 1.300" in text and "| x | 2 | 10 Mbit/s | 0.304 | 0.304 |" in text
    assert "| 5 Mbit/s |" not in text and "0.0% in the median, 0.0% at\nmost" in text


def test_the_model_takes_off_what_training_covers() -> None:
    points, _ = modelled(1.3)
    (slow, *_) = cases(points, {"x": Setting("x", 8, parts=2, delay_steps=4)})
    # On its way 2 x 0.832 s in 8 steps, of which 2 x 4 x 0.1 s are covered.
    assert slow.predicted_s(1.3) == pytest.approx(0.1 + (0.8 + 2 * (0.832 - 0.4)) / 8)
    (*_, fast) = cases(points, {"x": Setting("x", 8, parts=1, delay_steps=8)})
    assert fast.predicted_s(2.0) == pytest.approx(0.2) and fit_wire_bytes([fast]) == 1514 / 1448


def test_the_model_says_nothing_without_a_held_out_rate_or_a_measurement_without_a_limit() -> None:
    points, settings = modelled(1.3)
    assert not model_section([point for point in points if point.mbit_per_s != 10.0][1:], settings)
    assert not cases(points[:3], settings)


def test_bytes_of_methods_that_count_none_are_those_of_the_interface() -> None:
    points, _ = modelled(1.3)
    (case, *_) = cases(points, {"x": Setting("x", 1)})
    assert case.compute_s == 0.2 and case.sync.work_s == 0.0
    assert case.sync.sent_bytes == pytest.approx(2e5 * 1448 / 1514)
