"""Predicts a step's time over a slow link from the same job without a limit, and compares it with what was measured.

Of each setting and number of hosts, the computation is what a step, and a sync, took without a limit, and the bytes are
those that the run counted (of methods that average gradients, which count nothing: the interface's). One number is
fitted to all of them, bytes on the wire for each byte sent, at every other rate; the rates between are held out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from lordo_ds.link_time import TCP_HEADERS, Link, Sync, step_seconds
from trials.network_points import Point, middle
from trials.network_settings import Setting


@dataclass(frozen=True)
class Case:
    """A setting at one rate: what is known of it beforehand, and the mean step that was measured."""

    setting: str
    hosts: int
    mbit_per_s: float
    compute_s: float
    sync: Sync
    interval: int
    delay_steps: int
    measured_s: float

    def predicted_s(self, wire_bytes: float) -> float:
        link = Link(self.mbit_per_s * 1e6 / 8, wire_bytes=wire_bytes)
        return step_seconds(self.compute_s, self.sync, self.interval, link, self.delay_steps)

    def error(self, wire_bytes: float) -> float:
        """Of the prediction, relative to the measured step; below 0 it promised a faster one."""
        return self.predicted_s(wire_bytes) / self.measured_s - 1.0


def cases(points: list[Point], settings: Mapping[str, Setting]) -> list[Case]:
    """What can be predicted: settings that were measured without a limit too."""
    found = []
    for name, hosts in dict.fromkeys((point.setting, point.hosts) for point in points if point.ok):
        setting = settings[name]
        own = [point for point in points if point.ok and (point.setting, point.hosts) == (name, hosts)]
        free = [point for point in own if point.mbit_per_s is None]
        for rate in sorted({point.mbit_per_s for point in own if point.mbit_per_s is not None}) if free else ():
            found.append(_case(setting, [point for point in own if point.mbit_per_s == rate], free))
    return found


def _case(setting: Setting, slow: list[Point], free: list[Point]) -> Case:
    step_s, compute_s = middle(free, "step_s"), middle(free, "median_step_s")
    measured_s, tx_bytes = middle(slow, "step_s"), middle(slow, "tx_bytes")
    ledger_bytes = middle(slow, "ledger_bytes") if setting.period > 1 else None
    assert step_s and compute_s and measured_s and tx_bytes is not None and slow[0].mbit_per_s
    if setting.period == 1:
        compute_s = step_s  # its averaging of gradients included
    sent = tx_bytes / TCP_HEADERS if ledger_bytes is None else ledger_bytes
    sync = Sync(max(0.0, step_s - compute_s) * setting.period, sent * setting.period, parts=setting.parts)
    rate, period, delay_steps = slow[0].mbit_per_s, setting.period, setting.delay_steps
    return Case(setting.name, slow[0].hosts, rate, compute_s, sync, period, delay_steps, measured_s)


def fit_wire_bytes(fitted: list[Case]) -> float:
    """Bytes on the wire for each byte sent, by least squares of the relative errors; at least 1.

    Where training covers all that is on its way nothing tells: then it is what headers add.
    """
    base = [case.predicted_s(1.0) for case in fitted]
    slope = [case.predicted_s(2.0) - one for case, one in zip(fitted, base, strict=True)]
    above = sum((c.measured_s - b) * s / c.measured_s**2 for c, b, s in zip(fitted, base, slope, strict=True))
    below = sum((s / c.measured_s) ** 2 for c, s in zip(fitted, slope, strict=True))
    return max(1.0, 1.0 + above / below) if below else TCP_HEADERS


def model_section(points: list[Point], settings: Mapping[str, Setting]) -> str:
    """The page's part on the model: every held-out point, predicted and measured; "" without two limited rates."""
    found = cases(points, settings)
    rates = sorted({case.mbit_per_s for case in found})
    if len(rates) < 2:
        return ""
    fitted_rates = rates[::2]
    fitted = [case for case in found if case.mbit_per_s in fitted_rates]
    held_out = [case for case in found if case.mbit_per_s not in fitted_rates]
    wire = fit_wire_bytes(fitted)
    errors = [abs(case.error(wire)) for case in held_out]
    with_headers = [abs(case.error(TCP_HEADERS)) for case in held_out]
    lines = [
        "## A model of time",
        "",
        "`lordo_ds.link_time`: seconds of a step = those without a limit + bytes sent x wire factor / rate. Known",
        "beforehand: the time without a limit, and the bytes. Fitted, to all settings together at",
        f"{', '.join(f'{rate:g}' for rate in fitted_rates)} Mbit/s: the wire factor, {wire:.3f} (headers alone are",
        f"{TCP_HEADERS:.3f}). **Held-out rates: the error is {median(errors):.1%} in the median, {max(errors):.1%} at",
        f"most; with headers alone {median(with_headers):.1%} in the median.**",
        "",
        "| | hosts | held-out rate | predicted step, s | measured | error |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for case in held_out:
        cells = [case.setting, f"{case.hosts}", f"{case.mbit_per_s:g} Mbit/s", f"{case.predicted_s(wire):.3f}"]
        lines.append(f"| {' | '.join([*cells, f'{case.measured_s:.3f}', f'{case.error(wire):+.1%}'])} |")
    return "\n".join(lines)
