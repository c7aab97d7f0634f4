// What the library for one instruction set offers: products of panels and rows of activations.
#pragma once
#include <cstdint>

// Activations as two codes of 8 bits, from -127 to 127: x = scale * (first + second / FINER), where each 32 numbers of a
// row share a scale. That is within 1.6e-5 of the largest of them, so that results are those of float32 but for rounding,
// and do not depend on where a sum was made; and a kernel that waits for memory takes no longer than with one code.
constexpr float FINER = 254;

struct Activations {
  const float* numbers;  // (rows, inputs)
  int8_t* codes;         // (rows, inputs / 32, 2, 32): the first codes of 32 numbers, then their second ones
  float* scales;         // (rows, inputs / 32)
  float* sums;           // (rows, inputs / 16): of each 16 numbers, scale * codes added up
  // Of many rows, those of a tile side by side, 0 where there is no row; either their numbers, or two neighbouring codes of
  // 16 bits, FINER * first + second, in each lane, and what these are multiplied by.
  float* tiles;          // (rows / tile, inputs, tile)
  int32_t* pairs;        // (rows / tile, inputs / 2, tile)
  float* pair_scales;    // (rows / tile, inputs / 32, tile)
  float* pair_sums;      // (rows / tile, inputs / 16, tile)
  int64_t rows, inputs;
};

// Of a row in double quantization: how many numbers share a scale, scales a factor; how many factors `count` scales can
// have; and the bytes beside the codes: an offset, the factors, the index of the first scale, and the scales.
constexpr int SCALED = 64, SHARE = 256;
constexpr int factors_of(int count) { return (count + SHARE - 2) / SHARE + 1; }
constexpr int scale_bytes(int count) { return 4 + 4 * factors_of(count) + (count + 4) / 4 * 4; }

struct Format {
  const char* name;  // It ends in a slash if blocks have any size.
  int size, bytes;   // Of a block; if it has any size, 0 and the bytes without its codes.
  int bits;          // Of a code, if a block has any size.
  int group;         // Numbers that share a scale, if it is a row in double quantization; or 0.
  bool exact;        // Whether it takes the numbers of activations, not their codes.
  // The products of one panel, `inputs / size` blocks of 16 * bytes, with rows `from` to `to` of the activations, into
  // y[row * stride + 0 ... 15].
  void (*product)(const Format& format, const uint8_t* panel, const Activations& x, int64_t from, int64_t to, float* y,
                  int64_t stride);
  // The same for many rows and `count` panels of so many bytes, from the tiles of activations. A stretch of a panel is unpacked
  // at a time, which pays if enough rows use it.
  void (*product_of_many)(const Format& format, const uint8_t* panels, int64_t bytes, int64_t count, const Activations& x,
                          float* y, int64_t stride);

  // This format with blocks of so many numbers, a multiple of `step()`.
  Format of_size(int numbers) const {
    Format one = *this;
    one.size = numbers, one.bytes = bytes + numbers / 8 * bits;
    if (group) one.bytes += scale_bytes(numbers / group);
    return one;
  }
  int step() const { return group ? group : 32; }
};

// A block has at most so many numbers.
constexpr int LARGEST_BLOCK = 1 << 20;

// So many inputs of a panel are unpacked at a time; a multiple of 32.
constexpr int64_t STRETCH = 256;

struct Instructions {
  const char* name;
  const Format* formats;
  int count;
  void (*quantize)(const Activations& x, int64_t row);
  // How many rows a tile of numbers has; and makes one.
  int64_t tile;
  void (*arrange)(const Activations& x, int64_t tile);
  // The same for a tile of codes; 0 where products of numbers are as fast, and are used for all formats.
  int64_t pair_tile;
  void (*arrange_pairs)(const Activations& x, int64_t tile);
};

namespace avx512 { extern const Instructions instructions; }
namespace avx2 { extern const Instructions instructions; }
namespace neon { extern const Instructions instructions; }
