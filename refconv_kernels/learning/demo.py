"""Refocusing Learning end to end on handwritten digits: train, refocus, fold, check, compare.

Three arms per seed: the baseline; ``retrain``, that baseline trained again by the same recipe (the control of
paper section IV-F.1); ``RefConv``, that baseline refocused and trained by the same recipe. Both second
trainings see the same images in the same order, so their results are paired.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refconv_kernels import RefConv2d, refocus, reparameterize, summary
from refconv_kernels.learning.checkpoint import read_weights, write_file, write_weights
from refconv_kernels.learning.compare import compare
from refconv_kernels.learning.data import digits
from refconv_kernels.learning.errors import CheckFailed, require
from refconv_kernels.learning.fold import check_fold
from refconv_kernels.learning.log import cpu_name
from refconv_kernels.learning.loop import accuracy, logits, train
from refconv_kernels.learning.models import SmallSeparableNet
from refconv_kernels.learning.picture import draw_kernels
from refconv_kernels.learning.recipe import Recipe
from refconv_kernels.learning.timing import compare_steps
from refconv_kernels.ops import UNAVAILABLE

__all__ = ["ARMS", "EPOCHS", "SEEDS", "report", "run"]

ARMS = ("baseline", "retrain", "RefConv")
SEEDS, EPOCHS = 8, 40
_EXTRAS = ("tqdm", "sklearn.datasets", "scipy.stats", "matplotlib.figure", "safetensors.torch")
_SHOWN = 16  # kernels in the picture


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: a layer is too little work to share here, and sums do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- the experiment -----------------------------------------------------------------------------------------


@_one_thread()
def run(output: Path, *, seeds: int = SEEDS, epochs: int = EPOCHS, quiet: bool = False) -> dict[str, Any]:
    """Run the comparison and write ``kernels.png``, ``folded.safetensors`` and ``results.json``.

    Args:
        output: folder for the files, made if need be. The first two show and hold the RefConv network of seed 0.
        seeds: how often everything is repeated from another initialisation.
        epochs: of each of the three trainings.
        quiet: one line per training on stderr instead of a progress bar, as also where stderr is no terminal.

    Returns:
        All figures, as in ``results.json``; :func:`report` makes text of them.

    Raises:
        MissingExtra: a package of the ``learn`` extra is not installed.
        OSError: ``output`` cannot be written; found out before training.
        CheckFailed: folding, reloading or the gradients are not what they must be.
        FloatingPointError: a training diverged.
    """
    for extra in _EXTRAS:
        require(extra)
    output.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=output).close()

    learn, test = digits()
    # The paper's recipe for few and small images: 64 per batch instead of 256, so that an epoch is more than
    # two steps; a crop of one pixel; fewer epochs. Learning rate, share of the warm-up and the rest are its own.
    warmup = min(epochs - 1, max(1, epochs // 20))
    recipe = Recipe(epochs=epochs, warmup_epochs=warmup, batch_size=64, crop_padding=1)
    right: dict[str, list[float]] = {arm: [] for arm in ARMS}
    losses: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    fold_differences, changed = [], 0
    for seed in range(seeds):
        networks: dict[str, nn.Module] = {}
        for arm in ARMS:
            networks[arm] = _start(arm, networks, seed)
            # The images come in another order in the second training, in the same one for both its arms.
            order = 2 * seed + (arm != "baseline")
            with _progress(f"seed {seed}, {arm}", epochs, quiet) as on_epoch:
                losses[arm].append(train(networks[arm], learn, recipe, seed=order, on_epoch=on_epoch))
        folded = reparameterize(networks["RefConv"])
        fold_differences.append(check_fold(networks["RefConv"], folded, test.images))
        answers = (logits(network, test.images).argmax(1) for network in (networks["RefConv"], folded))
        changed += int(torch.ne(*answers).sum())
        for arm, network in {**networks, "RefConv": folded}.items():  # what would be deployed is tested
            right[arm].append(accuracy(logits(network, test.images), test))
        if seed == 0:
            first = networks
            _keep_weights(output / "folded.safetensors", folded, test.images)
            _keep_picture(output / "kernels.png", networks["RefConv"])

    counts = {arm: summary(network) for arm, network in first.items()}
    results: dict[str, Any] = {
        "data": {"name": "scikit-learn digits, 8x8", "train_images": len(learn), "test_images": len(test)},
        "recipe": asdict(recipe),
        "seeds": seeds,
        "arms": {
            arm: {
                "accuracy": right[arm],  # % of the test images after the last epoch, one per seed
                "accuracy_mean": statistics.fmean(right[arm]),
                "training_parameters": counts[arm].training_parameters,
                "deployed_parameters": counts[arm].deployed_parameters,
                "loss": losses[arm],  # mean cross-entropy of each epoch, one list per seed
            }
            for arm in ARMS
        },
        "differences": {  # RefConv minus the other arm, percentage points
            arm: asdict(compare([a - b for a, b in zip(right["RefConv"], right[arm], strict=True)]))
            for arm in ("baseline", "retrain")
        },
        "fold": {
            "max_logit_difference": max(fold_differences),
            "changed_predictions": changed,
            "reload": "bit-identical",
        },
        "step": compare_steps(first["baseline"], learn, recipe),
        "machine": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "native_kernels_off": UNAVAILABLE["cpu"],
        },
        "files": [str(output / name) for name in ("kernels.png", "folded.safetensors", "results.json")],
    }
    write_file(output / "results.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
    return results


def _start(arm: str, networks: Mapping[str, nn.Module], seed: int) -> nn.Module:
    """The network of ``arm`` before its training."""
    if arm == "retrain":
        return copy.deepcopy(networks["baseline"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return refocus(networks["baseline"]) if arm == "RefConv" else SmallSeparableNet()


@contextmanager
def _progress(stage: str, epochs: int, quiet: bool) -> Iterator[Callable[[float], None]]:
    """A function to call after each epoch with its loss: a bar on a terminal, else one line at the end."""
    quiet = quiet or not sys.stderr.isatty()
    start, loss = time.perf_counter(), 0.0
    with require("tqdm").tqdm(total=epochs, desc=f"{stage:<16}", unit="epoch", disable=quiet) as bar:

        def on_epoch(now: float) -> None:
            nonlocal loss
            loss = now
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()

        yield on_epoch
    if quiet:
        print(f"{stage}: {epochs} epochs in {time.perf_counter() - start:.1f} s, loss {loss:.4f}", file=sys.stderr)


# --- checks and files ---------------------------------------------------------------------------------------


def _keep_weights(path: Path, folded: nn.Module, images: Tensor) -> None:
    """Write the folded weights, and read them back into the original architecture."""
    write_weights(path, folded.state_dict())
    reloaded = SmallSeparableNet()
    reloaded.load_state_dict(read_weights(path)[0], strict=True)
    if not torch.equal(logits(reloaded, images), logits(folded, images)):
        raise CheckFailed(f"{path}, loaded into the original architecture, does not give the folded network's outputs")


def _keep_picture(path: Path, refocused: nn.Module) -> None:
    layers = ((n, m) for n, m in refocused.named_modules() if isinstance(m, RefConv2d) and m.groups > 1)
    name, layer = next(layers)
    title = f"Refocusing Learning: {_SHOWN} of the {layer.out_channels} depthwise kernels of layer {name}"
    write_file(path, lambda to: draw_kernels(layer.basis_weight, layer.weight, to, title=title, count=_SHOWN))


# --- text ---------------------------------------------------------------------------------------------------


def report(results: Mapping[str, Any]) -> str:
    """The figures of :func:`run` as text."""
    data, recipe, step, machine, fold = (results[key] for key in ("data", "recipe", "step", "machine", "fold"))
    lines = [
        f"{data['name']}: {data['train_images']} training images, {data['test_images']} test images.",
        f"baseline: {recipe['epochs']} epochs from random weights. retrain: the baseline trained as long again, "
        "unchanged.",
        "RefConv: the baseline refocused and trained as long again, then folded. Accuracy after the last epoch.",
        "",
        f"{'':<20}{'trained':>10}{'deployed':>12}{'test accuracy in %':>23}",
        f"{'':<20}{'parameters':>10}{'parameters':>12}{'mean':>9}   per seed",
    ]
    for name, arm in results["arms"].items():
        trained, deployed, seeds = arm["training_parameters"], arm["deployed_parameters"], arm["accuracy"]
        each = "  ".join(f"{value:.2f}" for value in seeds)
        lines.append(f"{name:<20}{trained:>10,}{deployed:>12,}{arm['accuracy_mean']:>9.2f}   {each}")
    lines += ["", "Difference in percentage points, paired by seed, with its 95 % confidence interval over the seeds"]
    for name, difference in results["differences"].items():
        low, high = difference["low"], difference["high"]
        interval = "" if low is None else f"[{low:+.2f}, {high:+.2f}]"
        title = f"RefConv - {name}"
        lines.append(f"{title:<20}{difference['mean']:+10.2f}   {interval:<16} {difference['verdict']}")
    lines += ["", f"One training step (forward, backward, optimizer; batch {step['batch']}), best of {step['rounds']}"]
    titles = {
        "plain": "plain network",
        "two_convolutions": "RefConv as two PyTorch convolutions",
        "ours": "RefConv with this library",
    }
    for name, title in titles.items():
        ms = step["ms"][name]
        lines.append(f"{title:<36}{ms:8.2f} ms {ms / step['ms']['plain']:7.2f} x plain")
    plural = "" if machine["threads"] == 1 else "s"
    lines.append(f"on {machine['cpu']}, {machine['threads']} thread{plural}, torch {machine['torch']}")
    if machine["native_kernels_off"]:
        lines.append(f"(this library's kernels are off: {machine['native_kernels_off']})")
    gradients, folding = step["gradient_difference"], fold["max_logit_difference"]
    lines += [
        "",
        "Checked",
        "- both RefConv formulations: same loss, same gradients (relative difference "
        + ", ".join(f"{value:.1g} in {dtype}" for dtype, value in gradients.items())
        + ")",
        f"- folded network: same logits as before folding (largest difference {folding:.1g}), "
        f"{fold['changed_predictions']} predictions changed",
        "- folded weights, loaded into the original architecture (strict): bit-identical outputs",
        "",
        "Wrote " + ", ".join(results["files"]),
    ]
    return "\n".join(lines)
