"""`vlkit demo`, from the parts to the page.

compose -> train -> save -> transcribe in a fresh process -> index.html
"""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vlkit.config import Config
from vlkit.demo.digits import load_digits
from vlkit.demo.options import Options
from vlkit.demo.progress import ProgressLine
from vlkit.demo.report import Reading, Result, render
from vlkit.demo.strips import Strip, make_strips
from vlkit.demo.task import PROMPT, image_rule, picture
from vlkit.demo.train import History, train
from vlkit.demo.workers import processes_for
from vlkit.errors import CheckpointError, ConfigError, VlkitError
from vlkit.layers.position import PositionTable
from vlkit.llm.moonlight import MoonlightConfig
from vlkit.models import VisionLanguageModel
from vlkit.models.factory import compose
from vlkit.processing import ByteTokenizer, Processor, ProcessorConfig
from vlkit.projectors.pixel_shuffle import PixelShuffleConfig
from vlkit.registry import component
from vlkit.summary import kind_of, short, tree
from vlkit.version import __version__
from vlkit.vision.moonvit import MoonViTConfig

VISION = MoonViTConfig(dim=64, num_layers=3, num_heads=4, mlp_dim=192, patch_size=8, position_grid=(4, 14))
PROJECTOR = PixelShuffleConfig(in_dim=64, out_dim=96, hidden_dim=192)
LLM = MoonlightConfig(
    vocab_size=ByteTokenizer.vocab_size,
    dim=96,
    num_layers=2,
    num_heads=4,
    kv_rank=48,
    nope_dim=16,
    rope_dim=8,
    value_dim=24,
    mlp_dim=256,
    num_experts=8,
    top_k=2,
    expert_dim=48,
    num_shared_experts=1,
    routed_scale=1.0,
    theta=10000.0,
    max_positions=512,
)
"""A Kimi-VL in small: the same three parts, and every mechanism of theirs."""

POSITION_SCALE = 0.02
"""Position tables start unit normal, as wide as what the pixels give; in so short a training they are better small."""

JUDGED = 400  # strips of unseen writers on the page
MARK = "vlkit-demo.json"  # in every folder that the demo made; others are never touched


def run(options: Options) -> Path:
    """The whole demo.

    Returns:
        Where the page is.

    Raises:
        CheckpointError: The folder is somebody else's.
        ConfigError: Parts that do not fit each other or the task.
    """
    begin = time.perf_counter()
    torch.set_num_threads(options.threads)
    out = prepare_folder(options.out)
    torch.manual_seed(options.seed)
    model = build_model(options)
    processor = Processor(
        ProcessorConfig(
            image=image_rule(model.config.vision.patch_size, model.config.projector.merge_size)  # type: ignore[attr-defined]
        )
    )
    parts = tree(model, "model", max_depth=3)
    print(f"{tree(model, 'model', max_depth=1)}\n")
    print(
        f"Learning to read strips of handwritten digits with {options.optimizer} for {options.seconds:.0f} s. "
        "Ctrl-C stops early and keeps what was learnt."
    )
    progress = ProgressLine()
    history = train(
        model,
        processor,
        seconds=options.seconds,
        batch_size=options.batch,
        workers=processes_for(options.workers),
        optimizer=options.optimizer,
        lr=options.lr,
        seed=options.seed,
        progress=progress,
    )
    progress.finish()
    if history.stopped:
        print("Stopped; what was learnt is kept.")

    folder = out / "model"
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    print(f"Saved to {folder}. Reading {JUDGED} strips by unseen writers in a fresh process.")
    strips = make_strips(load_digits("unseen"), JUDGED, seed=(options.seed, 2))
    answers, load = transcribe_afresh(folder, strips, out)
    readings = [Reading(strip, answer) for strip, answer in zip(strips, answers, strict=True)]

    example = out / "strips" / f"{_first_right(readings):03d}.png"
    generate = shlex.join(["vlkit", "generate", str(folder), "--image", str(example), "--prompt", PROMPT])
    result = Result(
        title=_title(model),
        readings=readings,
        steps=history.steps,
        checks=history.checks,
        load=load,
        tree=parts,
        facts=_facts(options, model, history, time.perf_counter() - begin),
        commands=[
            ("Ask the saved model about one of the strips:", generate),
            (
                "Learn with AdamW instead, or with another decoder:",
                "vlkit demo --optimizer adamw\nvlkit demo --llm qwen3-tiny",
            ),
            ("See what can be swapped, and what the real Kimi-VL is made of:", "vlkit list\nvlkit info kimi-vl-a3b"),
        ],
        stopped=history.stopped,
    )
    page = out / "index.html"
    page.write_text(render(result), encoding="utf-8")
    _mark(out, options, result, history, time.perf_counter() - begin)
    print(f"\n{result.num_exact} of {len(readings)} strips right ({100 * result.num_exact / len(readings):.1f}%).")
    print(f"The page:  {page.resolve()}")
    print(f"Try it:    {generate}")
    return page


def build_model(options: Options) -> VisionLanguageModel:
    """The small Kimi-VL, or one with other registered parts.

    Raises:
        UnknownModelError: No such part.
        ConfigError: Parts that do not fit, or a decoder whose vocabulary cannot hold the byte tokenizer's.
    """
    vision: Config = VISION if options.vision is None else _named("vision", options.vision)
    llm: Config = LLM if options.llm is None else _named("llm", options.llm)
    projector: Config = PROJECTOR if options.projector is None else _named("projector", options.projector)
    check_vocabulary(llm)
    fitted = projector.replace(in_dim=vision.out_dim, out_dim=llm.dim)  # type: ignore[attr-defined]
    model = compose(vision=vision, projector=fitted, llm=llm)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, PositionTable):
                module.table.mul_(POSITION_SCALE)
    return model


def check_vocabulary(llm: Config) -> None:
    """Refuse a decoder that cannot write the demo's answers.

    Raises:
        ConfigError: Its vocabulary is smaller than the byte tokenizer's.
    """
    needed, found = ByteTokenizer.vocab_size, llm.vocab_size  # type: ignore[attr-defined]
    if found < needed:
        raise ConfigError(f"{type(llm).__name__}: a vocabulary of {found} ids; the demo's byte tokenizer has {needed}")


def _named(kind: str, name: str) -> Config:
    return component(kind, name).configs[name]


def prepare_folder(folder: Path) -> Path:
    """An empty folder for the demo: a new one, or one that the demo made before.

    Raises:
        CheckpointError: It holds something that the demo did not make.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARK).is_file())):
        raise CheckpointError(
            f"{folder} exists and was not made by the demo; move it away, or choose another with --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for made in ("model", "strips"):
        shutil.rmtree(folder / made, ignore_errors=True)
    (folder / "index.html").unlink(missing_ok=True)
    (folder / MARK).write_text("{}\n", encoding="utf-8")
    return folder


def transcribe_afresh(model_folder: Path, strips: list[Strip], out: Path) -> tuple[list[str], list[list[int]]]:
    """Write the strips as pictures and read them with the saved model in another process.

    Returns:
        Answers in order, and tokens per expert, one row per MoE layer.

    Raises:
        VlkitError: The other process failed; the message has its last words.
    """
    pictures, answers = out / "strips", out / "answers.json"
    pictures.mkdir()
    for number, strip in enumerate(strips):
        picture(strip).save(pictures / f"{number:03d}.png")
    command = [sys.executable, "-m", "vlkit.demo.transcribe", str(model_folder), str(pictures), str(answers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise VlkitError(f"reading with the saved model failed:\n{done.stderr[-2000:]}")
    told: dict[str, Any] = json.loads(answers.read_text(encoding="utf-8"))
    answers.unlink()
    return told["answers"], told["load"]


def _first_right(readings: list[Reading]) -> int:
    """The first strip of several digits that was read rightly, or just the first."""
    return next((i for i, r in enumerate(readings) if r.right and len(r.answer) > 2), 0)


def _title(model: VisionLanguageModel) -> str:
    total, active = model.num_parameters(), model.num_parameters(active=True)
    of_token = f", of which a token uses {short(active)}" if active < total else ""
    names = [kind_of(part) for part in (model.vision, model.projector, model.llm)]
    return f"{names[0]}, {names[1]} and {names[2]} with {short(total)} parameters{of_token}"


def _facts(options: Options, model: VisionLanguageModel, history: History, wall: float) -> list[tuple[str, str]]:
    last = history.steps[-1] if history.steps else None
    speed = "-"
    if last:
        speed = (
            f"{last.samples / last.seconds:.0f} strips, {history.tokens / last.seconds:,.0f} decoder tokens per second"
        )
    software = f"vlkit {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return [
        ("parameters", f"{model.num_parameters():,}, active {model.num_parameters(active=True):,}"),
        ("optimizer", options.optimizer),
        ("highest learning rate", f"{max((step.rate for step in history.steps), default=0):g}"),
        ("strips per step", str(options.batch)),
        ("seed", str(options.seed)),
        ("speed while training", speed),
        ("whole command until here", f"{wall:.0f} s"),
        ("trained on", f"{len(load_digits('seen').labels):,} digits from ten forms, varied"),
        ("judged on", f"{len(load_digits('unseen').labels)} digits from four other forms, as they were written"),
        ("software", software),
        ("processes", f"{processes_for(options.workers)}, {options.threads} thread(s) each"),
        ("command", shlex.join(["vlkit", *sys.argv[1:]])),
    ]


def _mark(out: Path, options: Options, result: Result, history: History, wall: float) -> None:
    """Leave the figures beside the page; the file also says that the folder is the demo's."""
    last = history.steps[-1] if history.steps else None
    figures = {
        "exact": result.num_exact / max(len(result.readings), 1),
        "digits": result.digits[0] / max(result.digits[1], 1),
        "training_seconds": last.seconds if last else 0.0,
        "samples": last.samples if last else 0,
        "steps": len(history.steps),
        "tokens": history.tokens,
        "wall_seconds": wall,
        "stopped": history.stopped,
        "optimizer": options.optimizer,
        "seed": options.seed,
        "texts": [r.strip.text for r in result.readings],
        "answers": [r.answer for r in result.readings],
    }
    (out / MARK).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
