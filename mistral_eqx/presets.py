"""Shapes of published models by name, for random initialisation and for planning."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from .config import Latent, MistralConfig, Routing
from .rope import QueryScaling, YarnScaling, yarn_magnitude


def _mistral(
    *,
    vocab: int,
    max_positions: int,
    rope_theta: float,
    embed: int = 4096,
    hidden: int = 14336,
    layers: int = 32,
    q_per_kv: int = 4,
    pattern: tuple[int | None, ...] = (None,),
    routing: Routing | None = None,
) -> MistralConfig:
    """A config of Mistral's models: 8 key/value heads, 128 entries in a head."""
    return MistralConfig(
        vocab=vocab,
        embed=embed,
        hidden=hidden,
        layers=layers,
        kv_heads=8,
        q_per_kv=q_per_kv,
        head_dim=128,
        rope_theta=rope_theta,
        norm_eps=1e-5,
        max_positions=max_positions,
        windows=pattern * (layers // len(pattern)),
        bos_id=1,
        eos_ids=(2,),
        routing=routing,
    )


def _ministral_3(*, embed: int, hidden: int, layers: int, tied: bool = False) -> MistralConfig:
    """A config of Ministral 3: 32 query heads, and 16384 positions that YaRN extends to 262144."""
    plain = _mistral(vocab=131_072, max_positions=262_144, rope_theta=1e6, embed=embed, hidden=hidden, layers=layers)
    return dataclasses.replace(
        plain, tied=tied, rope_scaling=YarnScaling(16.0, 16_384, 1.0), query_scaling=QueryScaling(0.1, 16_384)
    )


def _latent(
    *,
    embed: int,
    hidden: int,
    layers: int,
    heads: int,
    latent: Latent,
    routing: Routing,
    factor: float,
    max_positions: int,
) -> MistralConfig:
    """A config of Mistral's models with latent attention: 8192 positions that YaRN extends."""
    return MistralConfig(
        vocab=131_072,
        embed=embed,
        hidden=hidden,
        layers=layers,
        kv_heads=heads,
        q_per_kv=1,
        head_dim=latent.nope_dim + latent.rope_dim,
        rope_theta=1e4,
        norm_eps=1e-6,
        max_positions=max_positions,
        windows=(None,) * layers,
        bos_id=1,
        eos_ids=(2,),
        rope_scaling=YarnScaling(factor, 8192, 1.0),
        query_scaling=QueryScaling(0.1, 8192),
        routing=routing,
        latent=latent,
    )


def _devstral_2() -> MistralConfig:
    """A config of Devstral 2: 4096 positions that YaRN extends to 262144."""
    plain = _mistral(
        vocab=131_072, max_positions=262_144, rope_theta=1e6, embed=12_288, hidden=28_672, layers=88, q_per_kv=12
    )
    return dataclasses.replace(plain, rope_scaling=YarnScaling(64.0, 4096, yarn_magnitude(64.0), beta_fast=4.0))


def _gpt(*, layers: int, heads: int, embed: int) -> MistralConfig:
    """This architecture with the depth and width of a minGPT. The tokens are bytes: training needs no tokenizer."""
    return MistralConfig(
        vocab=256,
        embed=embed,
        hidden=4 * embed,
        layers=layers,
        kv_heads=heads,
        q_per_kv=1,
        head_dim=embed // heads,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        max_positions=1024,
        windows=(None,) * layers,
    )


PRESETS: Mapping[str, MistralConfig] = MappingProxyType(
    {
        "smollm2-135m": MistralConfig(
            vocab=49152,
            embed=576,
            hidden=1536,
            layers=30,
            kv_heads=3,
            q_per_kv=3,
            head_dim=64,
            rope_theta=100_000.0,
            norm_eps=1e-5,
            max_positions=8192,
            windows=(None,) * 30,
            tied=True,
            bos_id=1,
            eos_ids=(2,),
        ),
        "7b-v0.1": _mistral(vocab=32_000, max_positions=32_768, rope_theta=1e4, pattern=(4096,)),
        "7b-v0.2": _mistral(vocab=32_000, max_positions=32_768, rope_theta=1e6),
        "7b-v0.3": _mistral(vocab=32_768, max_positions=32_768, rope_theta=1e6),
        "mathstral-7b": _mistral(vocab=32_768, max_positions=32_768, rope_theta=1e6),
        "nemo-12b": _mistral(vocab=131_072, max_positions=128_000, rope_theta=1e6, embed=5120, layers=40),
        "small-3-24b": _mistral(
            vocab=131_072, max_positions=32_768, rope_theta=1e8, embed=5120, hidden=32_768, layers=40
        ),
        "small-3.1-24b": _mistral(
            vocab=131_072, max_positions=131_072, rope_theta=1e9, embed=5120, hidden=32_768, layers=40
        ),
        "large-2-123b": _mistral(
            vocab=32_768,
            max_positions=131_072,
            rope_theta=1e6,
            embed=12_288,
            hidden=28_672,
            layers=88,
            q_per_kv=12,
        ),
        "8x7b": _mistral(vocab=32_000, max_positions=32_768, rope_theta=1e6, routing=Routing(experts=8, per_token=2)),
        "8x22b": _mistral(
            vocab=32_768,
            max_positions=65_536,
            rope_theta=1e6,
            embed=6144,
            hidden=16_384,
            layers=56,
            q_per_kv=6,
            routing=Routing(experts=8, per_token=2),
        ),
        # One layer in four has no window; the others attend to the last 32768 positions.
        "ministral-8b": _mistral(
            vocab=131_072,
            max_positions=131_072,
            rope_theta=1e8,
            hidden=12_288,
            layers=36,
            pattern=(None, 32_768, 32_768, 32_768),
        ),
        "ministral-3-3b": _ministral_3(embed=3072, hidden=9216, layers=26, tied=True),
        "ministral-3-8b": _ministral_3(embed=4096, hidden=14_336, layers=34),
        "ministral-3-14b": _ministral_3(embed=5120, hidden=16_384, layers=40),
        "devstral-2-123b": _devstral_2(),
        # The text models of two multimodal models. That they have the sizes of Small 3.1 and of Devstral 2 is inferred,
        # and so is the scaling of the first.
        "devstral-small-2-24b": dataclasses.replace(
            _mistral(vocab=131_072, max_positions=393_216, rope_theta=1e8, embed=5120, hidden=32_768, layers=40),
            rope_scaling=YarnScaling(48.0, 8192, 1.0),
            query_scaling=QueryScaling(0.1, 8192),
        ),
        "medium-3.5-128b": _devstral_2(),
        # The defaults of transformers' type voxtral.
        "voxtral-mini-3b": _mistral(
            vocab=131_072, max_positions=131_072, rope_theta=1e8, embed=3072, hidden=8192, layers=30
        ),
        # The defaults of transformers' type mistral4. That YaRN leaves the scores alone is inferred.
        "small-4-119b": _latent(
            embed=4096,
            hidden=12_288,
            layers=36,
            heads=32,
            latent=Latent(q_rank=1024, kv_rank=256, nope_dim=64, rope_dim=64, value_dim=128),
            routing=Routing(experts=128, per_token=4, hidden=2048, shared=1),
            factor=128.0,
            max_positions=1_048_576,
        ),
        # As in the tests of programs that run it; the norm's constant is inferred.
        "large-3-675b": _latent(
            embed=7168,
            hidden=16_384,
            layers=61,
            heads=128,
            latent=Latent(q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
            routing=Routing(experts=128, per_token=4, hidden=4096, shared=1, first_dense=3),
            factor=36.0,
            max_positions=294_912,
        ),
        "gpt-nano": _gpt(layers=3, heads=3, embed=48),
        "gpt-micro": _gpt(layers=4, heads=4, embed=128),
        "gpt-mini": _gpt(layers=6, heads=6, embed=192),
        "gpt-small": _gpt(layers=12, heads=12, embed=768),
        "gpt-medium": _gpt(layers=24, heads=16, embed=1024),
        "gpt-large": _gpt(layers=36, heads=20, embed=1280),
    }
)
