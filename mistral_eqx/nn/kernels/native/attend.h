// Attention of few queries to the keys and values in a cache.
#pragma once
#include <cstdint>

// So many slots at a time: their keys and values stay in the nearest caches, and threads share the ranges of one head.
constexpr int64_t RANGE = 256;

// Queries, keys and values as the model has them; `seq` is small.
struct Attention {
  const float* q;       // (batch, seq, kv_heads, group, head_dim)
  const void *k, *v;    // (batch, kv_heads, slots, head_dim): floats, or codes of 8 bits
  const float *k_scales, *v_scales;  // (batch, kv_heads, slots): of the codes; null for floats
  const uint8_t* mask;  // (batch, seq, slots): which slots a query attends to
  float scale;          // of the products of queries and keys
  int64_t batch, seq, kv_heads, group, slots, head_dim;

  int64_t ranges() const { return (slots + RANGE - 1) / RANGE; }
  // Of each query and range of slots: the largest score, the sum of the others relative to it, and the mixed values.
  int64_t part_size() const { return head_dim + 2; }
  int64_t parts_size() const { return batch * kv_heads * ranges() * seq * group * part_size(); }
};

// What the library for one instruction set offers.
struct Attending {
  // The parts of one unit, of batch * kv_heads * ranges, for keys and values in each precision.
  void (*float32)(const Attention& a, int64_t unit, float* parts);
  void (*bfloat16)(const Attention& a, int64_t unit, float* parts);
  void (*float16)(const Attention& a, int64_t unit, float* parts);
  void (*int8)(const Attention& a, int64_t unit, float* parts);
  void (*float8)(const Attention& a, int64_t unit, float* parts);
  int64_t lanes;  // They divide head_dim.
};

namespace avx512 { extern const Attending attending; }
namespace avx2 { extern const Attending attending; }
namespace neon { extern const Attending attending; }
