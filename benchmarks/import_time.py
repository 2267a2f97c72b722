"""What `import vlkit` and `vlkit --help` cost, beside torch alone: fresh interpreters, interleaved, medians.

python benchmarks/import_time.py
"""

from __future__ import annotations

import subprocess
import sys

from harness import compare, machine, print_table


def fresh(code: str) -> object:
    """Run code in an interpreter of its own."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def main() -> None:
    print(machine())
    timings = compare(
        {
            "python": lambda: fresh("pass"),
            "import torch": lambda: fresh("import torch"),
            "import vlkit, torch": lambda: fresh("import vlkit, torch"),
            "vlkit with Batch, registry and models": lambda: fresh("import vlkit; vlkit.Batch; vlkit.list_models()"),
            "vlkit --help": lambda: fresh(
                "import sys; sys.argv = ['vlkit', '--help']; from vlkit.cli import main; main()"
            ),
        },
        repeats=9,
        warmup=1,
    )
    print_table("seconds per process", timings, baseline="import torch")
    for name in ("import vlkit, torch", "vlkit with Batch, registry and models"):
        print(f"{name}: {timings.median(name) - timings.median('import torch'):+.3f} s over torch")


if __name__ == "__main__":
    main()
