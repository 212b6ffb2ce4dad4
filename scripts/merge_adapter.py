"""Makes a whole model of a LoRA adapter, as a run with openrlhf.ds.lora.rank leaves it: to serve, teach or train it.

python scripts/merge_adapter.py ADAPTER FOLDER
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from skd_plugin.adapters import merge
from skd_plugin.errors import RecipeError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="a folder with adapter_config.json")
    parser.add_argument("folder", type=Path, help="where the model is written")
    parser.add_argument("--dtype", default="auto", help="of its weights; default: that of the adapter's base")
    given = parser.parse_args()
    try:
        merge(given.adapter, given.folder, given.dtype)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{given.folder} is {given.adapter} and its base in one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
