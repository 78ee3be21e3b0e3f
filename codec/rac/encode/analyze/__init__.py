"""What bases do to the weights of a model: `rac analyze`.

report = analyze("model", text)          # a map of plain numbers: json.dumps(report)
html(report), draw(report, "report.png")
"""

from rac.encode.analyze.bases import Rotations, read_rotations
from rac.encode.analyze.model import analyze
from rac.encode.analyze.report import html

__all__ = ["Rotations", "analyze", "html", "read_rotations"]
