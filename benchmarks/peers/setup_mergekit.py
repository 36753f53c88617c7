"""Makes a virtual environment of its own for mergekit, whose pins are tight.

``python -m benchmarks.peers.setup_mergekit DIR``: torch comes first, from an index of CPU builds if it serves the
version, and mergekit keeps it. At the end this prints the line that makes the benchmarks use the environment.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"
MERGEKIT = "mergekit==0.1.5"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--torch-index", default=CPU_INDEX, help="index to try first for torch (default: %(default)s)")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    first = subprocess.run([*pip, "--index-url", options.torch_index, TORCH], check=False)
    if first.returncode != 0:
        print(f"{options.torch_index} did not serve {TORCH}; taking it from the default index", file=sys.stderr)
        subprocess.run([*pip, TORCH], check=True)
    subprocess.run([*pip, MERGEKIT], check=True)
    print(f"export PARAMDELTA_MERGEKIT={folder / 'bin' / 'mergekit-yaml'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
