"""Rows of several experts cut into tiles of up to 128, each of one expert.

Shape suffixes: R rows sorted by expert, C columns, E experts, T tiles.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SIZE = 128


class Tiles(NamedTuple):
    """The rows of experts cut into tiles of up to 128, each of one expert; int32. There are as many
    as there can be at most, so that nothing is asked of the device: the last ones may be empty.
    """

    first_T: Tensor  # row with which a tile begins; R: the tile is empty
    expert_T: Tensor
    end_T: Tensor  # row at which the expert of a tile ends
    bounds_E: Tensor  # [E + 1]: expert e has the tiles bounds_E[e] to bounds_E[e + 1]

    def spread(self, x_RC: Tensor) -> Tensor:
        """Put the rows where their tiles are.

        Args:
            x_RC: rows, of any dtype.

        Returns:
            [128 T, C], with zeros where a tile has fewer than 128 rows.
        """
        row_T128 = self.first_T[:, None] + torch.arange(SIZE, device=x_RC.device)
        is_row = row_T128 < self.end_T[:, None]
        some_row = row_T128.clamp(max=len(x_RC) - 1)  # where there is none, any will do
        rows = x_RC[some_row.flatten()]
        return torch.where(is_row.view(-1, 1), rows, 0)


def tiles_of(offs_E: Tensor, rows: int) -> Tiles:
    """Cut rows into tiles, without asking the device for anything.

    Args:
        offs_E: int32, where each expert's rows end; the last is `rows`.
        rows: how many there are, at least 1.
    """
    zero = offs_E.new_zeros(1)
    begin_E = torch.cat([zero, offs_E[:-1]])
    tiles_E = (offs_E - begin_E + SIZE - 1) // SIZE  # of each expert
    bounds_E = torch.cat([zero, tiles_E]).cumsum(0, dtype=torch.int32)
    # Each expert begins a tile of its own.
    most = (rows + (SIZE - 1) * len(offs_E)) // SIZE
    tile_T = torch.arange(most, device=offs_E.device, dtype=torch.int32)
    expert_T = torch.searchsorted(bounds_E[1:], tile_T, right=True, out_int32=True)
    is_empty_T = expert_T == len(offs_E)
    expert_T = expert_T.clamp(max=len(offs_E) - 1)
    first_T = begin_E[expert_T] + SIZE * (tile_T - bounds_E[expert_T])
    return Tiles(first_T.masked_fill(is_empty_T, rows), expert_T, offs_E[expert_T], bounds_E)
