// Products of few rows of activations and a weight of floats, which is read where it is.
#pragma once
#include <cstdint>

// At most so many rows; more are faster as products of matrices.
constexpr int64_t FEW_ROWS = 8;

struct Product {
  const float* x;  // (rows, inputs)
  const void* w;   // (outputs, inputs)
  float* y;        // (rows, outputs)
  int64_t rows, inputs, outputs;
};

// What the library for one instruction set offers: the results for outputs `from` to `to`, for weights in each precision.
struct Multiplying {
  void (*float32)(const Product& p, int64_t from, int64_t to);
  void (*bfloat16)(const Product& p, int64_t from, int64_t to);
  void (*float16)(const Product& p, int64_t from, int64_t to);
};

namespace avx512 { extern const Multiplying multiplying; }
namespace avx2 { extern const Multiplying multiplying; }
namespace neon { extern const Multiplying multiplying; }
