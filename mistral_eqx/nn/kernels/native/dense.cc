// Products of a weight of floats; compiled once for each instruction set.
#include "dense.h"

#include <algorithm>

#include "lanes.h"

namespace {

// Bytes ahead of the ones in use, that are fetched from memory, where an output has more than so many.
constexpr int AHEAD = 2048, SHORT = 4 * AHEAD;

// So many sums fit in registers beside the rest.
constexpr int SUMS = LANES == 8 ? 8 : 16;

float number(const float* at) { return *at; }
float number(const BFloat16* at) {
  const uint32_t bits = uint32_t(at->bits) << 16;
  return load<float>(&bits);
}
float number(const Float16* at) {
  uint16_t bits[LANES] = {at->bits};
  const Floats numbers = from_float16(load<Halves>(bits));
  return numbers[0];
}

// `outputs` neighbours at a time, so that each load of activations serves all of them.
template <class T, int outputs, int rows>
void multiply(const Product& p, int64_t output) {
  const T* w = static_cast<const T*>(p.w) + output * p.inputs;
  const int64_t bytes = p.inputs * sizeof(T), ahead = bytes > SHORT ? AHEAD : outputs * bytes;
  Floats sums[outputs][rows] = {};
  int64_t k = 0;
  for (; k + LANES <= p.inputs; k += LANES) {
    Floats x[rows];
    for (int row = 0; row < rows; row++) x[row] = load<Floats>(p.x + row * p.inputs + k);
    for (int i = 0; i < outputs; i++) {
      if (k * int64_t(sizeof(T)) % 64 == 0) __builtin_prefetch(reinterpret_cast<const char*>(w + i * p.inputs + k) + ahead);
      const Floats numbers = Read<T>::at(w + i * p.inputs + k);
      for (int row = 0; row < rows; row++) sums[i][row] = fused(numbers, x[row], sums[i][row]);
    }
  }
  for (int i = 0; i < outputs; i++)
    for (int row = 0; row < rows; row++) {
      float sum = sum_of(sums[i][row]);
      for (int64_t rest = k; rest < p.inputs; rest++) sum += number(w + i * p.inputs + rest) * p.x[row * p.inputs + rest];
      p.y[row * p.outputs + output + i] = sum;
    }
}

template <class T, int rows>
void multiply_all(const Product& p, int64_t from, int64_t to) {
  constexpr int outputs = std::clamp(SUMS / rows, 1, 4);
  for (; from + outputs <= to; from += outputs) multiply<T, outputs, rows>(p, from);
  for (; from < to; from++) multiply<T, 1, rows>(p, from);
}

template <class T>
void multiply_rows(const Product& p, int64_t from, int64_t to) {
  switch (p.rows) {
    case 1: return multiply_all<T, 1>(p, from, to);
    case 2: return multiply_all<T, 2>(p, from, to);
    case 3: return multiply_all<T, 3>(p, from, to);
    case 4: return multiply_all<T, 4>(p, from, to);
    case 5: return multiply_all<T, 5>(p, from, to);
    case 6: return multiply_all<T, 6>(p, from, to);
    case 7: return multiply_all<T, 7>(p, from, to);
    default: return multiply_all<T, FEW_ROWS>(p, from, to);
  }
}

}  // namespace

namespace SET {
const Multiplying multiplying = {multiply_rows<float>, multiply_rows<BFloat16>, multiply_rows<Float16>};
}
