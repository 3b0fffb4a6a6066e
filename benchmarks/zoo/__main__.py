"""Compare ensembles of public models with the loop over them, and count how they ran.

``make zoo``, or from the root of the repository ``python -m benchmarks.zoo``. All classification,
segmentation and video models of torchvision up to a size, the smallest model of each module of
timm, a small one of many families of Hugging Face transformers. Each finding is a line in the
results file as soon as it is there: a run that was interrupted continues where it stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.zoo import catalogue, report
from benchmarks.zoo.worker import Worker

LIBRARIES = ("torchvision", "timm", "transformers")


def main() -> int:
    """Check the models that were asked for; 1 if one differs from the loop."""
    options = _parser().parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    if options.again:
        options.results.unlink(missing_ok=True)
    findings = _read(options.results)
    names = [name for name in _names(options) if options.only in name]
    if options.list:
        print("\n".join(names))
        return 0
    worker = Worker(options.seconds, options.gigabytes, options.threads)
    try:
        for count, name in enumerate(names, start=1):
            if name in findings:
                continue
            findings[name] = worker.check(name)
            with options.results.open("a", encoding="utf-8") as file:
                print(json.dumps(findings[name]), file=file)
            print(f"{count}/{len(names)} {report.line(findings[name])}", flush=True)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
    finally:
        worker.stop()
    done = [findings[name] for name in names if name in findings]
    _finish(options, done, is_complete=len(done) == len(names) and not options.only)
    return 0 if all(finding["equal"] for finding in done) else 1


def _finish(options: argparse.Namespace, done: list[dict[str, Any]], *, is_complete: bool) -> None:
    present = [name for name in LIBRARIES if _is_installed(name)]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *present))
    if options.json:
        summary = {"versions": versions, "findings": done}
        options.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if options.page and is_complete:
        options.page.write_text(report.page(done, versions), encoding="utf-8")
    for finding in done:
        if not finding["equal"]:
            print(f"\n{finding['name']}\n{finding['failure']}")
    print(f"\n{versions}\n\n{report.counts(done)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    build = Path("build/zoo")
    parser.add_argument("--only", default="", help="part of the names, e.g. timm/ or resnet")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--again", action="store_true", help="forget what was found before")
    parser.add_argument("--results", type=Path, default=build / "findings.jsonl")
    parser.add_argument("--json", type=Path, help="write all findings of this selection")
    parser.add_argument("--page", type=Path, help="write the page of the docs, if all is done")
    parser.add_argument("--largest", type=int, default=70_000_000, help="parameters; torchvision")
    parser.add_argument("--seconds", type=float, default=600, help="limit for one model")
    parser.add_argument("--gigabytes", type=float, default=21, help="limit for one model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def _names(options: argparse.Namespace) -> list[str]:
    """The models of the libraries that are installed, and that ``--only`` does not rule out."""
    names: list[str] = []
    for library in LIBRARIES:
        first, slash, _ = options.only.partition("/")
        if not _is_installed(library) or (slash and first in LIBRARIES and first != library):
            continue
        if library == "torchvision":
            names += catalogue.torchvision_names(options.largest)
        elif library == "timm":
            names += _smallest_of_timm(options.results.parent)
        else:
            names += catalogue.transformers_names()
    return names


def _smallest_of_timm(folder: Path) -> list[str]:
    """Found once for each version of timm."""
    file = folder / f"timm-{version('timm')}.txt"
    if not file.exists():
        print("looking for the smallest model of each module of timm, which takes minutes")
        file.write_text("\n".join(catalogue.timm_names()), encoding="utf-8")
    return file.read_text(encoding="utf-8").split()


def _is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> finding, from the run before; what took too long then may be luckier now."""
    if not file.exists():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines()
    found = {finding["name"]: finding for finding in map(json.loads, lines)}
    return {name: finding for name, finding in found.items() if finding["how"] != "not finished"}


if __name__ == "__main__":
    sys.exit(main())
