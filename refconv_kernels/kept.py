"""``W_t`` kept beyond the call that computed it, as long as nothing it was computed from changes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor


class KeptWeight:
    """``weight``, and what it was computed from: by identity, address and version.

    A write through ``parameter.data`` changes none of them.
    """

    def __init__(self, weight: Tensor, sources: Sequence[Tensor]) -> None:
        self.weight = weight
        self._sources = [(weakref.ref(t), t.data_ptr(), t._version) for t in sources]

    @classmethod
    def of(cls, weight: Tensor, sources: Sequence[Tensor]) -> KeptWeight | None:
        """None for what cannot be watched: inference tensors have no version, functorch's wrappers no address."""
        try:
            return cls(weight, sources)
        except RuntimeError:
            return None

    def is_of(self, sources: Sequence[Tensor]) -> bool:
        """Whether computing it from ``sources`` now would give the same."""
        if len(sources) != len(self._sources):
            return False
        try:
            for t, (ref, address, version) in zip(sources, self._sources, strict=True):
                if ref() is not t or t.data_ptr() != address or t._version != version:
                    return False
        except RuntimeError:
            return False
        return True
