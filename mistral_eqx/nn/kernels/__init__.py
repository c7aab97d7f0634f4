from . import native as native
from .dense import contract as contract, rows as rows
from .flash import flash_attention as flash_attention
from .scores import contract_head_dim as contract_head_dim, contract_kv_seq as contract_kv_seq
