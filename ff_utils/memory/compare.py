"""A network's training step under every remedy, as a table: which of them is worth having?

`python -m ff_utils.memory --network FILE.py:BUILDER --batch 64` prints it.
"""

import argparse
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import partial

import pandas as pd
import torch
from torch.utils._pytree import tree_map_only

from ff_utils.ff.blocks import batch_rows, find_blocks
from ff_utils.memory import pictures
from ff_utils.memory.measure import finish
from ff_utils.memory.profile import Profile, StepTracker, profile, watch
from ff_utils.memory.remedies import CHOICES, PLAIN, Remedies, TrainingStep, large_head
from ff_utils.memory.simulation import CannotSimulateError, build, explained, simulating
from ff_utils.optimizers import TORCH_OPTIMIZERS
from ff_utils.utils import check_choice, default_device, format_bytes, track, user_path

LARGEST_BATCH = 2**24
ENOUGH_SECONDS = 10.0  # of steps that are timed
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def compare(
    builder: Callable[..., object],
    *,
    rows: int | None = None,
    blocks: list[str] | None = None,
    optimizer: str = "adam",
    budget: int | None = None,
    only: Sequence[str] = (),
) -> pd.DataFrame:
    """Every choice of `remedies.CHOICES` for one network, simulated; one row each.

    builder, rows, blocks, optimizer: as in `profile.profile`. budget: bytes on the device. only:
    names of choices, beside the plain step, instead of all.
    Columns: choice, peak_bytes, host_bytes, saved (share of the plain step's peak), flops,
    arithmetic (flops by the plain step's), phase and module (what runs at the peak), largest
    (module and category of the peak's largest part), note (why there is no number), and with a
    budget fits and largest_batch. A builder of a step gives one row.
    """
    kind = {"blocks": blocks, "optimizer": optimizer}
    choices = choices_for(builder, rows, blocks)
    if only:
        choices = {n: c for n, c in choices.items() if c[0] == PLAIN or n in only}
    flops: dict[Remedies, int | None] = {}
    table = []
    for name, (remedies, note) in choices.items():
        row = {"choice": name, "note": note}
        table.append(row)
        if note:
            continue
        same = Remedies(  # these alone change the arithmetic
            checkpoint=remedies.checkpoint, chunked=remedies.chunked, local=remedies.local
        )
        try:
            found = profile(builder, rows=rows, remedies=remedies, short=same in flops, **kind)
            if budget:
                row["fits"] = found.peak_bytes <= budget
                row["largest_batch"] = None  # a step's batch is its own
                if len(choices) > 1:
                    row["largest_batch"] = largest_batch(builder, budget, remedies=remedies, **kind)
        except Exception as error:
            if isinstance(error, CannotSimulateError) or remedies == PLAIN:
                raise
            row["note"] = (str(error).splitlines() or [type(error).__name__])[0]
            continue
        flops.setdefault(same, found.flops)
        row |= _numbers(found) | {"flops": flops[same]}
    rows_of = pd.DataFrame(table)
    plain = rows_of.iloc[0]
    rows_of["saved"] = 1 - rows_of.peak_bytes / plain.peak_bytes
    rows_of["arithmetic"] = rows_of.flops / plain.flops
    return rows_of


def measure_choices(
    builder: Callable[..., object],
    *,
    rows: int | None = None,
    blocks: list[str] | None = None,
    optimizer: str = "adam",
    repeats: int = 3,
) -> pd.DataFrame:
    """Every choice run for real, on this machine's GPU or else its CPU; one row each.

    Arguments as in `compare`. Columns: choice, device, peak_bytes (the allocator's on a GPU, live
    tensors on a CPU), seconds (of a step, the least of `repeats`, or of as many as take
    ENOUGH_SECONDS), per_second (samples), note (why there is no number, such as a lack of memory).
    """
    device = default_device()
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    slow = device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    table = []
    for choice, (remedies, note) in track(
        list(choices_for(builder, rows, blocks).items()), "choice"
    ):
        if slow and remedies.autocast:
            note = "this CPU has no arithmetic in bfloat16: a step would take minutes"
        table.append({"choice": choice, "device": name, "note": note})
        if note:
            continue
        try:
            module, batch, loss = build(builder, rows=rows)
            module.to(device)
            batch = tree_map_only(torch.Tensor, lambda t: t.to(device), batch)
            kind = {"network_loss": loss, "blocks": blocks, "optimizer": optimizer}
            step = TrainingStep(module, remedies, **kind)
            table[-1] |= _measured(partial(step, *batch), module, device, repeats)
            samples = batch_rows(batch)
            table[-1]["per_second"] = samples / table[-1]["seconds"]
        except (RuntimeError, MemoryError, ValueError, IndexError) as error:
            table[-1]["note"] = (str(error).splitlines() or [type(error).__name__])[0]
        finally:
            module = batch = loss = step = None
            if device == "cuda":
                torch.cuda.empty_cache()
    columns = ["choice", "device", "peak_bytes", "seconds", "per_second", "note"]
    return pd.DataFrame(table, columns=columns)


def _measured(
    step: Callable[[], object], module: torch.nn.Module, device: str, repeats: int
) -> dict[str, float]:
    """Peak and seconds of a step, after one that is not counted."""
    if device == "cpu":
        peak = watch(step, module=module, count=False).peak_bytes
    else:
        finish(step, device)
        torch.cuda.reset_peak_memory_stats()
        finish(step, device)
        peak = torch.cuda.max_memory_allocated()
    seconds = []
    while len(seconds) < repeats and sum(seconds) < ENOUGH_SECONDS:
        start = time.perf_counter()
        finish(step, device)
        seconds.append(time.perf_counter() - start)
    return {"peak_bytes": peak, "seconds": min(seconds)}


def _numbers(found: Profile) -> dict[str, object]:
    phase, module, _ = found.where
    largest, category, size = found.largest()
    return {
        "peak_bytes": found.peak_bytes,
        "host_bytes": found.host_bytes,
        "phase": phase,
        "module": module,
        "largest": f"{largest}: {category.replace('_', ' ')}, {format_bytes(size)}",
    }


def choices_for(
    builder: Callable[..., object], rows: int | None, blocks: list[str] | None = None
) -> dict[str, tuple[Remedies, str]]:
    """The choices for a network, each with why it is none (empty if it is one).

    ValueError for `blocks` that it does not have.

    Where the logits are large, all but "as it is" compute the loss in chunks.
    """
    with simulating(), explained(lambda: "what builds it"):
        built = build(builder, rows=rows)
    if not isinstance(built, tuple):
        return {"as it is": (PLAIN, "")}
    module, batch, loss = built
    if blocks:
        find_blocks(module, blocks)
    samples = batch_rows(batch)
    chunks = large_head(module) is not None and loss is None and not isinstance(batch[0], dict)
    found = {}
    for name, remedies in CHOICES.items():
        if name == "loss in chunks" and not chunks:
            continue
        note = "one sample can't be split" if remedies.micro_batches > 1 and samples < 2 else ""
        chunked = chunks and name != "as it is"
        found[name] = replace(remedies, chunked=chunked), note
    return found


def largest_batch(
    builder: Callable[..., object],
    budget: int,
    *,
    remedies: Remedies = PLAIN,
    blocks: list[str] | None = None,
    optimizer: str = "adam",
) -> int:
    """The most rows whose training step fits into `budget` bytes; 0 if not even one does.

    By bisection; peaks are nearly linear in the rows, so that each try is where a line through
    the last two says.
    """
    with simulating(), StepTracker() as tracker:
        module, batch, loss = build(builder)
        step = TrainingStep(
            module, remedies, network_loss=loss, blocks=blocks, optimizer=optimizer, short=True
        )
        rows = batch_rows(batch)
        shapes = tree_map_only(torch.Tensor, lambda t: t.to("meta"), batch)
        del batch
        tracker.hold(module)

        def peak(samples: int) -> int:
            def make(t: torch.Tensor) -> torch.Tensor:
                shape = (samples, *t.shape[1:]) if t.dim() and len(t) == rows else t.shape
                return torch.empty(shape, dtype=t.dtype, device="cpu")

            inputs = tree_map_only(torch.Tensor, make, shapes)
            tracker.restart()
            step(*inputs)
            return tracker.peak_bytes

        least = 2 if remedies.micro_batches > 1 else 1
        peak(least)  # makes the optimizer's state
        return bisect(peak, budget, least)


def bisect(peak: Callable[[int], int], budget: int, least: int = 1) -> int:
    """The largest number whose `peak` is at most `budget`; 0 if that of `least` is not."""
    low, at_low, high = least, peak(least), LARGEST_BATCH
    if at_low > budget:
        return 0
    guess = 2 * low
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        size = peak(guess)
        slope = max(1.0, (size - at_low) / (guess - low))
        if size <= budget:
            low, at_low = guess, size
        else:
            high = guess
        guess = min(low + int((budget - at_low) / slope), 64 * low)
        if high < LARGEST_BATCH and not low < guess < high:
            guess = low + 1 if guess <= low else high - 1
    return low


# --- Command line ---------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """The memory of your own network's training step under every remedy."""
    parser = argparse.ArgumentParser(prog="python -m ff_utils.memory", description=main.__doc__)
    parser.add_argument(
        "--network",
        required=True,
        metavar="FILE.py:BUILDER",
        help="a function that returns (module, batch), (module, batch, loss) or a step",
    )
    parser.add_argument("--batch", type=int, help="rows (default: the builder's own)")
    parser.add_argument("--blocks", help="names of its blocks, by commas (default: found)")
    parser.add_argument("--optimizer", default="adam", help="adam, adam_8bit or sgd")
    parser.add_argument("--budget", help="memory on the device, such as 8GB: what fits?")
    parser.add_argument("--real", action="store_true", help="run the plain step, don't simulate")
    parser.add_argument(
        "--measure", action="store_true", help="run every choice on this machine's GPU or CPU"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, in bytes")
    parser.add_argument("--timeline", metavar="FILE.html", help="the plain step, as a picture")
    parser.add_argument("--snapshot", metavar="FILE.pickle", help="for PyTorch's memory viewer")
    options = parser.parse_args(arguments)
    try:
        with redirect_stdout(sys.stderr):  # what the user's own code prints
            plain, table = _answer(options)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except (Exception, SystemExit) as error:  # of the user's own code
        first = (str(error).splitlines() or ["no message"])[0]
        parser.exit(2, f"error: {options.network} raised {type(error).__name__}: {first}\n")
    if options.json:
        rows = [] if table is None else json.loads(table.to_json(orient="records"))
        print(json.dumps(rows if plain is None else _as_json(options.network, plain, rows)))
    elif plain is None:
        _print_measured(options.network, table)
    else:
        _print(options.network, plain, table)


def _answer(options: argparse.Namespace) -> tuple[Profile | None, pd.DataFrame | None]:
    """The plain step's profile and the table, or None and the table of what was measured."""
    if options.batch is not None and options.batch < 1:
        raise ValueError(f"--batch is {options.batch}: it must be at least 1.")
    check_choice("--optimizer", options.optimizer, TORCH_OPTIMIZERS)
    for path in filter(None, (options.timeline, options.snapshot)):
        if not user_path(path).parent.is_dir() or user_path(path).is_dir():
            raise ValueError(f"{path} can't be written: give a file in a folder that exists.")
    budget = parse_bytes(options.budget) if options.budget else None
    builder = load_builder(options.network)
    blocks = options.blocks.split(",") if options.blocks else None
    kind = {"rows": options.batch, "optimizer": options.optimizer}
    if options.measure:
        return None, measure_choices(builder, blocks=blocks, **kind)
    plain = profile(builder, simulate=not options.real, **kind)
    if options.timeline:
        user_path(options.timeline).write_text(pictures.timeline_html(plain, options.network))
    if options.snapshot:
        pictures.write_snapshot(plain, user_path(options.snapshot))
    if options.real:
        return plain, None
    return plain, compare(builder, blocks=blocks, budget=budget, **kind)


def _print_measured(network: str, table: pd.DataFrame) -> None:
    print(f"{network}, measured on {table.device[0]}\n")
    print(f"{'':46}{'peak':>9}{'step':>10}{'a second':>10}")
    for row in table.itertuples():
        if row.note:
            print(f"{row.choice:46}{'-':>9}  {row.note}")
        else:
            print(f"{row.choice:46}{format_bytes(row.peak_bytes):>9}", end="")
            print(f"{row.seconds:>8.3f} s{row.per_second:>10,.1f}")


def load_builder(place: str) -> Callable[..., object]:
    """The function that "FILE.py:NAME" names."""
    file, colon, name = place.rpartition(":")
    if not colon or not name.isidentifier():
        raise ValueError(f"--network is {place!r}: write FILE.py:BUILDER.")
    path = user_path(file)
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"--network: there is no Python file {file}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # as dataclasses and pickle want it
    sys.path.append(str(path.parent))  # for what the file imports from its own folder
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        known = [n for n, value in vars(module).items() if callable(value)]
        raise ValueError(f"--network: {file} has no function {name!r}; it has {', '.join(known)}.")
    return getattr(module, name)


def parse_bytes(text: str) -> int:
    """Bytes of "8GB", "500 MB" or "2e9"."""
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:e\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"--budget is {text!r}: write it as 8GB or 500MB.")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _as_json(network: str, plain: Profile, rows: list[dict]) -> dict:
    fields = asdict(replace(plain, timeline=[], running=[], events=[]))
    for name in ("timeline", "running", "events"):
        del fields[name]
    return {"network": network, **fields, "choices": rows}


def _print(network: str, plain: Profile, table: pd.DataFrame | None) -> None:
    phase, module, operation = plain.where
    print(f"{network} ({plain.instrument}): training peak {format_bytes(plain.peak_bytes)}", end="")
    if plain.evaluation_peak_bytes is not None:
        print(f", evaluation {format_bytes(plain.evaluation_peak_bytes)}", end="")
    print(f"\nThe peak is in the {phase} of {module} ({operation}). It holds:\n")
    for category, size in plain.by_category.items():
        print(f"  {category.replace('_', ' '):18}{format_bytes(size):>10}")
    print()
    for name, parts in list(plain.by_module.items())[:8]:
        print(f"  {name:32}{format_bytes(sum(parts.values())):>10}")
    if table is None:
        return
    budget = "largest_batch" in table
    print(f"\n{'':46}{'peak':>9}{'host':>9}{'saved':>7}{'arith.':>8}", end="")
    print(f"{'fits':>6}{'batch':>9}" if budget else "", " where the peak is")
    best = table[table.choice.map(_is_remedy)].peak_bytes.min()
    for row in table.itertuples():
        if row.note:
            print(f"{row.choice:46}{'-':>9}  {row.note}")
            continue
        mark = " *" if row.peak_bytes == best and _is_remedy(row.choice) else ""
        print(f"{row.choice + mark:46}{format_bytes(row.peak_bytes):>9}", end="")
        print(f"{format_bytes(row.host_bytes):>9}{row.saved:>7.0%}{row.arithmetic:>7.2f}x", end="")
        if budget:
            batch = "-" if pd.isna(row.largest_batch) else f"{row.largest_batch:,.0f}"
            print(f"{'yes' if row.fits else 'no':>6}{batch:>9}", end="")
        print(f"  {row.phase} of {row.module} ({row.largest})")
    print("\n* the best combination of remedies that compute the same gradients")
    print("Not seen: what a kernel takes and frees inside itself, such as a GPU's workspaces.")


def _is_remedy(choice: str) -> bool:
    return not choice.startswith(("as it is", "block by block", "bfloat16"))
