"""The typed tree: Python values as JSON, exact in type and bits.

JSON stands for itself where it can say a value exactly. Everything else is an object with one key, the tag:

    $tensor $ndarray                      the name of a tensor in the entry's file
    $tuple $dict $set $frozenset          containers; ``$dict`` for keys that are not plain strings
    $ordereddict $counter $defaultdict $deque
    $float $int $complex $bytes $bytearray $scalar
    $path $datetime $date $time $timedelta
    $dtype $size $device                  torch's, where torch is loaded
    $codec                                a type the user registered

A type outside this table is an error with the path to it. Nothing is guessed, coerced or imported.
"""

from holdfast.format.tree.decoding import decode, plain_numpy_dtype
from holdfast.format.tree.encoding import encode
from holdfast.format.tree.nodes import (
    IN_FILES,
    MAX_DEPTH,
    Json,
    LeafDecoder,
    LeafEncoder,
    Opaque,
    OpaqueLeaves,
    child,
    unsupported,
)

__all__ = [
    "IN_FILES",
    "MAX_DEPTH",
    "Json",
    "LeafDecoder",
    "LeafEncoder",
    "Opaque",
    "OpaqueLeaves",
    "child",
    "decode",
    "encode",
    "plain_numpy_dtype",
    "unsupported",
]
