"""Layout of queries, keys and values in one packed projection."""

from dataclasses import dataclass

from torch import Tensor

from phi4_kernels.errors import ShapeError

ORDERS = ("grouped", "blocked")


@dataclass(frozen=True, slots=True)
class QKVLayout:
    """The packed row of one token: (queries_per_group + 2) * num_groups heads of head_dim.

    `grouped` is Megatron's order, per KV head its queries, its key, its value; `blocked` is Hugging
    Face's, all queries, all keys, all values. Both are seen through strides, never copied.
    """

    num_groups: int
    """KV heads on this rank."""
    queries_per_group: int
    head_dim: int
    order: str = "grouped"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ShapeError(f"QKVLayout: order is {self.order!r}; expected one of {ORDERS}")
        sizes = (self.num_groups, self.queries_per_group, self.head_dim)
        if min(sizes) < 1 or self.head_dim % 2:
            raise ShapeError(
                f"QKVLayout: num_groups, queries_per_group, head_dim are {sizes}; expected "
                "positive numbers and an even head_dim, whose halves rotate against each other"
            )

    @property
    def num_query_heads(self) -> int:
        """Query heads on this rank."""
        return self.num_groups * self.queries_per_group

    @property
    def width(self) -> int:
        """Elements of a packed row."""
        return (self.num_query_heads + 2 * self.num_groups) * self.head_dim

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of packed [T, width]: q [T, G, Q, D], k [T, G, D], v [T, G, D]."""
        groups, queries = self.num_groups, self.queries_per_group
        if self.order == "grouped":
            # Per group: Q queries, then its key, then its value.
            slots = packed.view(-1, groups, queries + 2, self.head_dim)
            return slots[:, :, :queries], slots[:, :, queries], slots[:, :, queries + 1]
        # All queries, then all keys, then all values.
        heads = packed.view(-1, groups * (queries + 2), self.head_dim)
        q, k, v = heads.split((self.num_query_heads, groups, groups), dim=1)
        return q.unflatten(1, (groups, queries)), k, v
