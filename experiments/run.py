"""The one command: trains what is not trained yet, measures, writes results, plots and the numbers of README.md.
``python -m experiments.run --help``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "transformers", "matplotlib")  # looked for first: plots are drawn after half an hour


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.run",
        description="Train, merge, measure; interrupted at any time, the same command continues.",
        epilog="examples:  python -m experiments.run        everything\n"
        "           python -m experiments.run --configuration short --out /tmp/short    half a minute, one seed\n"
        "           python -m experiments.run --only-report      plots and README.md from the results there are",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--configuration", choices=("full", "short"), default="full", help="how large (default: full)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: 2)")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "experiments", help="where models are kept (default: build/)"
    )
    parser.add_argument("--out", type=Path, help="where results and plots go (default: experiments/results)")
    parser.add_argument("--only-report", action="store_true", help="train nothing: plots and text from the result file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)}; pip install -c constraints.txt -r requirements-test.txt")
    from experiments import plots, report, results, schedule
    from experiments.settings import CONFIGURATIONS

    out = options.out or results.FOLDER
    path = out / f"{options.configuration}.json"
    if not options.only_report:
        places = schedule.places(options.folder, CONFIGURATIONS[options.configuration])
        try:
            schedule.carry_out(places, workers=options.workers, say=lambda line: print(line, flush=True))
        except KeyboardInterrupt:
            sys.exit("interrupted; the same command continues")
        except BrokenProcessPool:
            sys.exit("a worker process was killed, perhaps for memory; the same command continues")
        results.write(path, results.collect(options.configuration, places))
    document = results.read(path)
    for written in (path, *plots.draw(document, out)):
        print(f"wrote {written}")
    # The README tells the full run; another's text goes beside its results.
    told = options.configuration == "full" and options.out is None
    readme = report.README if told else out / "README.md"
    readme.write_text(report.fill(report.README.read_text(), document, "results/" if told else ""))
    print(f"wrote {readme}")


if __name__ == "__main__":
    main()
