"""The parameters that merge methods share, each with its one-line help; a method's signature picks among them.

A parameter of type PerModel has one value for each model that is not the base, in the recipe's order.
"""

from typing import Annotated, Literal

PerModel = tuple[float, ...]

Weight = Annotated[PerModel, "share of each model"]
Density = Annotated[PerModel, "share of each model's difference that is kept, 0 to 1"]
Gamma = Annotated[PerModel, "share of each model's largest differences that is dropped as outliers"]
Epsilon = Annotated[PerModel, "how far keep probabilities go from density at the smallest and largest of a row"]
Normalize = Annotated[bool, "divide by the sum of the weights"]
Lambda = Annotated[float, "scale of the merged difference"]
Interpolation = Annotated[float, "0 gives the base, 1 the other model"]
NearswapT = Annotated[float, "distance within which the other model's elements are taken over"]
Rescale = Annotated[bool, "make up for what was dropped"]
Scale = Annotated[PerModel, "factor on the tensor"]
RamEpsilon = Annotated[float, "a difference up to this size counts as none"]
RamR = Annotated[float, "how strongly what one model owns alone is raised"]
RamAlpha = Annotated[float, "the most that the shared-to-own ratio counts"]
Numerics = Annotated[Literal["mergekit", "paper"], "whose choices are followed where the two differ"]
SelectTopK = Annotated[float, "share of elements, those of largest variance over the models, that is merged"]
Flatten = Annotated[bool, "interpolate the tensor as one vector"]
RowWise = Annotated[bool, "with nuslerp_flatten: false, interpolate column vectors (dimension 0), as mergekit names it"]
NormalizeWeights = Annotated[bool, "make the weights sum to 1"]
Eps = Annotated[float, "smallest norm that is divided by"]
MaxIterations = Annotated[int, "most steps towards the mean"]
Tolerance = Annotated[float, "step below which the mean is taken as found"]
FilterWise = Annotated[bool, "one ratio for each row instead of for the tensor"]
