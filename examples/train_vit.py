"""Train a ViT or a Swin at full learning rate: AdamW without and with warmup, and AdamW²."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
from flax import nnx

from examples import measurements, optimizers, processes, program, results, training, vision
from examples.image_data import Images
from examples.recorder import Recorder
from models.swin import Swin
from models.vit import ViT

PresetName = Literal[
    "nano", "vit-base", "vit-large", "vit-giant", "swin-small", "swin-base", "flatten-small"
]


@dataclasses.dataclass(frozen=True)
class First:
    """The flags that `--help` shows first."""

    preset: PresetName = "nano"
    """What all other flags are by default: nano is for two CPU cores, the others the paper's
    recipes for ImageNet."""
    runs: tuple[optimizers.Name, ...] = ("adamw", "adamw_warmup", "adamw2")
    """The optimizers to compare. Each trains the same model, one after the other."""
    out: Path = Path("runs/train_vit")
    """The folder for the results: the losses, the pictures and the checkpoints."""
    resume: bool = False
    """Go on with the run in that folder, from its last checkpoint."""


@dataclasses.dataclass(frozen=True)
class Flags(processes.Flags, vision.Config, First):
    """Train the same classifier on the same batches with several optimizers, and compare them."""


def parse(arguments: list[str] | None = None) -> Flags:
    """The flags, with the defaults of the preset that they name."""
    return program.parse(Flags, vision.PRESETS, arguments)


def train(
    name: str,
    config: vision.Config,
    images: Images,
    folder: Path,
    norms: bool = True,
    snapshot: Callable[[ViT | Swin], dict[str, jax.Array]] | None = None,
) -> ViT | Swin:
    """Trains a ViT or a Swin with the optimizer of that name, and returns it.

    It starts from the newest checkpoint, if `folder` has one, and writes there what a
    `Recorder` does. A loss that is not finite ends the run. Several processes train together.

    Args:
        name: Of `optimizers.OPTIMIZERS`.
        config: Its settings, and the model's.
        images: What the model learns.
        folder: For all that is written.
        norms: Whether to log the spectral norms of attention, and what the bound did.
        snapshot: What to keep of the model at every watched step.

    Raises:
        training.Stopped: After Ctrl-C, in any process, with everything saved.
    """
    config = dataclasses.replace(config, steps=vision.num_steps(config, images), epochs=None)
    task = vision.make_task(config, images)
    optimizer, learning_rate = optimizers.make(name, config, config.steps, task.numbers)
    max_logits = measurements.max_logits(
        name, lambda batch: vision.normalize(images, batch["image"])
    )
    graph, state, update = training.start(task.model, task.loss, optimizer, max_logits)

    of_model = functools.partial(training.of_model, graph, task.mesh)
    observe = of_model(measurements.observe(name, vision.stacks))
    measure = of_model(measurements.measure(task.loss))
    keep = of_model(snapshot) if snapshot else None
    validate = training.make_validate(
        graph,
        task.mesh,
        vision.held_out(config, images),
        functools.partial(vision.evaluate, images),
    )
    with (
        contextlib.closing(task.batches),
        Recorder(folder, name, task.mesh, task.run) as recorder,
        training.stop_signal() as stopped,
    ):
        done, state = recorder.restore(state, task.batches)
        for step in training.steps(recorder, done, config.steps):
            last = step == config.steps
            batch = training.next_batch(task, config.accumulate)
            watched = {}
            if config.is_due(step, config.watch):  # of the weights that give the loss
                watched = measure(state, batch)
                if keep:
                    recorder.save_snapshot(step, keep(state))
            state, loss = update(state, batch)
            validated = step % config.validate_every == 0 or last
            if watched or validated or config.is_due(step, config.log_every):
                metrics = {
                    "loss": float(loss),
                    "learning_rate": float(learning_rate(step - 1)),
                    **({} if watched else recorder.speed(step)),  # of updates alone
                    **(observe(state, state["opt_state"]) if norms else {}),
                    **watched,
                }
                if validated and math.isfinite(metrics["loss"]):
                    metrics |= validate(state)
                recorder.write(step, metrics)
            stop = stopped()
            if step % config.save_every == 0 or last or recorder.diverged or stop:
                recorder.save(step, state, task.batches)
            if stop and not last:
                raise training.Stopped(f"{name} is saved at step {step}")
    return nnx.merge(graph, state["params"], state["rest"])


def main(flags: Flags, images: Images) -> None:
    """Trains, and shows a table, what it says, and pictures."""
    print(
        f"{len(images.train):,} images of {len(images.classes):,} classes to train on, "
        f"{len(images.validation):,} held out."
    )
    program.train_each(flags, lambda name: train(name, flags, images, flags.out))
    if images.skipped:
        print(f"Files that cannot be read as images, and were skipped: {len(images.skipped):,}.")
    if processes.is_first():
        results.report(flags, judged_by="val_accuracy")


if __name__ == "__main__":
    program.run(parse, vision.prepare, main)
