"""What bases do to the weights of a model: `rac analyze`.

report = analyze("model", text)          # a map of plain numbers: json.dumps(report)
html(report), draw(report, "report.png")
"""

from rac.study.analyze.bases import Rotations, read_rotations
from rac.study.analyze.model import Asked, analyze
from rac.study.analyze.report import html

__all__ = ["Asked", "Rotations", "analyze", "html", "read_rotations"]
