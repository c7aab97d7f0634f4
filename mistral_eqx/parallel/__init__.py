from .agreement import broadcast as broadcast, check_same as check_same, number_of_first as number_of_first
from .choices import (
    Choice as Choice,
    read_strategy as read_strategy,
    strategies as strategies,
)
from .collectives import (
    all_slices as all_slices,
    all_to_all as all_to_all,
    all_tokens as all_tokens,
    from_last_stage as from_last_stage,
    gather as gather,
    gather_shards as gather_shards,
    holders as holders,
    in_order as in_order,
    largest_anywhere as largest_anywhere,
    last_token as last_token,
    next_stage as next_stage,
    of_last_stage as of_last_stage,
    own_shard as own_shard,
    own_slices as own_slices,
    own_tokens as own_tokens,
    pmax as pmax,
    pmin as pmin,
    psum as psum,
    psum_together as psum_together,
    psum_tokens as psum_tokens,
    psum_varying as psum_varying,
    scatter_sum as scatter_sum,
    send_on as send_on,
    shard_index as shard_index,
    vary as vary,
    vary_alike as vary_alike,
    vary_over as vary_over,
)
from .mesh import initialize as initialize, make_mesh as make_mesh
from .overlap import gathered_product as gathered_product, scattered_product as scattered_product
from .sharding import (
    check_shapes as check_shapes,
    einshard as einshard,
    gather_to_host as gather_to_host,
    put_named as put_named,
    put_on_mesh as put_on_mesh,
    shard as shard,
    with_auto_axes as with_auto_axes,
    with_strategy as with_strategy,
)
from .spmd import (
    LEADING as LEADING,
    AbstractNamed as AbstractNamed,
    entered as entered,
    kernel as kernel,
    specs as specs,
    spmd as spmd,
)
from .strategy import (
    EXPERTS as EXPERTS,
    HEAD_DIM as HEAD_DIM,
    HEADS as HEADS,
    HEADS_X_HEAD_DIM as HEADS_X_HEAD_DIM,
    HEADS_X_KV_SEQ as HEADS_X_KV_SEQ,
    KV_REPLICATED as KV_REPLICATED,
    NAMED as NAMED,
    SEQUENCE_PARALLEL as SEQUENCE_PARALLEL,
    SINGLE as SINGLE,
    Strategy as Strategy,
    whole as whole,
)
