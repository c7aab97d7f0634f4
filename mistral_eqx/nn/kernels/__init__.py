from . import native as native
from .dense import contract as contract, rows as rows
from .flash import flash_attention as flash_attention
from .grouped import (
    contract_by_groups as contract_by_groups,
    contract_grouped as contract_grouped,
    group_of_rows as group_of_rows,
)
from .scores import Codes as Codes, attention as attention
