"""The README's numbers, written from the default profile's records."""

import re

import pandas as pd

from ff_utils import claims, files, paths, reference, results, study
from ff_utils.arms import ARMS
from ff_utils.datasets import TITLES
from ff_utils.live_bytes import format_bytes

NOTEBOOKS = (
    "01_algorithm_walkthrough",
    "02_ff_training",
    "03_ff_language_model",
    "04_backprop_baseline",
    "05_memory_profiling",
    "06_figures",
    "07_every_form",
    "08_sweeps",
    "09_one_setting",
    "10_past_one_machine",
)
FORMS = {
    "unsupervised": "a softmax on layers that learned without labels",
    "recurrent_all": "recurrent",
    "local": "local receptive fields",
    "jittered": "shifted images",
    "local_jittered": "local receptive fields and shifted images",
}
FLAT = ("ff_streamed", "backprop_streamed", "ff_frugal", "backprop_streamed_frugal")


def tables() -> dict[str, str]:
    """The generated blocks of README by name: findings, results, claims, time."""
    records = {name: results.read(name, "default") for name in NOTEBOOKS}
    return {
        "caption": _caption(records),
        "findings": _findings(records),
        "results": _results(records),
        "claims": _claims(records),
        "time": _time(records),
    }


def filled(text: str) -> str:
    """`text` with what stands between `<!-- NAME -->` and `<!-- end NAME -->` made anew."""
    for name, block in tables().items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)"
        if not re.search(pattern, text, flags=re.DOTALL):
            raise ValueError(f"README.md has no place marked <!-- {name} -->; put it back.")
        text = re.sub(
            pattern, lambda found, b=block: f"{found[1]}{b}\n{found[2]}", text, flags=re.DOTALL
        )
    return text


def write_tables() -> None:
    """Fill README.md from the records."""
    path = paths.ROOT / "README.md"
    files.write_atomically(path, filled(path.read_text(encoding="utf-8")))


def _on_gpu(records: dict[str, dict]) -> pd.DataFrame:
    simulated = records["05_memory_profiling"]["metrics"]["simulated"]
    return reference.compared(pd.DataFrame(simulated))


def _caption(records: dict[str, dict]) -> str:
    found = _on_gpu(records)
    memory = records["05_memory_profiling"]["metrics"]
    frugal = max(r["peak_bytes"] for r in memory["simulated"] if r["arm"] == "backprop_frugal")
    more = results.less(1 - memory["at_equal_images"]["ff_resident"]["peak_bytes"] / frugal)
    rows = (
        "2000 units and 5000 rows a step; FF's rows are half positive, half negative, so of 2500 "
        f"images, its negatives given. On as many images FF needs {more} than the best remedies."
    )
    if found.empty:
        return f"Lines: simulated tensor by tensor, {rows} No GPU has measured them yet."
    return (
        f"Lines: simulated tensor by tensor, {rows} Circles: the peak of {found.gpu.iloc[0]}'s "
        "allocator, with its rounding and cuBLAS's workspace."
    )


def _findings(records: dict[str, dict]) -> str:
    ff, language, backprop, memory = (records[name]["metrics"] for name in NOTEBOOKS[1:5])
    slopes = {arm: slope / 1e6 for arm, slope in memory["slopes"].items()}
    peaks = {(row["arm"], row["depth"]): row["peak_bytes"] for row in memory["simulated"]}
    depth = max(depth for _, depth in peaks)
    shallow = min(depth for _, depth in peaks)
    first = format_bytes(peaks["ff_seed", shallow])
    frugal, equal = peaks["backprop_frugal", depth], memory["at_equal_images"]
    as_many = {arm: found["slope"] / 1e6 for arm, found in equal.items()}
    remedies = 1 - peaks["ff_resident", depth] / frugal
    streamed = {row["arm"]: row for row in memory["streamed"]}
    deepest = next(name for name in reversed(memory["streamed"][0]) if "layers" in name)
    flat = [streamed[ARMS[arm].title][deepest] for arm in FLAT]
    timed = {row["arm"]: row for row in memory["timed"]}
    other, layerwise = timed["backprop_streamed"], timed["ff_layerwise"]
    slower = other["per_1000_images"] / layerwise["per_1000_images"]
    traffic = other["moved_bytes"] / other["images"] * layerwise["images"]
    traffic /= layerwise["moved_bytes"]
    crossings = memory["seed_crossings"]
    plain = crossings["backprop"]
    caught = f"from {plain} layers on" if plain else f"at no depth up to {depth}"
    errors = ff["test_error"], backprop["test_error"]
    final = [metrics["history"][-1]["error"] for metrics in (ff, backprop)]
    low, high = backprop["ff_time_ratio_range"]
    kept = ff["kept_inputs"]
    deviation = sum(e * (1 - e) / records["02_ff_training"]["data"]["test"] for e in errors) ** 0.5
    apart = abs(errors[0] - errors[1]) > 2 * deviation
    ranks = records["10_past_one_machine"]["metrics"]
    full = {
        "FF": _full_length(records, "supervised"),
        "backprop": _full_length(records, "backprop"),
    }
    reached = "it reaches the paper's accuracy"
    if full["FF"][0] > study.STUDIES["supervised"].paper:
        reached = "it stays behind the paper's accuracy"
    verdict = "a difference" if apart else "no more than one seed's test set can tell apart"
    lines = [
        f"**FF saves activations, not weights.** At 2000 units and 5000 rows a step, a layer costs "
        f"plain backprop {slopes['backprop']:.0f} MB and FF {slopes['ff_resident']:.0f} MB "
        f"(10^6 bytes), its negatives given; at {depth} layers FF needs "
        f"{memory['saved_at_last_depth']:.0%} less. As it is trained here a softmax first guesses "
        "the class, so that plausible wrong labels (*hard* negatives) can be drawn. On as many "
        f"images as backprop's that makes {as_many['ff_hard_negatives']:.0f} MB a layer where the "
        f"guess's activations are kept, and {as_many['ff_hard_negatives_recomputed']:.0f} MB, to "
        "the same bits, where they are computed again.",
        f"**So do backprop's remedies.** Activations on the host and an optimizer in the backward "
        f"pass bring backprop to {slopes['backprop_frugal']:.0f} MB a layer too; at {depth} layers "
        f"FF needs {results.less(remedies)} than that for as many rows, and "
        f"{results.less(1 - equal['ff_resident']['peak_bytes'] / frugal)} for as many images.",
        f"**One layer at a time, memory is flat, for both.** With the other layers on the host, FF "
        f"and backprop need {flat[0]:.0f} and {flat[1]:.0f} MB for as many rows at "
        f"{deepest.removesuffix(' (MB)')}; with rows in parts that rest there too, {flat[2]:.0f} "
        f"and {flat[3]:.0f} MB.",
        f"**What is FF's alone is to finish one layer before the next.** Its weights then come and "
        f"go once in all its epochs. For as many images streamed backprop moves {traffic:.1f} "
        f"times the bytes and takes {slower:.2f} times as long, on a CPU whose host is files. "
        "The price: the data set's activations are kept, of one layer at a time, and negatives are "
        f"random ones, drawn once. In a short run of two layers that errs on {kept['kept']:.1%}, "
        f"where FF with hard negatives errs on {kept['joint']:.1%}.",
        f"**The seed's FF starts high.** It caches the data set's activations on the device, "
        f"{first} with two layers. It becomes leaner than the seed's own baseline "
        f"({slopes['backprop_seed']:.0f} MB a layer, for its normalisation layers) from "
        f"{crossings['backprop_seed']} layers on, and than a plain backprop network {caught}. Its "
        f"recurrent network needs {slopes['ff_recurrent']:.0f} MB a layer.",
        f"**It costs time.** An epoch takes {backprop['ff_time_ratio']:.2f} times as long as "
        f"backprop's ({low:.2f} to {high:.2f} by round, the two taking turns). After as many of "
        f"them FF errs on {errors[0]:.2%} of MNIST's test images and {final[0]:.2%} of the "
        f"validation images, backprop on {errors[1]:.2%} and {final[1]:.2%}: {verdict}.",
        f"**Trained for long, {reached}.** {full['FF'][1].capitalize()}: FF "
        f"{full['FF'][0]:.2%} (Hinton's, of 4x2000 units: 1.36%); {full['backprop'][1]}: backprop "
        f"{full['backprop'][0]:.2%}, the same three layers of 1000 units and dropout of pixels, no "
        f"augmentation.{_other_forms(records)}",
        f"**It extends to text.** Perplexity on held-out fables: FF "
        f"{language['perplexity']:.2f}, the same network by backprop "
        f"{language['backprop_perplexity']:.2f}, n-grams "
        f"{language['ngram_perplexity']:.2f}.",
        f"**Its layers train apart.** Two processes of one thread each, half of the layers in "
        f"each, train {ranks['speed_up']:.2f} times as fast as one such process, to the same bits, "
        "with random negatives.",
    ]
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))


def _full_length(records: dict[str, dict], name: str) -> tuple[float, str]:
    """Mean test error of a study's runs, and in words how many runs of how many epochs."""
    runs = [r for r in records["07_every_form"]["metrics"]["full_length"] if r["study"] == name]
    count = f"one run of {runs[0]['epochs']} epochs"
    if len(runs) > 1:
        count = f"{len(runs)} runs of {runs[0]['epochs']} epochs, on average"
    return sum(run["error"] for run in runs) / len(runs), count


def _other_forms(records: dict[str, dict]) -> str:
    errors = records["07_every_form"]["metrics"]["mean_errors"]
    told = [f"{words} {errors[name]:.2%}" for name, words in FORMS.items() if name in errors]
    return f" Other forms: {', '.join(told)}." if told else ""


def _results(records: dict[str, dict]) -> str:
    ff, language, backprop, memory = (records[name]["metrics"] for name in NOTEBOOKS[1:5])
    seven = {r["arm"]: r["peak_bytes"] for r in memory["simulated"] if r["depth"] == 7}
    deepest = max(row["depth"] for row in memory["simulated"])
    deep = {r["arm"]: r["peak_bytes"] for r in memory["simulated"] if r["depth"] == deepest}
    trained = records["02_ff_training"]
    sizes = "x".join(map(str, trained["parameters"]["hidden"]))
    epochs = trained["parameters"]["epochs"]
    seconds = backprop["seconds_an_epoch"]
    full = {name: _full_length(records, name) for name in ("supervised", "backprop")}
    lengths = [f"{name} {full[key][1]}" for key, name in zip(full, ("FF", "backprop"), strict=True)]
    lines = [
        "| | FF | backprop |",
        "|---|---|---|",
        f"| MNIST test error, {sizes}, {epochs} epochs | {ff['test_error']:.2%} by softmax, "
        f"{ff['test_error_by_goodness'][-1]:.2%} by goodness | {backprop['test_error']:.2%} |",
        f"| at full length: {', '.join(lengths)} | {full['supervised'][0]:.2%} | "
        f"{full['backprop'][0]:.2%} |",
        f"| seconds an epoch, the two taking turns | {seconds['FF']:.1f} | "
        f"{seconds['backprop']:.1f} |",
        f"| perplexity on held-out fables | {language['perplexity']:.2f} | "
        f"{language['backprop_perplexity']:.2f} |",
        "",
        f"| peak memory of a step, 2000 units, 5000 rows | a layer | 7 layers | {deepest} layers |",
        "|---|---|---|---|",
    ]
    for arm, slope in memory["slopes"].items():
        lines.append(
            f"| {ARMS[arm].title} | {slope / 1e6:.0f} MB | {seven[arm] / 1e6:,.0f} MB | "
            f"{deep[arm] / 1e6:,.0f} MB |"
        )
    made = trained["provenance"]
    data = trained["data"]
    real = records["05_memory_profiling"]["parameters"]
    lines += [
        "",
        f"Measured with: {made['device']}, {made['threads']} threads, {made['machine']} "
        f"{made['system']}, torch {made['torch']}; {TITLES[data['name']]} (sha256 "
        f"{data['checksum'][:12]}), {data['train']:,} training images of which a sixth validates; "
        f"seed {trained['parameters']['seed']}. MB is 10^6 bytes. Memory is simulated; simulation "
        f"and tracked run agree to the byte at {real['real_hidden']} units, {real['real_batch']} "
        f"rows, {', '.join(map(str, real['real_depths']))} layers. FF's rows are half positive, "
        "half negative, so that its 5000 rows are 2500 images; on 5000 images "
        f"{deepest} layers of FF, analytic step, need "
        f"{memory['at_equal_images']['ff_resident']['peak_bytes'] / 1e6:,.0f} MB.",
    ]
    return "\n".join([*lines, *_gpu_results(records)])


def _gpu_results(records: dict[str, dict]) -> list[str]:
    """The deepest points that a GPU has measured, beside the simulated ones."""
    found = _on_gpu(records)
    if found.empty:
        return []
    deepest = found[found.depth == found.depth.max()]
    where = f"{found.gpu.iloc[0]}, {found.depth.max()} layers"
    lines = [
        "",
        f"| {where} | simulated | allocator's peak | a step |",
        "|---|---|---|---|",
    ]
    for row in deepest.itertuples():
        lines.append(
            f"| {ARMS[row.arm].title} | {row.simulated / 1e6:,.0f} MB | "
            f"{row.measured / 1e6:,.0f} MB | {1000 * row.seconds:,.0f} ms |"
        )
    return [*lines, "", reference.about(found)]


def _claims(records: dict[str, dict]) -> str:
    table = claims.judge(records)
    lines = ["| claim | source | claimed | measured | verdict | why |", "|---|---|---|---|---|---|"]
    for row in table.itertuples():
        lines.append(
            f"| {row.claim} | {row.source} | {row.claimed} | {row.measured} | **{row.verdict}** "
            f"| {row.why} |"
        )
    return "\n".join(lines)


def _time(records: dict[str, dict]) -> str:
    made = records["02_ff_training"]["provenance"]
    minutes = sum(r["provenance"]["wall_seconds"] for r in records.values()) / 60
    test_error = records["02_ff_training"]["metrics"]["test_error"]
    other = records["04_backprop_baseline"]["metrics"]["test_error"]
    return "\n".join(
        [
            "| hardware | profile | notebooks take | expect on MNIST |",
            "|---|---|---|---|",
            "| any laptop | smoke | under 3 minutes | nothing: digits and tiny networks |",
            f"| {made['threads']} CPU cores | default | {minutes:.0f} minutes | FF "
            f"about {test_error:.1%}, backprop about {other:.1%} |",
            "| a GPU | paper | not measured yet | not measured yet |",
            _gpu_time(),
        ]
    )


def _gpu_time() -> str:
    trained = reference.table("training").dropna(subset="test_error").set_index("arm")
    if trained.empty:
        return "| a GPU | `make gpu-reference` | 10 minutes | not measured yet |"
    errors = ", ".join(f"{ARMS[a].title} {e:.1%}" for a, e in trained.test_error.items())
    return f"| {trained.gpu.iloc[0]} | `make gpu-reference` | 10 minutes | {errors} |"
