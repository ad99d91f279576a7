"""Best-fit packing of pieces of given lengths into few rows of equal capacity.

Pieces are placed longest first, each into the open row with the least remaining space that fits.
The remaining capacities in use are bits of one integer, so the best row is the lowest set bit at or
above the piece's length.
"""

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack pieces; the result depends only on the lengths and their order.

    Args:
        lengths: [n] integers in [1, capacity].
        capacity: capacity of a row.

    Returns:
        order: [n] int64, pieces row by row.
        row_starts: [num_rows + 1] int64, where each row begins in `order`.
    """
    rows: list[list[int]] = []
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                occupied ^= 1 << room
            rows[row].append(piece)
        else:
            room, row = capacity, len(rows)
            rows.append([piece])
        if room > length:
            rows_with[room - length].append(row)
            occupied |= 1 << (room - length)
    order = np.array([piece for row in rows for piece in row], dtype=np.int64)
    row_starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return order, row_starts
