// Products of rows of activations and a weight of floats, which is read where it is.
#pragma once
#include <cstdint>

// Up to so many rows, a product waits for the weight; more are multiplied in tiles.
constexpr int64_t FEW_ROWS = 8;

struct Product {
  const float* x;  // (rows, inputs)
  const void* w;   // (outputs, inputs)
  float* y;        // (rows, outputs)
  int64_t rows, inputs, outputs;
  float* tiles = nullptr;  // (rows / tile, inputs, tile), if there are many: rows side by side, 0 where there is no row
};

// What the library for one instruction set offers: the results for outputs `from` to `to`, for weights in each precision.
struct Multiplying {
  void (*float32)(const Product& p, int64_t from, int64_t to);
  void (*bfloat16)(const Product& p, int64_t from, int64_t to);
  void (*float16)(const Product& p, int64_t from, int64_t to);
  // How many rows a tile has, and how many outputs are computed together with it; and makes a tile.
  int64_t tile, outputs;
  void (*arrange)(const Product& p, int64_t tile);
};

namespace avx512 { extern const Multiplying multiplying; }
namespace avx2 { extern const Multiplying multiplying; }
namespace neon { extern const Multiplying multiplying; }
