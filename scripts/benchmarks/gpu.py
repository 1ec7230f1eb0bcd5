"""OUT/README.md, the page of what `scripts/on_gpu.sh` measured into OUT."""

import json
from pathlib import Path

from scripts.benchmarks import speed
from scripts.benchmarks.page import table
from utils.run.command_line import Parser, command
from utils.run.logging import RECORDS, read_records

PAGE = Path(__file__).parents[2] / "docs" / "results" / "gpu" / "README.md"
MARKER = "<!-- from here on written by scripts/on_gpu.sh -->\n"


@command
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="OUT")
    folder = parser.parse_args().folder
    prose = PAGE.read_text().partition(MARKER)[0]
    (folder / "README.md").write_text(prose + MARKER + measured(folder))


def measured(folder: Path) -> str:
    parts = []
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("speed-*/results.json"))]
    if runs:
        rows = [row for run in runs for row in run["rows"]]
        rows.sort(key=lambda row: (row["what"] != "step", row["batch"]))
        parts.append(speed.as_markdown(runs[0] | {"rows": rows, "loading": []}).strip())
    if (path := folder / "workers" / "table.md").exists():
        parts.append(path.read_text().strip())
    if trained := sorted(folder.glob(f"training-*/{RECORDS}")):
        parts.append(table(map(training_line, trained)))
    parts = parts or ["Nothing of `scripts/on_gpu.sh` has been run."]
    return "\n## Measured\n\n" + "\n\n".join(parts) + "\n"


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
