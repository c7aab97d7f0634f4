// What a library for one instruction set offers: products of panels and rows of activations.
#pragma once
#include <cstdint>

// Activations in 8 bits. Each 32 numbers of a row share a scale: x = scale * code, with codes from -127 to 127.
struct Activations {
  const float* numbers;  // (rows, inputs)
  int8_t* codes;         // (rows, inputs)
  float* scales;         // (rows, inputs / 32)
  float* sums;           // (rows, inputs / 16): of each 16 numbers, scale * codes added up
  int64_t rows, inputs;
};

struct Format {
  const char* name;
  int size, bytes;
  bool exact;  // Whether it takes the numbers of activations, not their codes.
  // The products of one panel, `inputs / size` blocks of 16 * bytes, with rows `from` to `to` of the activations, into
  // y[row * stride + 0 ... 15].
  void (*product)(const uint8_t* panel, const Activations& x, int64_t from, int64_t to, float* y, int64_t stride);
};

struct Instructions {
  const char* name;
  const Format* formats;
  int count;
  void (*quantize)(const Activations& x, int64_t row);
};

extern const Instructions avx512, avx2, neon;
