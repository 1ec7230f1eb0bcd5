"""What a GPU spends a training step on, by kind of kernel, beside what was calculated without one.

    python -m scripts.benchmarks.gpu profile OUT     writes OUT/profile.json
    python -m scripts.benchmarks.gpu page OUT        writes OUT/README.md of what is in OUT

`scripts/on_gpu.sh` runs both.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import torch

from scripts.benchmarks import speed, timing, training
from scripts.benchmarks.page import table
from utils.precision import autocast, set_precision
from utils.run.command_line import Parser, command, positive
from utils.run.logging import RECORDS, read_records

STAGES = "before", "after", "bfloat16_residual"  # of calculated.json
PAGE = Path(__file__).parents[2] / "docs" / "results" / "gpu"
MARKER = "<!-- from here on written by scripts/on_gpu.sh -->\n"
SHORT = 5.0  # microseconds; a reduction or pointwise kernel below it is a small finishing kernel
STEPS = 10  # timed by the clock


@command
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("profile", "page"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--case", choices=speed.CASES, default="bfloat16, compiled")
    parser.add_argument("--batch", type=positive, default=256)
    parser.add_argument("--image_size", type=positive, default=224)
    arguments = parser.parse_args()
    if arguments.what == "profile":
        results = profile(arguments.case, arguments.batch, arguments.image_size)
        (arguments.folder / "profile.json").write_text(json.dumps(results, indent=1) + "\n")
    else:
        prose = (PAGE / "README.md").read_text().partition(MARKER)[0]
        (arguments.folder / "README.md").write_text(prose + MARKER + page(arguments.folder))


def profile(case: str, batch: int, image_size: int) -> dict:
    """Seconds of a step by the clock, and launches and milliseconds of each kind of kernel."""
    options = {"teacher": training.TEACHER, **speed.CASES[case]}
    config = training.step2_config(image_size, batch_size=batch, **options)
    set_precision(config.precision)
    side = training.Side(config)
    clock = timing.interleaved({"step": side.step}, STEPS)["step"]
    kernels = defaultdict(lambda: [0, 0.0])
    with autocast(timing.DEVICE, config.precision):
        logits, forward = traced(lambda: side.model(side.images))
        with torch.no_grad():
            _, teacher = traced(lambda: side.teacher(side.images))
    _, backward = traced(lambda: logits.backward(torch.ones_like(logits)))
    _, update = traced(side.optimizer.step)
    passes = {"forward": forward, "backward": backward, "teacher": teacher, "optimizer": update}
    other = []  # that no name gave away
    for graph, events in passes.items():
        for name, microseconds in events:
            which = kind(name, microseconds, graph) if graph in ("forward", "backward") else graph
            kernels[which][0] += 1
            kernels[which][1] += microseconds / 1e3
            if which == "other":
                other.append((graph, name, microseconds))
    return {
        "date": date.today().isoformat(),
        "machine": timing.accelerator(),
        "torch": torch.__version__,
        "case": case,
        "batch": batch,
        "step, ms": 1e3 * median(clock),
        "kinds": kernels,
        "other": other,
    }


def traced(run: Callable[[], object]) -> tuple[object, list[tuple[str, float]]]:
    """What `run` returns, and name and microseconds of each of the device's kernels in it."""
    with torch.profiler.profile() as profiler:
        result = run()
        timing.clock()  # waits for the device
    device = getattr(torch.autograd.DeviceType, timing.DEVICE.type.upper())
    events = [e for e in profiler.events() if e.device_type == device and not e.is_user_annotation]
    return result, [(event.name, event.time_range.elapsed_us()) for event in events]


def kind(name: str, microseconds: float, graph: str) -> str:
    """The kind that `calculated.json` counts a kernel to, by its name, time and pass.

    A convolution of the backward pass that is neither called dgrad nor wgrad counts as other.
    """
    if not name.startswith("triton"):
        is_own = name.startswith(("void at::", "Mem"))  # torch's, and copies
        passes = [which for which in ("dgrad", "wgrad") if which in name]
        passes = passes or ["forward"] * (graph == "forward" and not is_own)
        return f"convolution {passes[0]}" if passes else "other"
    if "_abs_" in name and not any(op in name for op in ("norm", "prelu", "addcmul", "clamp")):
        return "weight binarization"
    if microseconds < SHORT:
        return "small finishing kernels"
    if "triton_poi" in name:
        return f"pointwise {graph}"
    return "BN statistics" if graph == "forward" else "reductions"


def page(folder: Path) -> str:
    """Markdown: counted and calculated numbers, then all that was measured into `folder`."""
    calculated = json.loads((PAGE / "calculated.json").read_text())
    parts = []
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("speed-*/results.json"))]
    if runs:
        rows = [row for run in runs for row in run["rows"]]
        rows.sort(key=lambda row: (row["what"] != "step", row["batch"]))
        parts.append(speed.as_markdown(runs[0] | {"rows": rows, "loading": []}).strip())
    if (path := folder / "profile" / "profile.json").exists():
        parts.append(predicted_and_measured(calculated, json.loads(path.read_text())))
    if (path := folder / "workers" / "table.md").exists():
        parts.append(path.read_text().strip())
    if trained := sorted(folder.glob(f"training-*/{RECORDS}")):
        parts.append(table(map(training_line, trained)))
    measured = "\n\n".join(parts or ["Nothing has been measured yet."])
    return (
        f"\n## Counted, and calculated from it\n\n{counted(calculated)}\n\n"
        f"## Measured\n\n{measured}\n"
    )


def counted(calculated: dict) -> str:
    stages = [calculated[which]["student"]["kinds"] for which in STAGES]
    formats = {"launches": "{launches}", "MB/image": "{total:.1f}", "ms, calculated": "{ms:.2f}"}
    rows = [
        {"kind of kernel": name}
        | {
            column: " → ".join(text.format_map(kinds[name]) for kinds in stages)
            for column, text in formats.items()
        }
        for name in stages[0]
    ]
    return f"{calculated['source']}\n\n{table(rows)}"


def predicted_and_measured(calculated: dict, measured: dict) -> str:
    """Only those of a step as it was calculated can be compared; others stand alone."""
    after, kinds = calculated["after"]["student"]["kinds"], measured["kinds"]
    rows = [
        {
            "kind of kernel": name,
            "launches, counted": str(after[name]["launches"]) if name in after else "",
            "measured": str(kinds.get(name, (0, 0))[0]),
            "ms, calculated": f"{after[name]['ms']:.2f}" if name in after else "",
            "ms, measured": f"{kinds.get(name, (0, 0))[1]:.2f}",
        }
        for name in dict.fromkeys([*(name for name in after if name != "all"), *kinds])
    ]
    total = sum(milliseconds for _, milliseconds in kinds.values())
    return (
        f"A step, {measured['case']}, batch {measured['batch']}, {measured['date']},"
        f" {measured['machine']}, torch {measured['torch']}: {measured['step, ms']:.1f} ms by the"
        f" clock, {total:.1f} ms in kernels, with teacher and optimizer.\n\n{table(rows)}"
    )


def training_line(records: Path) -> dict[str, str]:
    history = read_records(records.parent)
    return {
        "run": records.parent.name,
        "epochs": str(len(history)),
        "top-1 % on held-out images, at the end": f"{history[-1]['val_top1']:.2f}",
        "training loss": f"{history[-1]['train_loss']:.4f}",
        "images/s": f"{history[-1]['train_images_per_second']:.0f}",
    }


if __name__ == "__main__":
    main()
