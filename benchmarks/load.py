"""Loading 1.1 GB in shards, against the least that loading can be, and against transformers.

python benchmarks/load.py [--rounds 9] [--threads 1] [--folder FOLDER]

The model is of Qwen3-VL's kind, half a billion parameters in bf16, written by vlkit; transformers reads the same files. They
are in the page cache. Both map files, so a load alone reads little; in the second table one number of each page of the weights is
read after it. The floor knows beforehand which tensor goes where: it makes the model on meta, maps the files and assigns, without
a look at config, names, shapes, types or links. Processes of their own give the time from the start of Python, and the peak of
memory.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from harness import compare, machine, print_table
from safetensors import safe_open
from torch import nn

import vlkit
from vlkit.hub.checkpoint import open_checkpoint
from vlkit.models.meta import on_meta
from vlkit.models.pretrained import keys_of
from vlkit.models.vlm import VisionLanguageModel

PROCESS = """
import sys, time, warnings
warnings.simplefilter("ignore")
begin = time.perf_counter()
import torch
torch.set_num_threads({threads})
{imports}
imported = time.perf_counter()
model = {load}
pages = sum(float(p.detach().view(-1)[:: 4096 // p.itemsize].sum()) for p in model.parameters())
done = time.perf_counter()
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # of this program, not of its parent
print("figures", done - imported, done - begin, int(peak.split()[1]) * 1024 / 1e9)
"""
LOADERS = {
    "vlkit": ("import vlkit", "vlkit.from_pretrained({folder!r})"),
    "vlkit, copied": ("import vlkit", "vlkit.from_pretrained({folder!r}, mapped=False)"),
    "transformers": (
        "from transformers import AutoModelForImageTextToText as Model",
        "Model.from_pretrained({folder!r}, dtype='auto')",
    ),
    "imports of vlkit alone": ("import vlkit; vlkit.from_pretrained", "torch.nn.Linear(2, 2)"),
    "imports of transformers alone": (
        "from transformers import AutoModelForImageTextToText, Qwen3VLForConditionalGeneration",
        "torch.nn.Linear(2, 2)",
    ),
}


def write_model(folder: Path) -> None:
    """0.55 B parameters in shards of 200 MB."""
    llm = {"dim": 1024, "mlp_dim": 3072, "num_layers": 18, "num_heads": 16, "num_kv_heads": 8}
    vision = {"dim": 768, "num_layers": 8, "num_heads": 12, "mlp_dim": 3072, "taps": (1, 3, 5)}
    model = vlkit.create_model("qwen3-vl-2b", dtype=torch.bfloat16, llm=llm, vision=vision)
    model.save_pretrained(folder, max_shard_size="200MB")
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    print(f"{model.num_parameters() / 1e9:.2f} B parameters, {sum(sizes) / 1e9:.2f} GB in {len(sizes)} files")


def touched(model: nn.Module) -> float:
    """One number of every page of the weights."""
    with torch.no_grad():
        return sum(float(p.view(-1)[:: 4096 // p.itemsize].sum()) for p in model.parameters())


def floor(folder: Path) -> Callable[[], nn.Module]:
    """A function that loads with all decisions made beforehand."""
    config = vlkit.from_pretrained(folder).config
    with on_meta():
        ours = {name: tensor.shape for name, tensor in VisionLanguageModel(config).state_dict().items()}
    checkpoint = open_checkpoint(folder)
    by_file: dict[Path, list] = {}
    for step in keys_of(config).plan_load(checkpoint.shapes, ours, strict=False):
        by_file.setdefault(checkpoint.file_of[step.sources[0]], []).append(step)

    def load() -> nn.Module:
        with on_meta():
            model = VisionLanguageModel(config)
        state = {}
        for path, steps in by_file.items():
            with safe_open(path, framework="pt") as file:
                for step in steps:
                    state[step.target] = step.load(file.get_tensor)
        model.load_state_dict(state, assign=True, strict=False)
        return model

    return load


def in_processes(folder: Path, rounds: int, threads: int) -> None:
    """Each loader in fresh processes, in turn."""
    found: dict[str, list[list[float]]] = {name: [] for name in LOADERS}
    for _ in range(rounds):
        for name, (imports, load) in LOADERS.items():
            code = PROCESS.format(imports=imports, load=load.format(folder=str(folder)), threads=threads)
            begin = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            line = next(text for text in done.stdout.splitlines() if text.startswith("figures"))
            found[name].append([*map(float, line.split()[1:]), time.perf_counter() - begin])
    print(f"\nin processes of their own, medians of {rounds}")
    print(f"  {'':30}  {'load':>8}  {'with imports':>12}  {'peak memory':>12}  {'whole process':>13}")
    for name, rows in found.items():
        load, both, peak, whole = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"  {name:30}  {load:7.3f}s  {both:11.3f}s  {peak:9.3f} GB  {whole:12.3f}s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the model is written, or is from an earlier run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    print(machine())
    with tempfile.TemporaryDirectory() as parent:
        folder = args.folder or Path(parent) / "model"
        if not (folder / "config.json").exists():
            write_model(folder)
        from transformers import AutoModelForImageTextToText
        from transformers.utils import logging

        logging.disable_progress_bar()
        loaders: dict[str, Callable[[], nn.Module]] = {
            "floor": floor(folder),
            "vlkit": lambda: vlkit.from_pretrained(folder),
            "vlkit, looking for NaN": lambda: vlkit.from_pretrained(folder, check_finite=True),
            "vlkit, copied": lambda: vlkit.from_pretrained(folder, mapped=False),
            "transformers": lambda: AutoModelForImageTextToText.from_pretrained(folder, dtype="auto"),
        }
        touching = {name: lambda load=load: touched(load()) for name, load in loaders.items()}  # type: ignore[misc]
        lazy = {name: load for name, load in loaders.items() if name in ("floor", "vlkit", "transformers")}
        for title, functions in (("one process, load alone", lazy), ("one process, weights touched", touching)):
            timings = compare(functions, repeats=args.rounds, warmup=1)
            print_table(title, timings, baseline="transformers")
            print(f"  vlkit takes {1 / timings.speedup('vlkit', over='floor'):.2f} times the floor", end="")
            print(f" ({1 / timings.cpu_speedup('vlkit', over='floor'):.2f} by CPU time)")
        in_processes(folder, max(3, args.rounds // 3), args.threads)


if __name__ == "__main__":
    main()
