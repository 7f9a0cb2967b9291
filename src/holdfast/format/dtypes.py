"""Element types: their names here (PyTorch's), their codes in safetensors, and what numpy calls them.

A type that safetensors has no code for is stored under another code with an extra last dimension (complex128 as pairs
of F64), so that the file stays standard; the manifest keeps the true type.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        name: PyTorch's name for it, without ``torch.``.
        code: the safetensors code under which its bytes are stored.
        itemsize: bytes of one element.
        numpy: numpy's name for it; None when numpy has none.
        parts: how many stored elements make one element.
    """

    name: str
    code: str
    itemsize: int
    numpy: str | None
    parts: int = 1

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape under which a tensor of ``shape`` stands in the file."""
        return shape if self.parts == 1 else (*shape, self.parts)


_TABLE = (
    DType("float64", "F64", 8, "float64"),
    DType("float32", "F32", 4, "float32"),
    DType("float16", "F16", 2, "float16"),
    DType("bfloat16", "BF16", 2, None),
    DType("float8_e4m3fn", "F8_E4M3", 1, None),
    DType("float8_e5m2", "F8_E5M2", 1, None),
    DType("float8_e4m3fnuz", "F8_E4M3FNUZ", 1, None),
    DType("float8_e5m2fnuz", "F8_E5M2FNUZ", 1, None),
    # Readers of safetensors 0.8 for PyTorch do not know F8_E8M0 and F4 yet: their bytes go as bytes.
    DType("float8_e8m0fnu", "U8", 1, None),
    DType("float4_e2m1fn_x2", "U8", 1, None),
    DType("int64", "I64", 8, "int64"),
    DType("int32", "I32", 4, "int32"),
    DType("int16", "I16", 2, "int16"),
    DType("int8", "I8", 1, "int8"),
    DType("uint64", "U64", 8, "uint64"),
    DType("uint32", "U32", 4, "uint32"),
    DType("uint16", "U16", 2, "uint16"),
    DType("uint8", "U8", 1, "uint8"),
    DType("bool", "BOOL", 1, "bool"),
    DType("complex64", "C64", 8, "complex64"),
    DType("complex128", "F64", 16, "complex128", parts=2),
    DType("complex32", "F16", 4, None, parts=2),
)

DTYPES: dict[str, DType] = {dtype.name: dtype for dtype in _TABLE}
CODE_ITEMSIZE: dict[str, int] = {dtype.code: dtype.itemsize // dtype.parts for dtype in _TABLE}
