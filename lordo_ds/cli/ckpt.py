"""`lordo ckpt`: look into a checkpoint, change what it was saved for, take the weights out of it."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from lordo_ds.checkpoint import ReshapedRun, SavedRun, open_run
from lordo_ds.checkpoint.export import EXPORT_DTYPES, export_hf, export_safetensors
from lordo_ds.checkpoint.files import with_a_name
from lordo_ds.checkpoint.portable import write_portable
from lordo_ds.cli.printing import printable
from lordo_ds.errors import CheckpointError

_SHOWN_SETTINGS = (
    "rank",
    "sync_interval",
    "qh_mode",
    "omega",
    "residual_weight",
    "projection",
    "basis_source",
    "error_feedback",
    "outer",
)


def add_to(commands: Any) -> None:
    """Add `ckpt` to the parser of `lordo`."""
    ckpt = commands.add_parser("ckpt", help="inspect, reshape and export checkpoints")
    actions = ckpt.add_subparsers(dest="action", required=True, metavar="ACTION")

    show = actions.add_parser("show", help="what a checkpoint holds; its files are checked")
    _source(show)
    show.add_argument("--parameters", action="store_true", help="list every parameter")
    show.add_argument("--json", action="store_true", help="as one JSON object")
    show.set_defaults(run=_show)

    reshape = actions.add_parser(
        "reshape",
        help="write a portable checkpoint, which loads into any number of shards, ZeRO stage, TP and PP size",
    )
    _source(reshape)
    reshape.add_argument("destination", metavar="DST", type=Path)
    reshape.add_argument("--replicas", type=int, metavar="N", help="default: as many as were saved")
    reshape.add_argument("--rank", type=int, metavar="R", help="subspace rank; default: as it was saved")
    reshape.set_defaults(run=_reshape)

    export = actions.add_parser("export", help="write plain weights")
    _source(export)
    export.add_argument("destination", metavar="DST", type=Path, help="a directory")
    export.add_argument("--format", choices=("safetensors", "hf"), default="safetensors")
    export.add_argument("--dtype", choices=tuple(EXPORT_DTYPES), default="fp32")
    export.add_argument(
        "--replica", default="average", metavar="M", help="a number, or 'average' (the default; the same at a sync)"
    )
    export.add_argument("--model", type=Path, metavar="YAML", help="the model file, for --format hf")
    export.set_defaults(run=_export)


def _source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="where a run saves, one of its tags, or portable")
    parser.add_argument("--tag", help="default: the one in `latest`")


# -- show --------------------------------------------------------------------------------------------


def _show(chosen: argparse.Namespace) -> None:
    run = open_run(chosen.source, chosen.tag)
    if chosen.json:
        print(json.dumps(facts(run, chosen.parameters), indent=1))
        return
    for line in lines(run, chosen.parameters):
        print(printable(line))


def facts(run: SavedRun, with_parameters: bool = False) -> dict[str, Any]:
    """What a checkpoint holds, as plain values."""
    low_rank = [one for one in run.parameters.values() if one.low_rank]
    dense = [one for one in run.parameters.values() if not one.low_rank]
    found: dict[str, Any] = {
        "path": str(run.path),
        "layout": run.mesh,
        "replicas": run.replicas,
        "synced": run.synced,
        "counters": [run.counters(m).model_dump() for m in range(run.replicas)],
        "low_rank_parameters": len(low_rank),
        "low_rank_elements": sum(one.numel for one in low_rank),
        "dense_parameters": len(dense),
        "dense_elements": sum(one.numel for one in dense),
        "ranks": dict(sorted(Counter(str(one.rank) for one in low_rank).items())),
        "bytes": sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file()),
        "settings": run.settings,
        "client_state": sorted(map(str, run.engine_state(0).client_state)),
    }
    if with_parameters:
        found["parameters"] = [one.__dict__ for one in run.parameters.values()]
    return found


def lines(run: SavedRun, with_parameters: bool = False) -> list[str]:
    """The same for people."""
    found = facts(run)
    first = found["counters"][0]
    since = first["attempted_steps"] - first["last_synced_step"]
    settings = ", ".join(f"{key} {_short(run.settings.get(key))}" for key in _SHOWN_SETTINGS)
    shown = [
        f"{run.path}: complete, {found['bytes'] / 2**20:.1f} MiB",
        f"layout        {run.mesh}",
        f"step          {first['attempted_steps']}, {first['syncs']} syncs, "
        + ("at a sync: all replicas hold the same weights" if run.synced else f"{since} steps after the last sync"),
        f"low-rank      {found['low_rank_parameters']} parameters, {found['low_rank_elements']:,} elements; rank "
        + ", ".join(f"{rank} ({count})" for rank, count in found["ranks"].items()),
        f"dense         {found['dense_parameters']} parameters, {found['dense_elements']:,} elements",
        f"settings      {settings}",
        f"client state  {', '.join(found['client_state']) or 'none'}",
    ]
    if with_parameters:
        width = max(len(name) for name in run.parameters)
        for name, one in run.parameters.items():
            kind = f"rank {one.rank}, basis on {one.side}" if one.low_rank else "dense"
            shown.append(f"  {name:{width}}  {'x'.join(map(str, one.shape)):>14}  {kind}")
    return shown


def _short(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


# -- reshape and export ------------------------------------------------------------------------------


def _reshape(chosen: argparse.Namespace) -> None:
    run = open_run(chosen.source, chosen.tag)
    destination = _checked_destination(chosen.destination, run)
    reshaped = ReshapedRun(run, run.replicas if chosen.replicas is None else chosen.replicas, chosen.rank)
    write_portable(reshaped, destination)
    for note in reshaped.notes:
        print(f"lordo: {printable(note)}")
    print(
        f"lordo: wrote {chosen.destination}, {reshaped.replicas} replicas: load it with "
        "lordo_ds.load_checkpoint(engine, path, reshape=True)"
    )


def _export(chosen: argparse.Namespace) -> None:
    run = open_run(chosen.source, chosen.tag)
    destination = _checked_destination(chosen.destination, run)
    replica = None if chosen.replica == "average" else _number(chosen.replica)
    if chosen.format == "safetensors":
        export_safetensors(run, destination, chosen.dtype, replica)
    else:
        model = None if chosen.model is None else _model_file(chosen.model)
        export_hf(run, destination, chosen.dtype, replica, model)
    if replica is None and run.replicas > 1 and not run.synced:
        print("lordo: saved between syncs: the weights are the mean of the replicas'")
    print(f"lordo: wrote {chosen.destination}")


def _checked_destination(given: Path, run: SavedRun) -> Path:
    """The directory to write: it takes its name, in its parent, when all is written."""
    destination = with_a_name(given)
    if destination.resolve() == Path.cwd():
        raise CheckpointError(f"{given} is the directory that you are in: give another destination")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination} exists and is not empty: give another destination")
    if run.path.resolve() == destination.resolve():
        raise CheckpointError(f"{destination} is the source: give another destination")
    return destination


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise CheckpointError(f"--replica {text!r}: must be a number or 'average'") from None


def _model_file(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise CheckpointError("--model needs PyYAML: pip install pyyaml") from None
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(keys, dict):
        raise CheckpointError(f"{path}: must hold 'key: value' lines")
    return keys
