"""What a new part or family can be tested with: tiny batches, and the contract that everything registered keeps.

from vlkit.testing import contract, random_batch
contract.packed_equals_alone(model)        # raises AssertionError with the largest difference
"""

from vlkit.testing import contract
from vlkit.testing.batches import random_batch, random_patches

__all__ = ["contract", "random_batch", "random_patches"]
