"""Safety batches: from whatever the user has to a checked list, their order, and the parts of a rank."""

from safegrad_optim.batches._batches import SafetyBatches, add_contents, as_batches
from safegrad_optim.batches._parts import Part, Section, joined
from safegrad_optim.batches._positions import IGNORE_INDEX, Batch, Positions, position_mask
from safegrad_optim.batches._source import DATED, SafetySource, SourceBatches

__all__ = ["DATED", "IGNORE_INDEX", "Batch", "Part", "Positions", "SafetyBatches", "SafetySource", "Section"]
__all__ += ["SourceBatches", "add_contents", "as_batches", "joined", "position_mask"]
