"""Rotations that are learned: by the model's loss (SpinQuant), by the kurtosis of its activations (KurTail), by rate.

docs/methods/spinquant.md shows how they are used. torch is imported only where a function needs it.
"""

from rac.methods.rotations.kurtail import kurtail, kurtosis
from rac.methods.rotations.learned import Axis, compare_axes, learn_axis
from rac.methods.rotations.result import Rotations, attached, fuse, load, save
from rac.methods.rotations.simulate import Simulated, quantised, simulated
from rac.methods.rotations.spinquant import loss_of, spinquant

__all__ = ["Axis", "Rotations", "Simulated", "attached", "compare_axes", "fuse", "kurtail", "kurtosis", "learn_axis"]
__all__ += ["load", "loss_of", "quantised", "save", "simulated", "spinquant"]
