"""Hosts for the network bench, as far as it goes without making any."""

from __future__ import annotations

import os
import shutil

import pytest

from trials import hosts
from trials.hosts import Hosts, HostsError, token_bucket


def test_a_slow_link_lets_a_whole_packet_through_and_a_fast_one_two_milliseconds() -> None:
    assert token_bucket(5) == ["tbf", "rate", "5000000bit", "burst", "16384b", "latency", "50ms"]
    assert token_bucket(1000)[4] == "250000b"
    with pytest.raises(ValueError, match="must be above 0"):
        token_bucket(0)


def test_two_at_once_have_no_name_in_common() -> None:
    one, other = Hosts(2), Hosts(2)
    names = [
        command[3] for one_of in (one, other) for command in (one_of.command(0, "true"), one_of.command(1, "true"))
    ]
    assert len(set(names)) == 4 and all(str(os.getpid()) in name for name in names)
    with pytest.raises(ValueError, match="must be between 2 and 200"):
        Hosts(1)


def test_without_root_or_tools_it_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/sbin/" + name)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostsError, match="need root"), Hosts(2):
        pass
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "tc" else "/sbin/" + name)
    assert hosts.why_not() == "network namespaces need tc: install iproute2"


def test_what_could_not_be_made_is_deleted_and_the_command_that_failed_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []

    def run(*command: str) -> None:
        done.append(" ".join(command))
        if "bridge0" in command:
            raise HostsError("this machine cannot have hosts of its own: bridge0")

    monkeypatch.setattr(hosts, "require_tools", lambda: None)
    monkeypatch.setattr(hosts, "_run", run)
    monkeypatch.setattr(Hosts, "_pids", lambda self: [])
    monkeypatch.setattr(Hosts, "_existing", lambda self: [*self._names, self._hub])
    assert hosts.why_not() == "this machine cannot have hosts of its own: bridge0"
    made = [line.split()[3] for line in done if line.startswith("ip netns add")]
    assert len(made) == 3 and sorted(made) == sorted(
        line.split()[3] for line in done if line.startswith("ip netns del")
    )
