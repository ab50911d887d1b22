"""A profile as a page to look at, and as a file for PyTorch's memory viewer."""

import html
import json
import pickle
from pathlib import Path

from ff_utils.memory.profile import Profile
from ff_utils.memory.tracker import CATEGORIES
from ff_utils.utils import HOST, format_bytes

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = dict(
    zip(CATEGORIES, ("#0072B2", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#999999"), strict=True)
)
POINTS = 1500  # of the picture; of the operations in between, the one with most bytes
WIDTH, HEIGHT = 1000, 420

PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body{{font:14px sans-serif;max-width:1040px;margin:24px auto}}td{{padding:2px 12px}}
td+td{{text-align:right}}pre{{height:3em}}i{{display:inline-block;width:12px;height:12px}}</style>
<h2>{title}</h2><p>Training peak {peak}, in the {phase} of {module} ({operation}). Live bytes by
category after each of {count} operations; the line marks the peak.</p><p>{legend}</p>
<svg viewBox="0 0 {width} {height}" width="100%" role="img" aria-label="live bytes over the step">
{areas}<line x1="{x}" x2="{x}" y2="{height}" stroke="#000" stroke-dasharray="4"/></svg>
<pre id="at">Point at the picture.</pre><table><tr><td>at the peak<td>bytes</tr>{rows}</table>
<script>const points={points};const svg=document.querySelector("svg");svg.onmousemove=e=>{{
const box=svg.getBoundingClientRect(),n=points.length-1;
const at=Math.round((e.clientX-box.left)/box.width*n);
document.getElementById("at").textContent=points[Math.max(0,Math.min(n,at))].join("\\n")}}</script>
"""


def timeline_html(profile: Profile, title: str) -> str:
    """A page without any other file: live bytes over one step, and what the peak is made of."""
    live = [sizes for _, sizes in profile.timeline]
    totals = [sum(sizes[c] for c in CATEGORIES) for sizes in live]
    stride = max(1, -(-len(live) // POINTS))
    starts = range(0, len(live), stride)
    shown = [max(range(s, min(s + stride, len(live))), key=totals.__getitem__) for s in starts]
    top = max(totals)
    across = [WIDTH * i / max(1, len(shown) - 1) for i in range(len(shown))]
    below, areas = [0] * len(shown), []
    for category in CATEGORIES:
        above = [base + live[i][category] for base, i in zip(below, shown, strict=True)]
        edge = [*zip(across, above, strict=True), *reversed(list(zip(across, below, strict=True)))]
        path = " ".join(f"{x:.1f},{HEIGHT * (1 - y / top):.1f}" for x, y in edge)
        areas.append(f'<polygon points="{path}" fill="{COLOURS[category]}"/>')
        below = above
    points = [
        [
            f"{format_bytes(totals[i])} after {profile.timeline[i][0]} ({profile.running[i]})",
            ", ".join(f"{_words(c)} {format_bytes(live[i][c])}" for c in CATEGORIES if live[i][c]),
        ]
        for i in shown
    ]
    rows = "".join(
        f"<tr><td>{html.escape(module)}<td>{format_bytes(sum(parts.values()))}</tr>"
        for module, parts in profile.by_module.items()
    )
    phase, module, operation = (html.escape(part) for part in profile.where)
    return PAGE.format(
        title=html.escape(title),
        peak=format_bytes(profile.peak_bytes),
        phase=phase,
        module=module,
        operation=operation,
        count=len(live),
        legend=" ".join(f'<i style="background:{COLOURS[c]}"></i> {_words(c)}' for c in CATEGORIES),
        width=WIDTH,
        height=HEIGHT,
        areas="".join(areas),
        x=round(across[max(range(len(shown)), key=lambda n: totals[shown[n]])], 1),
        rows=rows,
        points=json.dumps(points).replace("<", "\\u003c"),
    )


def _words(category: str) -> str:
    return category.replace("_", " ")


def snapshot(profile: Profile) -> dict[str, list]:
    """The step as `torch.cuda.memory._snapshot` has it: one trace of allocations, one segment.

    Addresses are made up; a freed one is used again for the same size. What was there before
    the step is allocated at the trace's beginning. Host memory is left out.
    """
    # The viewer fails on categories without one of this name.
    marker = {"action": "alloc", "addr": 0, "size": 0, "stream": 0, "frames": []}
    trace: list[dict] = [marker | {"category": "unknown"}]
    trace += [marker | {"action": action} for action in ("free_requested", "free_completed")]
    free: dict[int, list[int]] = {}
    blocks: dict[int, dict] = {}  # live ones, by storage
    end = 0
    for event in profile.events:
        if event.category == HOST or not event.bytes:
            continue
        if event.bytes < 0:
            block = blocks.pop(event.number)
            free.setdefault(block["size"], []).append(block["addr"])
            for action in ("free_requested", "free_completed"):
                trace.append({k: block[k] for k in marker} | {"action": action})
            continue
        reusable = free.get(event.bytes)
        address = reusable.pop() if reusable else end
        end = max(end, address + event.bytes)
        name = f"{event.operation or 'before the step'} ({_words(event.category)})"
        frames = [{"filename": event.module, "line": 0, "name": name}]
        block = marker | {"addr": address, "size": event.bytes, "frames": frames}
        block["category"] = event.category
        blocks[event.number] = block
        trace.append(block)
    segment = {"device": 0, "address": 0, "total_size": end, "stream": 0, "segment_type": "large"}
    segment |= {"allocated_size": sum(block["size"] for block in blocks.values()), "blocks": []}
    segment["active_size"] = segment["allocated_size"]
    at = 0
    for block in sorted(blocks.values(), key=lambda block: block["addr"]):
        if block["addr"] > at:
            segment["blocks"].append({"size": block["addr"] - at, "state": "inactive"})
        segment["blocks"].append(
            {
                "size": block["size"],
                "requested_size": block["size"],
                "state": "active_allocated",
                "frames": block["frames"],
            }
        )
        at = block["addr"] + block["size"]
    if at < end:
        segment["blocks"].append({"size": end - at, "state": "inactive"})
    return {"segments": [segment], "device_traces": [trace]}


def write_snapshot(profile: Profile, path: Path) -> None:
    """Write `snapshot` to a file; open it at pytorch.org/memory_viz."""
    # The viewer reads pickles up to this protocol.
    path.write_bytes(pickle.dumps(snapshot(profile), protocol=4))
