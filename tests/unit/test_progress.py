"""Progress: one line that is written over on a terminal, whole lines now and then in a file."""

from __future__ import annotations

import io

import pytest

from lordo_ds.progress import Progress, in_bytes, in_time


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(stream: io.StringIO, steps: int, seconds: float, total: int = 100_000_000) -> str:
    clock = Clock()
    with Progress("tokenizing", total, stream=stream, clock=clock) as progress:
        for _ in range(steps):
            clock.now += seconds / steps
            progress.add(total // steps)
    return stream.getvalue()


def test_a_terminal_has_one_line_with_the_rate_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    shown = run(Terminal(), steps=4, seconds=40)
    assert shown.count("\n") == 1 and shown.endswith("\n")
    lines = shown.removesuffix("\n").split("\r")[1:]
    assert lines[0].startswith("tokenizing  25%") and "25.0 MB of 100.0 MB  2.5 MB/s  0:30 left" in lines[0]
    assert f"[{'#' * 6}{' ' * 18}]" in lines[0]
    assert lines[-1].startswith("tokenizing 100%") and "in 0:40" in lines[-1]


def test_a_line_is_not_longer_than_the_terminal_and_not_drawn_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "30")
    assert "[" not in Progress("tokenizing", 10, stream=Terminal()).line(0.0, columns=29)
    shown = run(Terminal(), steps=1000, seconds=1.0)
    lines = shown.removesuffix("\n").split("\r")[1:]
    assert 5 <= len(lines) <= 12
    assert all(len(line.removesuffix("\x1b[K")) < 30 for line in lines)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_file_has_whole_lines_ten_seconds_apart(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    shown = run(Terminal() if terminal else io.StringIO(), steps=60, seconds=60)
    assert not {"\r", "\x1b", "#"} & set(shown)
    lines = shown.splitlines()
    assert len(lines) == 7 and "25.0 MB" not in lines[0] and lines[0].startswith("tokenizing  17%")
    assert lines[-1].startswith("tokenizing 100%")


def test_a_file_has_no_line_of_what_took_no_time() -> None:
    assert run(io.StringIO(), steps=5, seconds=3) == ""


def test_an_error_ends_the_line_and_claims_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream, clock = Terminal(), Clock()
    with pytest.raises(KeyError), Progress("reading", 10, stream=stream, clock=clock) as progress:
        clock.now = 1.0
        progress.add(3)
        raise KeyError
    assert stream.getvalue().endswith("\n") and "100%" not in stream.getvalue() and "30%" in stream.getvalue()


def test_nothing_to_do_is_done() -> None:
    assert "100%" in Progress("reading", 0, stream=io.StringIO()).line(1e9)


def test_amounts_and_times_in_words() -> None:
    assert [in_bytes(one) for one in (0, 999, 1000, 12_345_678, 2.5e9, 7.1e13)] == [
        "0 B", "999 B", "1.0 kB", "12.3 MB", "2.5 GB", "71.0 TB",
    ]  # fmt: skip
    assert [in_time(one) for one in (0.4, 59.6, 245, 3723)] == ["0:00", "1:00", "4:05", "1:02:03"]
