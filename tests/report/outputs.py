"""Write a study and a comparison of it anew, and print the sha256 of each file: what `test_outputs` starts.

python tests/report/outputs.py TREE.json FOLDER [--figures]
"""

import json
import sys
from pathlib import Path

import numpy as np

from salsa.report import comparison, study, style
from salsa.report.sections import Section
from salsa.workflow import config, runs, schema

DRAWN = ("claims", "frontier")  # enough: all are drawn under one style
UNDRAWN = ()  # for a figure that the pages name, and that is not saved


class LengthGold:
    """A gold judge whose score is the number of letters."""

    def score(self, prompts, responses):
        return np.array([len(text) / 7 for text in responses])


def main(tree, folder, drawn):
    told = json.loads(Path(tree).read_text(encoding="utf-8"))
    folder = Path(folder)
    study.gold_judge = lambda prepare: LengthGold()
    save, draw = style.save, Section.draw
    style.save = lambda figure, folder, name: figure and save(figure, folder, name)
    Section.draw = lambda section, *study: draw(section, *study) if drawn and section.name in DRAWN else UNDRAWN
    if not drawn:
        comparison.figure = lambda points, frame, looks: None
    settings = schema.from_dict(config.StudySettings, told["settings"])
    parents = {role: Path(path) for role, path in told["parents"].items()}
    output = folder / "study"
    study.build(settings, parents, output, config.Execution())
    manifest = {"settings": {"policies": settings.policies, "config": settings.config}}
    runs.write_json(output / runs.MANIFEST, manifest)
    points = config.ComparisonSettings([{"ppo.epochs": "1"}, {"ppo.epochs": "2"}])
    comparison.build(points, {"study/0": output, "study/1": output}, folder / "comparison", config.Execution())
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): runs.file_sha256(path) for path in files}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], "--figures" in sys.argv)))
