"""Train a GPT at full learning rate: AdamW without and with warmup, and AdamW²."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import tyro

from examples import language, optimizers, plots, training
from examples.data import Corpus

PresetName = Literal["nano", "gpt2-small", "gpt2-large"]


@dataclasses.dataclass(frozen=True)
class Flags(language.Config):
    """Train the same GPT on the same batches with several optimizers, and compare them."""

    preset: PresetName = "nano"
    """The defaults of all other flags: for two CPU cores, or the paper's recipe for GPT-2."""
    runs: tuple[optimizers.Name, ...] = ("adamw", "adamw_warmup", "adamw2")
    """The optimizers to train with, in this order."""
    out: Path = Path("runs/train_gpt")
    """The folder of the run."""
    resume: bool = False
    """Go on with the run in that folder."""


def parse(arguments: list[str] | None = None) -> Flags:
    """The flags, with the defaults of the preset that they name."""

    @dataclasses.dataclass(frozen=True)
    class Preset:
        preset: PresetName = "nano"

    known, _ = tyro.cli(Preset, args=arguments, return_unknown_args=True, add_help=False)
    settings = dataclasses.asdict(language.PRESETS[known.preset])
    return tyro.cli(Flags, args=arguments, default=Flags(preset=known.preset, **settings))


def main(flags: Flags, corpus: Corpus) -> None:
    """Trains, and shows pictures, text, a table, and what it says."""
    print(f"{corpus.train.size:,} tokens to train on, {corpus.validation.size:,} held out.")
    runs, models = {}, {}
    for name in flags.runs:
        models[name] = language.train_run(name, flags, corpus, flags.out)
        runs[name] = language.summarize(flags.out, name)
        language.write_summary(flags.out, runs)

    lines = {name: training.read_metrics(flags.out, name) for name in flags.runs}
    pictures = [
        plots.loss(lines, flags.out / "loss.png"),
        plots.qk_sigma(lines, flags.out / "qk_sigma.png"),
    ]
    if "adamw2" in runs:
        pictures.append(plots.learning_rates(lines["adamw2"], flags.out / "learning_rates.png"))
        if corpus.is_text:
            text = language.generate(models["adamw2"], prompt="def ", length=240, seed=flags.seed)
            print(f"\nWhat the model trained with AdamW² writes:\n\n{text}\n")
    print(table(runs))
    print(verdict(runs, flags))
    print("\nPictures: " + ", ".join(map(str, pictures)))


def table(runs: dict[str, Any]) -> str:
    """A line for each run."""
    rows = [f"{'':20}{'validation loss':>18}{'largest |WqWk^T|':>18}{'steps per second':>18}"]
    for name, run in runs.items():
        loss, sigma, rate = (
            f"{run[key]:.3f}" if run[key] is not None else "-"
            for key in ("val_loss", "max_qk_sigma", "steps_per_second")
        )
        if run["diverged_at"] is not None:
            loss = f"diverged at {run['diverged_at']}"
        rows.append(f"{optimizers.LABELS[name]:20}{loss:>18}{sigma:>18}{rate:>18}")
    return "\n".join(rows)


def verdict(runs: dict[str, Any], flags: Flags) -> str:
    """What the figures say of AdamW²."""
    ours = runs.get("adamw2", {}).get("val_loss")
    if ours is None:
        return "AdamW² has no validation loss to compare."
    sentences = []
    for name in ("adamw", "adamw_warmup"):
        if name in runs:
            theirs = runs[name]["val_loss"]
            if theirs is None:
                how = "where"
            elif ours < theirs:
                how = f"{theirs - ours:.3f} nats below"
            else:
                how = f"{ours - theirs:.3f} nats above"
            with_warmup = f"with {flags.warmup} steps of warmup" if "warmup" in name else "without"
            diverged = " diverged" if theirs is None else ""
            sentences.append(f"{how} AdamW {with_warmup}{diverged}")
    return (
        f"At a learning rate of {flags.learning_rate:g} from the first step, AdamW² reaches "
        f"{ours:.3f} nats per token" + "".join(f", {s}" for s in sentences) + "."
    )


if __name__ == "__main__":
    language.run_program(parse, main)
