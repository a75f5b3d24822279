"""Fuzz for a while, starting from the corpus:  python -m tests.fuzz.run --seconds 60

What fails is written to the folder `--out`; add it to `FOUND` in `tests/fuzz/corpus.py`, of which the tests run
each input again, once it is mended.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["protocol", "node.rollouts.group"]):
    from tests.fuzz.corpus import inputs
    from tests.fuzz.targets import try_one


def main() -> None:
    """Run libFuzzer, which ends the process: 0 if nothing failed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=int, default=60)
    options.add_argument("--seed", type=int, default=0, help="0: another one each time")
    options.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()))
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as found:  # libFuzzer writes what is new into the first folder
        arguments = [
            sys.argv[0],
            f"-max_total_time={chosen.seconds}",
            f"-seed={chosen.seed}",
            f"-artifact_prefix={chosen.out}/",
            "-max_len=4096",
            "-timeout=10",
            "-rss_limit_mb=2048",
            "-print_final_stats=1",
            "-verbosity=0",
        ]
        for number, data in enumerate(inputs()):
            (Path(found) / f"{number:02}").write_bytes(data)
        atheris.Setup([*arguments, found], try_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
