"""`flashserve train`: train a draft for a target model on local images and videos. `model.train` does the work."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from model.config import DTYPES, TRAINED, EngineConfig
from model.errors import ConfigError
from service.commands.decoding import decode_files
from service.media import MediaLimits

DATA, DRAFT, TRAINING, RUNNING = "Data", "Draft", "Training", "Running"
TEMPERATURES = "0,0,0.7,1"


def train(
    data: Annotated[Path, typer.Option(help="A folder of images and videos, or a JSONL manifest.")],
    output: Annotated[Path, typer.Option(help="Folder of the draft, for serve --draft; a stopped run resumes in it.")],
    target: Annotated[str, typer.Option(help="Path or id of the target model, as --model of serve.")] = "demo",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a target on the hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the target's checkpoint brings.")
    ] = False,
    drafter: Annotated[str, typer.Option(help=f"Drafting method: {', '.join(TRAINED)}.")] = "flash",
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Prompt for every file of a folder; repeatable.", rich_help_panel=DATA),
    ] = None,
    json_schema: Annotated[
        list[str] | None,
        typer.Option(
            help="JSON schema for answers to a folder's prompts, a file or JSON text; repeatable.",
            metavar="FILE|JSON",
            rich_help_panel=DATA,
        ),
    ] = None,
    schema_share: Annotated[
        float, typer.Option(help="Share of a folder's prompts that get one of the schemas.", rich_help_panel=DATA)
    ] = 0.3,
    evaluation_share: Annotated[
        float, typer.Option("--held-out", help="Share of the data kept for evaluation, 0 to 1.", rich_help_panel=DATA)
    ] = 0.05,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at an unusable line instead of skipping it.", rich_help_panel=DATA)
    ] = False,
    num_frames: Annotated[int | None, typer.Option(help="Frames sampled per video.", rich_help_panel=DATA)] = None,
    fps: Annotated[
        float | None, typer.Option(help="Or: frames sampled per second of video.", rich_help_panel=DATA)
    ] = None,
    temperatures: Annotated[
        str,
        typer.Option(help="Sampling temperatures of the target's answers, used in turn.", rich_help_panel=DATA),
    ] = TEMPERATURES,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of an answer.", rich_help_panel=DATA)] = 160,
    init: Annotated[
        Path | None,
        typer.Option(help="Folder of a draft to go on from, instead of an untrained one.", rich_help_panel=DRAFT),
    ] = None,
    hidden_size: Annotated[
        int | None,
        typer.Option(
            help="Hidden size, a multiple of 64. Default: the target's up to 512, half of a larger one.",
            rich_help_panel=DRAFT,
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Number of layers. Default: flash 2, flash-paper 1.", rich_help_panel=DRAFT)
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(
            help="Tokens drafted per step. Default: flash 10, flash-paper 5, others 7.", rich_help_panel=DRAFT
        ),
    ] = None,
    pooled: Annotated[
        int | None,
        typer.Option(
            help="Rows to which each image or video is average-pooled; 0: none. Default: flash 16, flash-paper 0.",
            rich_help_panel=DRAFT,
        ),
    ] = None,
    latents: Annotated[
        int | None,
        typer.Option(
            help="Learned latents per image or video; 0: ignore media, -1: use their rows unchanged. Default: flash "
            "-1, flash-paper 64.",
            rich_help_panel=DRAFT,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of the sequential head; 0: none. Default: flash 64, flash-paper 0.", rich_help_panel=DRAFT
        ),
    ] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(
            help="Size of the draft's vocabulary, the answers' most frequent tokens; 0: all. Default: 16384 if the "
            "target has more than 32768, else all; flash-paper: all.",
            rich_help_panel=DRAFT,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps. Default: 1500.", rich_help_panel=TRAINING)] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Instead of --steps: passes over the data.", rich_help_panel=TRAINING)
    ] = None,
    batch: Annotated[int, typer.Option(help="Examples per batch.", rich_help_panel=TRAINING)] = 16,
    accumulate: Annotated[
        int, typer.Option(help="Batches per step and process (gradient accumulation).", rich_help_panel=TRAINING)
    ] = 1,
    anchors: Annotated[
        int | None,
        typer.Option(
            help="Draft positions per answer and step. Default: 24, fewer with a large vocabulary.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    rate: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=TRAINING)] = 1.5e-3,
    warmup: Annotated[int, typer.Option(help="Warm-up steps of the learning rate.", rich_help_panel=TRAINING)] = 50,
    gamma: Annotated[
        float,
        typer.Option(
            help="Decay of the loss: position j of a draft has weight exp(-(j-1)/gamma).", rich_help_panel=TRAINING
        ),
    ] = 5.0,
    seed: Annotated[int, typer.Option(help="Seed of all randomness.", rich_help_panel=TRAINING)] = 0,
    precision: Annotated[
        str,
        typer.Option(help="Precision of the draft's passes: bf16 (mixed) or off (float32).", rich_help_panel=TRAINING),
    ] = "bf16",
    evaluate_every: Annotated[
        int, typer.Option(help="Steps between evaluations; 0: none.", rich_help_panel=RUNNING)
    ] = 250,
    evaluate_prompts: Annotated[
        int, typer.Option(help="Held-out prompts per evaluation.", rich_help_panel=RUNNING)
    ] = 16,
    evaluate_seconds: Annotated[
        float, typer.Option(help="Maximum seconds per evaluation.", rich_help_panel=RUNNING)
    ] = 20.0,
    final_prompts: Annotated[
        int, typer.Option(help="Held-out prompts of each kind in the final evaluation.", rich_help_panel=RUNNING)
    ] = 64,
    save_every: Annotated[
        float, typer.Option(help="Seconds between checkpoints, at most 60.", rich_help_panel=RUNNING)
    ] = 45.0,
    memory: Annotated[
        float, typer.Option(help="Device memory for cached hidden states, GiB.", rich_help_panel=RUNNING)
    ] = 4.0,
    max_num_seqs: Annotated[
        int, typer.Option(help="Answers that the target generates at once.", rich_help_panel=RUNNING)
    ] = 16,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Maximum tokens of prompt and answer, as --max-model-len of serve.", rich_help_panel=RUNNING),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.", rich_help_panel=RUNNING)] = "auto",
    dtype: Annotated[
        str, typer.Option(help=f"Data type of the target: {', '.join(DTYPES)}.", rich_help_panel=RUNNING)
    ] = "auto",
) -> None:
    """Train a draft for a target model on local images and videos.

    The target generates the answers and the draft learns to predict them; serve the result with --draft OUTPUT. After
    Ctrl-C or a kill, the same command resumes. With several GPUs: `accelerate launch -m service.cli train ...`.
    docs/training.md in the repository shows the whole way.
    """
    if drafter not in TRAINED:
        fail(f"--drafter must be one of {', '.join(TRAINED)}; got {drafter!r}", 2)
    if precision not in ("bf16", "off"):
        fail(f"--precision must be bf16 or off; got {precision!r}", 2)
    if steps is not None and epochs is not None:
        fail("set --steps or --epochs, not both", 2)
    if not 0.0 <= save_every <= 60.0:
        fail(f"--save-every must be at most 60; got {save_every}", 2)
    at_least_one = {
        **{"--batch": batch, "--accumulate": accumulate, "--max-tokens": max_tokens, "--warmup": warmup},
        **{"--steps": 1 if steps is None else steps, "--anchors": 1 if anchors is None else anchors},
        **{"--evaluate-prompts": evaluate_prompts, "--final-prompts": final_prompts},
    }
    if wrong := [name for name, value in at_least_one.items() if value < 1]:
        fail(f"{wrong[0]} must be at least 1", 2)
    if rate <= 0.0 or gamma <= 0.0 or (epochs is not None and epochs <= 0.0) or evaluate_every < 0:
        fail("--rate, --gamma and --epochs must be above 0, and --evaluate-every at least 0", 2)
    if not 0.0 <= schema_share <= 1.0:
        fail(f"--schema-share must be between 0 and 1; got {schema_share}", 2)
    sampling_temperatures = _temperatures(temperatures)

    from model.drafters import checkpoint, presets
    from model.targets.frames import most_frames
    from model.train import interrupt, manifest
    from model.train import run as training
    from model.train import team as teams
    from model.train.data import Interrupted, Unusable
    from model.train.trainer import TrainConfig
    from service.commands.forms import api_forms, read_schemas
    from service.commands.generate import hide_progress_bars

    try:
        schemas = read_schemas(json_schema or ())
        read = manifest.read(data, prompt or (), forms=api_forms(), grammars=schemas, grammar_share=schema_share)
        team = teams.gather()
        _report(read.problems, strict=strict, verbose=team.rank == 0)
        hide_progress_bars()
        config = EngineConfig(
            model=target,
            revision=revision,
            trust_remote_code=trust_remote_code,
            drafter="off",
            device=team.device or device,
            dtype=dtype,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
        ).resolved()
        opened_target = training.open_target(config, drafter)
        training.check_grammars(schemas, opened_target)
        limits = MediaLimits()
        fitting = most_frames(opened_target, config.context(opened_target.max_positions))
        limits = replace(limits, max_frames=min(limits.max_frames, fitting))
        sample = opened_target.sample_frames
        with (
            decode_files(limits, opened_target.geometry, num_frames, fps, sample=sample) as decode,
            interrupt.on_signals() as stop,
        ):
            prompts = manifest.FilePrompts(read, decode, evaluation_share)
            each = batch * accumulate * team.size
            if epochs is not None:
                steps = max(1, round(epochs * len(prompts.train) / each))
            sizes = presets.Sizes(
                hidden_size=hidden_size,
                num_layers=layers,
                block=block,
                pooled=pooled,
                num_latents=latents,
                sequential_rank=rank,
                vocabulary=vocabulary,
            )
            shape = checkpoint.described(init).config if init else presets.shape(drafter, opened_target, sizes)
            settings = training.Settings(
                target=config,
                drafter=drafter,
                output=output,
                command=shlex.join(["flashserve", *sys.argv[1:]]),
                train=TrainConfig(
                    steps=steps or 1500,
                    batch=batch,
                    accumulate=accumulate,
                    anchors=anchors or training.anchors(batch, shape),
                    rate=rate,
                    gamma=gamma,
                    warmup=warmup,
                    seed=seed,
                    save_every=save_every,
                    evaluate_every=evaluate_every,
                    autocast=precision == "bf16",
                    memory_bytes=int(memory * (1 << 30)),
                ),
                init=init,
                sizes=sizes,
                temperatures=sampling_temperatures,
                max_tokens=max_tokens,
                evaluate_prompts=evaluate_prompts,
                evaluate_seconds=evaluate_seconds,
                final_prompts=final_prompts,
                sampling={"num_frames": num_frames, "fps": fps},
                strict=strict,
            )
            figures = training.run(settings, opened_target, prompts, team, stop)
    except Interrupted:
        typer.echo("flashserve: stopped and saved; run the same command to resume", err=True)
        raise typer.Exit(130) from None
    except (ConfigError, Unusable, OSError, FloatingPointError) as error:
        fail(str(error))
    if team.rank == 0:
        for kind, measured in figures.items():
            typer.echo(f"held-out acceptance length, {kind}: {measured['length']:.2f}")
        typer.echo(f"serve it: flashserve serve --model {shlex.quote(target)} --draft {shlex.quote(str(output))}")


def fail(message: str, code: int = 1) -> Any:
    """Print an error and exit."""
    typer.echo(f"flashserve: {message}", err=True)
    raise typer.Exit(code)


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        temperatures = tuple(float(part) for part in text.split(","))
    except ValueError:
        temperatures = ()
    if not temperatures or not all(0.0 <= temperature <= 100.0 for temperature in temperatures):
        fail(f"--temperatures must be comma-separated numbers from 0 to 100; got {text!r}", 2)
    return temperatures


def _report(problems: tuple[str, ...], *, strict: bool, verbose: bool) -> None:
    """Print which lines are skipped; with `strict` raise ConfigError if there are any."""
    for problem in problems if verbose else ():
        typer.echo(f"flashserve: skipped: {problem}", err=True)
    if strict and problems:
        raise ConfigError(f"--strict: {len(problems)} lines are unusable")
