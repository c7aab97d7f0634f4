from . import native as native
from .dense import contract as contract, rows as rows
from .flash import flash_attention as flash_attention
from .scores import Codes as Codes, attention as attention
