from . import native as native
from .dense import contract as contract, rows as rows
from .flash import flash_attention as flash_attention
from .grouped import contract_grouped as contract_grouped
from .scores import Codes as Codes, attention as attention
