"""`trainyard checkpoints`: what a run has saved, whether it is sound, and a way out of it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainyard.cli.checkpoints_output import age, make_progress, print_json, print_table, size, warn
from trainyard.cli.main import PROG

if TYPE_CHECKING:
    from trainyard.checkpoint.tools.places import Run
    from trainyard.checkpoint.tools.verifying import Verdict
    from trainyard_api.checkpoints import Record

_NAME = f"{PROG} checkpoints"
_EPILOG = f"""\
PLACE is where a run saves: s3://bucket/prefix/<run>, file:///folder/<run> or a path; one of its commits, as the run's
status names it (.../commits/00000017.json); for `ls` and `verify` also a folder or prefix that holds runs.

examples:
  {_NAME} ls s3://training/llm
  {_NAME} verify --full s3://training/llm/3f0c9a52
  {_NAME} show --step 1200 /mnt/checkpoints/my-run
  {_NAME} export --to ckpt --step 1200 s3://training/llm/3f0c9a52 model.ckpt
  {_NAME} export --to dcp /mnt/checkpoints/my-run folder
  {_NAME} prune --keep 3 --keep-best val_loss:min:2 --dry-run s3://training/llm/3f0c9a52

environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, ... as for every S3 program.

exit codes: 0 all is well; 1 something is damaged, or was not done; 2 wrong usage; 78 the place cannot be used as it
is: no bucket, no permission, no checkpoint there."""


def checkpoints(words: Sequence[str]) -> int:
    """The verb. Returns the exit code; argparse ends with 2."""
    from trainyard.checkpoint.errors import CheckpointError, exit_code
    from trainyard_api.checkpoints import Fenced

    arguments = _parser().parse_args(list(words))
    try:
        return int(arguments.call(arguments))
    except BrokenPipeError:
        raise
    except (CheckpointError, Fenced, OSError, ImportError) as error:
        warn(f"{_NAME}: error: {' '.join(str(error).split())}")
        return exit_code(error) if isinstance(error, CheckpointError) else 1
    except KeyboardInterrupt:
        warn(f"{_NAME}: stopped")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        _NAME, description="Look at the checkpoints of runs, in S3 and in directories.", epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    verbs = parser.add_subparsers(title="what to do", metavar="VERB", required=True)

    def verb(
        name: str, call: Callable[[argparse.Namespace], int], words: str, examples: str
    ) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name, help=words, description=f"{words[0].upper()}{words[1:]}.", epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        made.set_defaults(call=call)
        made.add_argument(
            "place", metavar="PLACE", help="s3://bucket/prefix/<run>, file:///folder/<run>, or a path"
        )
        made.add_argument(
            "--endpoint", metavar="URL", help="an S3 server other than AWS (or AWS_ENDPOINT_URL)"
        )
        made.add_argument("--region", help="its region")
        return made

    def output(made: argparse.ArgumentParser) -> None:
        made.add_argument("-o", "--output-format", choices=("table", "json"), default="table", dest="shape")

    def which(made: argparse.ArgumentParser) -> None:
        one = made.add_mutually_exclusive_group()
        one.add_argument("--step", type=int, help="the newest checkpoint of this step")
        one.add_argument("--seq", type=int, help="the checkpoint with this number in the log")

    ls = verb("ls", _ls, "list the checkpoints, newest first",
              f"  {_NAME} ls s3://training/llm\n  {_NAME} ls --all -o json /mnt/checkpoints/my-run")  # fmt: skip
    ls.add_argument("--all", action="store_true", help="fences and unreadable records, too")
    output(ls)

    verify = verb("verify", _verify, "check that checkpoints are whole",
                  f"  {_NAME} verify s3://training/llm/3f0c9a52\n  {_NAME} verify --full --step 1200 /mnt/my-run")  # fmt: skip
    verify.add_argument("--full", action="store_true", help="read and hash every byte")
    verify.add_argument("--workers", type=_positive, default=8, help="requests at a time (8)")
    which(verify)
    output(verify)

    show = verb("show", _show, "show what is in a checkpoint: record, tensors, values",
                f"  {_NAME} show /mnt/my-run\n  {_NAME} show --step 1200 -o json s3://training/llm/3f0c9a52")  # fmt: skip
    which(show)
    output(show)

    export = verb("export", _export, "write a checkpoint as a file for others",
                  f"  {_NAME} export s3://training/llm/3f0c9a52 last.ckpt\n"
                  f"  {_NAME} export --to safetensors --step 1200 /mnt/checkpoints/my-run model.safetensors")  # fmt: skip
    export.add_argument("output", type=Path, metavar="OUTPUT", help="the file to write; for dcp a new folder")
    export.add_argument(
        "--to", choices=("ckpt", "safetensors", "state-dict", "dcp"),
        help="ckpt: all, as Lightning has it; safetensors, state-dict: the weights; dcp: a folder that torch's "
        "HuggingFaceStorageReader loads. By default what OUTPUT's suffix says, else ckpt",
    )  # fmt: skip
    which(export)

    prune = verb("prune", _prune, "delete old checkpoints and what dead uploads have left behind",
                 f"  {_NAME} prune --keep 3 --dry-run s3://training/llm/3f0c9a52\n"
                 f"  {_NAME} prune --keep 2 --keep-best val_loss:min:1 --yes /mnt/checkpoints/my-run")  # fmt: skip
    prune.add_argument(
        "--keep", type=_positive, required=True, metavar="N", help="the newest N; at least 2 are kept"
    )
    prune.add_argument(
        "--keep-best", type=_best, metavar="METRIC:MODE:N", help="and the best N by a metric, min or max"
    )
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")
    prune.add_argument("--yes", action="store_true", help="do not ask")
    output(prune)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _best(text: str) -> Any:
    from trainyard.checkpoint.config import KeepBest

    try:
        return KeepBest.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from error


# ---- ls


def _ls(arguments: argparse.Namespace) -> int:
    from trainyard.checkpoint.tools.places import open_runs

    runs = open_runs(arguments.place, endpoint=arguments.endpoint, region=arguments.region)
    found = [_listed(run, everything=arguments.all) for run in runs]
    if arguments.shape == "json":
        print_json(
            [
                {"run": run.name, "uri": run.uri, "checkpoints": rows}
                for run, rows in zip(runs, found, strict=True)
            ]
        )
        return 0
    columns = ["step", "seq", "attempt", "age", "size", "world", "reason", "metrics", "state"]
    for run, rows in zip(runs, found, strict=True):
        shown = [
            [
                str(row.get("step", "-")), str(row["seq"]), str(row.get("attempt", "-")),
                age(time.time() - row["time"]) if "time" in row else "-", size(row["size"]) if "size" in row else "-",
                str(row.get("world", "-")), row.get("reason", "") or "-", _metrics(row.get("metrics", {})), row["state"],
            ]
            for row in rows
        ]  # fmt: skip
        print_table(
            run.uri, columns, shown, right=("step", "seq", "attempt", "age", "size", "world"),
            bad=lambda row: row[-1].startswith(("damaged", "unreadable")),
        )  # fmt: skip
    return 0


def _listed(run: Run, *, everything: bool) -> list[dict[str, Any]]:
    from trainyard.checkpoint.tools.inventory import missing

    sizes = {key: each.size for key, each in run.objects.items()}
    rows: list[dict[str, Any]] = []
    for record in run.records:
        row = {
            "kind": record.kind, "step": record.step, "seq": record.seq, "attempt": record.attempt, "time": record.time,
            "reason": record.reason, "parent": record.parent,
        }  # fmt: skip
        if record.kind == "fence":
            if everything:
                rows.append(row | {"state": "fence"})
            continue
        lacking = missing(record, sizes)
        row |= {
            "size": sum(s.size for s in record.shards), "world": record.world_size, "metrics": record.metrics,
            "state": "committed" if not lacking else f"damaged: {lacking[0]}"
            + (f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""),
        }  # fmt: skip
        rows.append(row)
    if everything:
        rows += [{"seq": seq, "state": f"unreadable: {why}"} for seq, why in run.log.unreadable.items()]
    elif run.log.unreadable:
        warn(f"{run.uri}: {len(run.log.unreadable)} unreadable records; --all shows them")
    return sorted(rows, key=lambda row: -int(row["seq"]))


def _metrics(metrics: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in sorted(metrics.items())) or "-"


# ---- verify


def _verify(arguments: argparse.Namespace) -> int:
    from trainyard.checkpoint.tools.places import open_runs

    runs = open_runs(arguments.place, endpoint=arguments.endpoint, region=arguments.region)
    reports = [_verified(run, arguments) for run in runs]
    if arguments.shape == "json":
        print_json(reports)
    return int(any(not report["sound"] for report in reports))


def _verified(run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    from trainyard.checkpoint.tools import verifying
    from trainyard.checkpoint.tools.inventory import orphans
    from trainyard_api.checkpoints import commits_newest_first

    named = arguments.step is not None or arguments.seq is not None or run.seq is not None
    records = [run.commit(arguments.step, arguments.seq)] if named else commits_newest_first(run.records)
    table = arguments.shape == "table"
    if table:
        print(run.uri)
    look = (
        verifying.full(run, records, progress=make_progress(), workers=arguments.workers)
        if arguments.full
        else verifying.quick(run, records, workers=arguments.workers)
    )
    verdicts = []
    for verdict in look:
        verdicts.append(verdict)
        if table:
            _print_verdict(verdict)
    report: dict[str, Any] = {
        "run": run.name, "uri": run.uri,
        "checkpoints": [
            {"seq": v.seq, "step": v.step, "sound": v.sound, "size": v.size, "checked": v.how, "problems": v.problems}
            for v in verdicts
        ],
        "unreadable": [] if named else [why for _, why in sorted(run.log.unreadable.items())],
        "orphans": [], "leftovers": [],
    }  # fmt: skip
    if not named:
        sizes = {key: each.size for key, each in run.objects.items()}
        report["orphans"] = [
            {"prefix": o.prefix, "objects": len(o.keys), "size": o.size, "under_way": o.under_way}
            for o in orphans(run.records, sizes)
        ]
        report["leftovers"] = [
            {"key": each.key, "upload": each.upload_id, "begun": each.begun}
            for each in run.store.leftovers("data/")
        ]
    report["sound"] = all(v.sound for v in verdicts) and not report["unreadable"]
    if table:
        _print_rest(report)
    return report


def _print_verdict(verdict: Verdict) -> None:
    head = f"step {verdict.step} (seq {verdict.seq}, {size(verdict.size)})"
    if verdict.sound:
        print(f"  {head}: sound ({verdict.how})", flush=True)
        return
    print(f"  {head}: DAMAGED", flush=True)
    for problem in verdict.problems:
        print(f"    {problem}")


def _print_rest(report: dict[str, Any]) -> None:
    for why in report["unreadable"]:
        print(f"  UNREADABLE record: {why}")
    for each in report["orphans"]:
        what = (
            "a save under way, or never committed"
            if each["under_way"]
            else "orphans of a save that was never committed"
        )
        print(f"  {each['prefix']}: {each['objects']} objects, {size(each['size'])}: {what}")
    for each in report["leftovers"]:
        print(
            f"  {each['key']}: an upload that was begun {age(time.time() - each['begun'])} ago and not finished"
        )
    damaged = sum(not c["sound"] for c in report["checkpoints"])
    print(
        f"{len(report['checkpoints']) - damaged} of {len(report['checkpoints'])} checkpoints sound",
        flush=True,
    )


# ---- show


def _show(arguments: argparse.Namespace) -> int:
    from trainyard.checkpoint.tools.describing import describe
    from trainyard.checkpoint.tools.places import open_run

    run = open_run(arguments.place, endpoint=arguments.endpoint, region=arguments.region)
    record = run.commit(arguments.step, arguments.seq)
    content = describe(run, record)
    if arguments.shape == "json":
        print_json({
            "uri": run.log.uri(record.seq), "record": record.to_json(), "values": content.values,
            "tensors": [
                {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "pieces": t.pieces, "size": t.size}
                for t in content.tensors
            ],
        })  # fmt: skip
        return 0
    print_table(run.log.uri(record.seq), ("field", "value"), _fields(record))
    print()
    print_table(
        "", ("tensor", "dtype", "shape", "pieces", "size"),
        [
            [t.name, t.dtype, "x".join(map(str, t.shape)) or "scalar", str(t.pieces), size(t.size)]
            for t in content.tensors
        ],
        right=("pieces", "size"),
    )  # fmt: skip
    print()
    print_table("", ("value", "is"), [[path, text] for path, text in content.values.items()])
    return 0


def _fields(record: Record) -> list[list[str]]:
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record.time))
    fields = {
        "step": record.step, "epoch": record.cursor.epoch, "samples of the epoch": record.cursor.samples,
        "attempt": record.attempt, "world size": record.world_size, "time": when, "reason": record.reason or "-",
        "metrics": _metrics(record.metrics), "resumed from seq": record.parent or "-",
        "stall": f"{record.stall_seconds:.3f} s", "size": size(sum(s.size for s in record.shards)),
        **{f"version of {name}": version for name, version in record.versions.items()},
    }  # fmt: skip
    return [[name, str(value)] for name, value in fields.items()]


# ---- export


def _export(arguments: argparse.Namespace) -> int:
    from trainyard.checkpoint.tools.exporting import export
    from trainyard.checkpoint.tools.places import open_run

    run = open_run(arguments.place, endpoint=arguments.endpoint, region=arguments.region)
    record = run.commit(arguments.step, arguments.seq)
    to = arguments.to or {".safetensors": "safetensors", ".pt": "state-dict", ".pth": "state-dict"}.get(
        arguments.output.suffix, "ckpt"
    )
    for note in export(run, record, to, arguments.output, progress=make_progress()):
        warn(note)
    print(f"{arguments.output}: step {record.step} of {run.uri} as {to}")
    return 0


# ---- prune


def _prune(arguments: argparse.Namespace) -> int:
    from trainyard.checkpoint.tools.places import open_run
    from trainyard.checkpoint.tools.pruning import plan, prune

    run = open_run(arguments.place, endpoint=arguments.endpoint, region=arguments.region)
    planned = plan(run, keep=arguments.keep, keep_best=arguments.keep_best)
    if arguments.shape == "json":
        print_json(planned.to_json() | {"deleted": not arguments.dry_run and bool(arguments.yes)})
    else:
        for line in planned.lines():
            print(line)
    if arguments.dry_run or planned.empty:
        return 0
    if not arguments.yes and not _agreed(f"delete {planned.what()} under {run.uri}?"):
        warn("nothing was deleted")
        return 1
    deleted = prune(run, keep=arguments.keep, keep_best=arguments.keep_best)
    if arguments.shape == "table":
        print(f"deleted {deleted} objects")
    return 0


def _agreed(question: str) -> bool:
    """Only a person at a terminal can say so."""
    if not (sys.stdin and sys.stdin.isatty()):
        warn(f"{_NAME} prune: error: this is no terminal to ask at; --yes says that you mean it")
        return False
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
