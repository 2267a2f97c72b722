"""The command line: `vlkit demo`, `generate`, `train`, `stages`, `list`, `info`, `plan`.

Heavy imports happen inside the commands, so that `vlkit --help` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from vlkit.demo.options import Options

if TYPE_CHECKING:
    from torch import nn

    from vlkit.models import VisionLanguageModel
    from vlkit.processing import ImageRule

app = typer.Typer(
    name="vlkit",
    help="Building blocks for vision-language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run a command; what vlkit, the Hub or the system refuses is one message on stderr and exit status 1."""
    from vlkit.errors import VlkitError

    try:
        app()
    except (VlkitError, OSError) as error:
        sys.exit(f"vlkit: {error}")


def _print_version(wanted: bool) -> None:
    if wanted:
        from vlkit.version import __version__

        typer.echo(f"vlkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Building blocks for vision-language models."""


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to train.")] = Options.seconds,
    optimizer: Annotated[
        Literal["muon", "adamw"], typer.Option(help="Rule for the hidden matrices.")
    ] = Options.optimizer,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate; by default what suits the optimizer.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of weights and data.")] = Options.seed,
    vision: Annotated[str | None, typer.Option(help="A tower of `vlkit list`; by default a small MoonViT.")] = None,
    projector: Annotated[str | None, typer.Option(help="A projector; by default a small pixel shuffle.")] = None,
    llm: Annotated[str | None, typer.Option(help="A decoder; by default a small Moonlight with experts.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Strips per step.")] = Options.batch,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that learn together; 0 takes two where two can run at once.")
    ] = Options.workers,
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads; small models gain little from more.")
    ] = Options.threads,
    out: Annotated[Path, typer.Option(help="Folder of the model and the page.")] = Options.out,
) -> None:
    """Train a small model to read handwriting, here and now.

    Composes a small Kimi-VL (MoonViT, pixel shuffle, experts), trains it on strips of real handwritten digits, saves
    it, loads it in a fresh process, and writes a page with what it read of strips by writers whom it never saw. Ctrl-C
    stops the training and keeps what was learnt.
    """
    from vlkit.demo.run import run

    run(
        Options(
            seconds=seconds,
            optimizer=optimizer,
            lr=lr,
            seed=seed,
            vision=vision,
            projector=projector,
            llm=llm,
            batch=batch,
            workers=workers,
            threads=threads,
            out=out,
        )
    )


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="FOLDER_OR_REPO", help="A saved model, or a repository of the Hub.")],
    image: Annotated[list[Path] | None, typer.Option(help="A picture; may be given several times.")] = None,
    video: Annotated[list[Path] | None, typer.Option(help="A video: a file or a folder of frames.")] = None,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "",
    thinking: Annotated[bool | None, typer.Option(help="Whether the answer begins with thoughts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of probability to draw from.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the drawing.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    revision: Annotated[str | None, typer.Option(help="Commit or branch on the Hub.")] = None,
) -> None:
    """Ask a model about pictures and videos and print its answer."""
    import vlkit

    network = vlkit.from_pretrained(model, revision=revision, device=_checked_device(device))
    processor = vlkit.Processor.from_pretrained(model, revision=revision)
    content = [{"type": "image", "image": str(path)} for path in image or []]
    content += [{"type": "video", "video": str(path)} for path in video or []]
    if prompt:
        content.append({"type": "text", "text": prompt})
    batch = processor([{"role": "user", "content": content}], thinking=thinking).to(device)
    answer = network.generate(batch, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)[0]
    typer.echo(processor.decode(answer))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A .toml or .json file; see docs/training.md.")],
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Go on from the newest checkpoint of the run, if there is one; or refuse to begin where there is one.",
        ),
    ] = True,
    run: Annotated[Path | None, typer.Option(help="Folder of the run, instead of the one that CONFIG names.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the run, instead of what CONFIG says.")] = None,
) -> None:
    """Train a model as a file says, stage after stage, on one process or under torchrun.

    torchrun --nproc-per-node 8 -m vlkit train CONFIG runs the same on 8 ranks. Run it again and it goes on where it was.
    SIGTERM, SIGUSR1 and Ctrl-C finish the step and save; the exit status is then 75.
    """
    from vlkit.training.faults import EXIT_STOPPED, stop_on_signals

    with stop_on_signals() as stop:  # first of all: the imports below take seconds
        from vlkit.training import read_train_config
        from vlkit.training import train as begin

        chosen = read_train_config(config)
        if run is not None:
            chosen = chosen.replace(run=str(run.resolve()))
        if steps is not None:
            chosen = chosen.replace(steps=steps, epochs=None)
        result = begin(chosen, resume=resume, say=typer.echo, stop=stop)
    if result.stopped_by is not None:
        raise typer.Exit(EXIT_STOPPED)


@app.command()
def stages(
    pattern: Annotated[str | None, typer.Argument(help="A wildcard pattern such as 'kimi-vl/*'.")] = None,
    as_toml: Annotated[bool, typer.Option("--toml", help="A config with these stages, to edit.")] = False,
) -> None:
    """Show the training stages of published models: what their sources state, and what a run has to say itself.

    Without a pattern one line each; with one, every number with its source. vlkit stages 'kimi-vl/*' --toml > run.toml
    """
    from vlkit.training.presets import list_presets, preset, report

    found = [preset(name) for name in list_presets(pattern or "*")]
    if not found:
        from vlkit.errors import UnknownModelError

        wider = f"*{(pattern or '').strip('*')}*"
        hint = f"{wider!r} does" if list_presets(wider) else "'kimi-vl/*' takes a family"
        raise UnknownModelError(f"no stage fits {pattern!r}; `vlkit stages` lists all, {hint}")
    if as_toml:
        typer.echo(report.toml(found))
    elif pattern is None:
        typer.echo(report.overview(found))
    else:
        typer.echo("\n\n".join(report.table(stage) for stage in found))


def _checked_device(device: str) -> str:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"{device!r}: {str(error).splitlines()[0]}", param_hint="--device") from error
    return device


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(help="A wildcard pattern such as '*kimi*'.")] = "*",
) -> None:
    """List models and their parts, with their parameters."""
    from vlkit import registry

    found = {"models": {name: _model_size(name) for name in registry.list_models(pattern)}}
    for kind in registry.KINDS:
        found[f"{kind} parts"] = {name: _part_size(kind, name) for name in registry.list_components(kind, pattern)}
    found = {heading: sizes for heading, sizes in found.items() if sizes}
    if not found:
        from vlkit.errors import UnknownModelError

        raise UnknownModelError(f"no name fits {pattern!r}; `vlkit list` shows all, '*{pattern}*' looks inside names")
    width = max(len(name) for sizes in found.values() for name in sizes)
    blocks = [
        "\n".join([heading, *(f"  {name:<{width}}  {size}".rstrip() for name, size in sizes.items())])
        for heading, sizes in found.items()
    ]
    typer.echo("\n\n".join(blocks))


def _model_size(name: str) -> str:
    from vlkit.registry import model_spec

    spec = model_spec(name)
    return _size(spec.num_parameters, spec.num_active_parameters) if spec.num_parameters else ""


def _part_size(kind: str, name: str) -> str:
    from vlkit.summary import count

    part = _part(kind, name)
    return _size(count(part), count(part, active=True))


def _size(total: int, active: int) -> str:
    from vlkit.summary import short

    return f"{short(total):>7}" + (f", {short(active)} active" if active < total else "")


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="A model, a part, or a folder with a saved model.")],
    image: Annotated[str, typer.Option(metavar="WxH", help="Price of an image of this size, in pixels.")] = "1024x768",
    depth: Annotated[int, typer.Option(min=1, help="Levels of the tree.")] = 3,
) -> None:
    """Show the parts, parameters and memory of a model.

    And how many tokens an image becomes.
    """
    from vlkit import registry
    from vlkit.summary import count, image_cost, memory, short, tree

    size = _parse_size(image)
    rule: ImageRule | None
    if name in registry.list_models():  # before a folder that happens to have the name
        from vlkit.models.factory import create_model

        spec = registry.model_spec(name)
        model, rule = create_model(name, device="meta"), spec.processor.image
    elif Path(name).is_dir():
        model, rule = _saved(Path(name))
    else:
        kinds = [kind for kind in registry.KINDS if name in registry.list_components(kind)]
        if not kinds:
            registry.model_spec(name)  # raises, with the nearest names
        typer.echo("\n\n".join(tree(_part(kind, name), name, max_depth=depth) for kind in kinds))
        return
    typer.echo(tree(model, name, max_depth=depth))
    total, active = count(model), count(model, active=True)
    rows = [("parameters", short(total) + (f", of which one token uses {short(active)}" if active < total else ""))]
    rows += memory(model)
    rows.append(("an image", image_cost(rule, *size) if rule else "no processor in the folder says how it is resized"))
    typer.echo()
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        typer.echo(f"{label:<{width}}  {text}")


@app.command()
def plan(
    name: Annotated[str, typer.Argument(help="A model, or a folder with a saved model.")],
    ranks: Annotated[int, typer.Option(min=1, help="Processes, one per accelerator.")] = 1,
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Of weights and gradients.")] = "bf16",
    compute_dtype: Annotated[
        Literal["bf16", "fp32"] | None, typer.Option(help="Of the products, with fsdp; by default that of the weights.")
    ] = None,
    optimizer: Annotated[Literal["muon", "adamw"], typer.Option(help="Rule for the matrices.")] = "muon",
    sharding: Annotated[
        Literal["none", "zero1", "fsdp"],
        typer.Option(help="What is divided among ranks: the optimizer's state (zero1), or weights and gradients too."),
    ] = "zero1",
    partition: Annotated[
        Literal["flat", "matrix"], typer.Option(help="How zero1 divides Muon's state: equal ranges, or whole matrices.")
    ] = "flat",
    replicate: Annotated[int, typer.Option(min=1, help="Copies of the sharded model, with fsdp.")] = 1,
    expert_parallel: Annotated[
        int, typer.Option(min=1, help="Ranks over which the experts of a layer are spread, with fsdp.")
    ] = 1,
    sequence: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="TOKENS", help="Of a sequence, its images included; by default 8192, or all positions."
        ),
    ] = None,
    image: Annotated[str, typer.Option(metavar="WxH", help="Size of every image, in pixels.")] = "1024x768",
    images_per_sequence: Annotated[int, typer.Option(min=0, help="Images in every sequence.")] = 1,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, metavar="TOKENS", help="Of one forward on one rank; by default one sequence.")
    ] = None,
    micro_batches: Annotated[int, typer.Option(min=1, help="Forwards of one rank in a step.")] = 1,
    checkpointing: Annotated[
        Literal["none", "selective", "full"],
        typer.Option(help="What is computed again in the backward: what lies between products, or whole blocks."),
    ] = "none",
    as_json: Annotated[bool, typer.Option("--json", help="Exact numbers, for programs.")] = False,
) -> None:
    """Say what training a model over many ranks takes: memory, operations and traffic of one rank.

    Nothing is allocated, and no rank is started. vlkit plan kimi-vl-a3b --ranks 64 --sharding fsdp
    """
    import json

    from vlkit.training.plan import plan as make_plan

    made = make_plan(
        name,
        ranks=ranks,
        dtype=dtype,
        compute_dtype=compute_dtype,
        optimizer=optimizer,
        sharding=sharding,
        partition=partition,
        replicate=replicate,
        expert_parallel=expert_parallel,
        sequence=sequence,
        image=_parse_size(image),
        images_per_sequence=images_per_sequence,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        checkpointing=checkpointing,
    )
    typer.echo(json.dumps(made.to_dict(), indent=2) if as_json else str(made))


def _saved(folder: Path) -> tuple[VisionLanguageModel, ImageRule | None]:
    """A saved model without its weights, and how its processor sizes images, if one was saved beside it."""
    from vlkit.errors import ConfigError
    from vlkit.models.factory import create_model
    from vlkit.models.pretrained import read_config
    from vlkit.processing import Processor

    model = create_model(read_config(folder), device="meta")
    try:
        return model, Processor.from_pretrained(folder).config.image
    except ConfigError:
        return model, None


def _parse_size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise typer.BadParameter(f"{text!r} is not a size such as 1024x768", param_hint="--image")
    return int(width), int(height)


def _part(kind: str, name: str) -> nn.Module:
    """A registered part without memory."""
    from vlkit import registry
    from vlkit.models.meta import on_meta

    component = registry.component(kind, name)
    with on_meta():
        return component.module(component.configs[name])
